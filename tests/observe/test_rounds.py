"""Rounds that follow one another, in compare and in the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.run.layout import RunDir
from tests.cli.test_next import finished


@pytest.fixture
def chain(tmp_path: Path) -> list[RunDir]:
    """Three rounds; the first wins most, but against another model than the others."""
    first = finished(tmp_path / "first", [], {"ppo": 0.9})
    runs = [first]
    for name, rate in (("first-round2", 0.6), ("first-round3", 0.7)):
        last = runs[-1]
        run = finished(
            tmp_path / name, [], {"ppo": rate}, base="start", stages={"reward": {}, "ppo": {}}, follows=str(last.path),
            models={"actor": str(last.stage("ppo").model), "reward": str(last.stage("reward").model)},
        )  # fmt: skip
        runs.append(run)
    return runs


def test_compare_shows_rounds_in_their_order(chain: list[RunDir], capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (str(run.path) for run in chain)
    assert main(["compare", third, first, second, "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["in_rounds"]
    assert [run["against"] for run in comparison["runs"]] == ["sft", "ppo of first", "ppo of first-round2"]
    assert [run["numbers"]["win_rate"]["value"] for run in comparison["runs"]] == [0.9, 0.6, 0.7]
    assert main(["compare", first, second]) == 0
    shown = capsys.readouterr()
    assert re.search(r"2 +60% \(50–70\) +ppo of first ", shown.out)
    assert shown.err.startswith("rounds in their order")
    assert main(["compare", first, third, "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["in_rounds"], "there is one between them"
    assert main(["compare", first, second, "--by", "win_rate"]) == 0
    assert capsys.readouterr().err.startswith("ranked by win_rate")


def test_the_report_has_the_rounds(chain: list[RunDir], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(chain[2].path), "--out", "-"]) == 0
    page = capsys.readouterr().out
    section = re.sub("<[^>]+>", " ", page[page.index('<section id="rounds"') :].partition("</section>")[0])
    assert re.search(r"1 +first +ppo +90% \(80–100\) +sft", section)
    assert re.search(r"3 +first-round3 +ppo +70% \(60–80\) +ppo of first-round2", section)
    (chain[0].job_yaml).unlink()
    for run, there in ((chain[2], False), (chain[1], False)):
        assert main(["report", str(run.path), "--out", "-"]) == 0
        assert ('<section id="rounds"' in capsys.readouterr().out) is there, "nothing is claimed of a run that is gone"
