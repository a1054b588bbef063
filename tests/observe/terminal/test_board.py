"""What status and watch draw at common terminal widths."""

from __future__ import annotations

import time
from io import StringIO

import pytest
from rich.console import Console

from hpc_rlhf.observe.goodput.spans import Goodput, Interruption, Spans
from hpc_rlhf.observe.status import StageStatus
from hpc_rlhf.observe.terminal.board import Board, sparks


def draw(width: int, ascii_only: bool = False) -> list[str]:
    """The board of a running chain with long values."""
    now = time.time()
    broken = (
        Interruption("preempted", now - 9000, "node1", 100),
        Interruption("preempted", now - 7300, "node12", 4100),
    )
    stages = [
        StageStatus("sft", "done", "", "4181520", 3, 12000, 12000, "loss", 1.5, {"loss": 1.5}, now,
                    goodput=Goodput(Spans(productive=45000.0), broken)),
        StageStatus("reward", "running", "", "4181521", 1, 4200, 12000, "loss", 0.51,
                    {"loss": 0.51, "accuracy": 0.71}, now - 700, 90061.0,
                    held_out={"step": 4000, "accuracy": 0.69, "loss": 0.55, "margin": None, "best_step": 3000}),
        StageStatus("ppo", "waiting", "for sft and reward", "4181522"),
        StageStatus("eval", "waiting", "for sft, reward and ppo"),
    ]  # fmt: skip
    curves = {("sft", "loss"): [9.0 / step for step in range(1, 400)], ("ppo", "reward"): []}
    board, text = Board(width, live=True, ascii_only=ascii_only), StringIO()
    console = Console(file=text, width=width, highlight=False, color_system=None)
    for part in (*board.whole(stages), board.curves(curves)):
        assert part is not None
        console.print(part)
    return [line.rstrip() for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 140])
def test_board_at_terminal_widths(width: int) -> None:
    lines = draw(width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for words in ("took 12 h 30 min", "12000/12000", "4200/12000", "25 h 1 min left", "loss 0.51", "4181522"):
        assert words in text
    unfolded = " ".join(text.split())
    assert "sft 2 interruptions: 2 preempted; latest: preempted at step 4100 on node12, 2 h ago" in unfolded
    assert "ppo waiting for sft and reward (25 h 1 min left)" in unfolded
    assert "eval waiting for sft, reward (25 h 1 min left) and ppo" in unfolded
    assert "reward latest step 11 min ago" in unfolded
    assert "held out, at step 4000: accuracy 0.69, loss 0.55, margin -; best at step 3000" in unfolded
    assert ("━━━─────── 4200/12000 35%" in text and "accuracy 0.71" in text) == (width == 140)


def test_narrow_board_drops_whole_columns() -> None:
    lines = draw(50)
    assert max(map(len, lines)) <= 50
    assert lines[0].split() == ["stage", "state", "progress", "time"]
    assert lines[2].split() == ["reward", "running", "4200/12000", "25", "h", "1", "min", "left"]


def test_ascii_terminal_gets_only_ascii() -> None:
    assert "\n".join(draw(140, ascii_only=True)).isascii()


def test_sparkline_averages_equal_parts() -> None:
    assert sparks([], 8) == ""
    assert sparks([1.0], 8) == "▅"
    assert sparks([3.0, 3.0], 8) == "▅▅"
    assert sparks([0.0, 1.0, 2.0, 3.0], 8, "abcd") == "abcd"
    assert sparks([0.0, 0.0, 0.0, 3.0, 3.0, 3.0], 2, "ab") == "ab"
