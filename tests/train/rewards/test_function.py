"""Users' functions are called as TRL calls them, and broken ones end as documented, without leaving a process."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.rewards.blend import Blend, Part, Scores
from hpc_rlhf.train.rewards.function import FunctionReward
from hpc_rlhf.train.rewards.text import Failure, FromText, Score, TextBatch
from hpc_rlhf.train.runtime.world import World
from tests.train.worlds import Letters, alone, ids, on_ranks

FILE = Path(__file__).with_name("broken.py")
COLUMNS = {"answer": ["a", "c", None, 4]}
RESPONSES = ("a", "b", "c", "4")


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What only processes of this test have on their command line or in their environment; none is left after it."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv("MARK", mark)
    yield mark
    monkeypatch.delenv("MARK")
    for _ in range(50):
        if not (left := having(mark)):
            return
        time.sleep(0.1)
    pytest.fail(f"processes are left: {left}")


def having(mark: str) -> list[int]:
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                pids.append(int(process.name))
        except OSError:
            continue
    return pids


def batch(responses: Sequence[str] = RESPONSES, columns: Mapping[str, Sequence[Any]] = COLUMNS) -> TextBatch:
    return TextBatch(["?"] * len(responses), list(responses), ids(*responses), columns)


def judged(name: str, of: TextBatch | None = None, timeout: float = 20) -> list[Score]:
    reward = FunctionReward(FILE, name, timeout)
    try:
        return reward.judge(of or batch())
    finally:
        reward.close()


def test_a_function_gets_what_it_takes_by_keyword(mark: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert judged("works") == [1.0, 0.0, None, 1.0]
    assert judged("awaits", batch(("", "abc"), {"answer": [1, 2]})) == [0.0, 3.0]
    assert judged("everything") == [2.0, 2.0, 2.0, 2.0]
    names = ["answer", "completion_ids", "completions", "prompts", "responses"]
    assert str(names) in capfd.readouterr().err


def test_only_responses_for_which_it_raises_fail(mark: str) -> None:
    scores = judged("raises", batch(("a", "", "c"), {}))

    assert [scores[0], scores[2]] == [2.0, 2.0]  # it was asked about both together, without the one that failed
    assert scores[1] == Failure("raised KeyError: 'empty' (line 33 of broken.py)", INPUT_WRONG)


ALL = "for all 4 responses of rank 0; the first is 'a', to '?'"
ABSENT = "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"
DIVIDED = "ZeroDivisionError: division by zero"
NEEDED = "missing 1 required positional argument: 'text'"


@pytest.mark.parametrize(
    ("name", "why", "exit_code"),
    [
        ("hangs", f"took longer than 2 s (line 39 of broken.py), {ALL}", RUN_FAILED),
        ("too_few", f"gave 1 scores for 4 responses, {ALL}", INPUT_WRONG),
        ("not_a_number", "gave nan, which is not a finite number in float32, for response 1 of rank 0,", INPUT_WRONG),
        ("exits", f"its process ended with exit code 3 after printing 'no key for the judge', {ALL}", RUN_FAILED),
        ("crashes", f"its process was killed by SIGSEGV (line 81 of broken.py), {ALL}", RUN_FAILED),
        ("leaves", f"raised SystemExit: no key for the judge (line 75 of broken.py), {ALL}", INPUT_WRONG),
        ("needs_package", f"raised {ABSENT} (line 97 of broken.py), {ALL}", INPUT_WRONG),
        ("wrong_signature", f"raised TypeError: wrong_signature() {NEEDED}, {ALL}", INPUT_WRONG),
        ("only_together", f"raised {DIVIDED} (line 85 of broken.py), but for none of them alone, {ALL}", INPUT_WRONG),
        ("forgets_to_return", f"returned None, not a list with a number for each response, {ALL}", INPUT_WRONG),
        ("words", f"returned 'good' among its scores, which is not a number, {ALL}", INPUT_WRONG),
    ],
)  # fmt: skip
def test_a_failure_says_what_where_and_for_which_responses(mark: str, name: str, why: str, exit_code: int) -> None:
    reward = FunctionReward(FILE, name, timeout=2 if name == "hangs" else 20)
    try:
        with pytest.raises(HpcRlhfError) as caught:
            alone(lambda world: Blend([Part(name, FromText(reward, Letters(), world))], Letters(), world).details(
                ids(*"????"), ids(*RESPONSES), {"answer": [1, 2, 3, 4], "prompt": ["?"] * 4}
            ))  # fmt: skip
    finally:
        reward.close()
    assert caught.value.message.startswith(why)
    assert caught.value.exit_code == exit_code
    assert '"prompt"' not in caught.value.message


def test_a_function_that_hung_is_asked_in_a_new_process_next_time(mark: str) -> None:
    reward = FunctionReward(FILE, "hangs", 2)
    try:
        first, second = (reward.judge(batch(("a",), {})) for _ in range(2))
        assert first == second == [Failure("took longer than 2 s (line 39 of broken.py)", RUN_FAILED, of_all=True)]
    finally:
        reward.close()


def test_none_for_all_and_nan_are_returned_as_they_are(mark: str) -> None:
    assert judged("nothing") == [None] * 4
    scores = judged("not_a_number")
    assert scores[1] != scores[1]
    assert [scores[0], *scores[2:]] == [1.0] * 3


def test_megabytes_of_output_do_not_reach_the_log(mark: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert judged("prints") == [1.0] * 4
    output = capfd.readouterr()
    assert len(output.err) < 70_000
    assert "what the reward prints from here on is left out" in output.err
    assert not output.out


def test_a_function_that_forks_gives_one_answer(mark: str) -> None:
    reward = FunctionReward(FILE, "forks", 20)
    try:
        assert [reward.judge(batch()) for _ in range(3)] == [[1.0] * 4] * 3
        assert having(mark)
    finally:
        reward.close()


def test_no_process_outlives_a_rank_that_is_killed(mark: str) -> None:
    code = f"""
import time
from hpc_rlhf.train.rewards.workers import Pool
arguments = {{"file": {str(FILE)!r}, "name": "forks", "seconds": 20}}
pool = Pool("hpc_rlhf.train.rewards.user_function:load", arguments, size=1, timeout=20)
print(pool.map([{{"completions": ["a", "b"]}}])[0].value, flush=True)
time.sleep(1000)
"""
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "[1.0, 1.0]\n"
    assert len(having(mark)) > 1
    rank.send_signal(signal.SIGKILL)
    rank.wait()


def test_a_failure_on_one_rank_ends_all_with_the_same_error(mark: str) -> None:
    rewards = [FunctionReward(FILE, "raises", 20) for _ in range(2)]

    def work(world: World) -> Scores:
        rows = [ids("a", "b"), ids("c", "")][world.rank]
        source = FromText(rewards[world.rank], Letters(), world)
        return Blend([Part("mine", source)], Letters(), world).details(rows, rows, {})

    try:
        first, second = on_ranks(2, work)
    finally:
        for reward in rewards:
            reward.close()
    assert isinstance(first, HpcRlhfError)
    assert str(first) == str(second)
    assert first.message.startswith("raised KeyError: 'empty' (line 33 of broken.py), for response 1 of rank 1, ''")


def test_a_file_that_cannot_be_imported_is_refused_at_once(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("import helpers_beside_it\ndef score(completions): return []\n")
    with pytest.raises(HpcRlhfError, match="ModuleNotFoundError: No module named 'helpers_beside_it'") as caught:
        FunctionReward(file, "score", 20)
    assert caught.value.where == str(file)
