"""check: the errors in a spec's data are at the field that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.launch.survey import refuse_bad_data
from hpc_rlhf.spec.load import load_spec
from tests.spec.texts import JOBS

ROWS = "".join(
    json.dumps({"prompt": f"Question {n}?", "chosen": "" if n % 9 == 0 else "Yes.", "rejected": "No."}) + "\n"
    for n in range(90)
)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(ROWS)
    text = (JOBS / "tiny.yaml").read_text()
    source = text[text.index("  sources:") :].splitlines()[0]
    (tmp_path / "job.yaml").write_text(
        text.replace(source, "  sources:\n  - {path: a.jsonl, format: prompt-chosen-rejected}")
    )
    return "job.yaml"


def check(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return main(["check", *args]), capsys.readouterr().out


def test_rows_that_are_lost_are_a_warning(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(job, capsys=capsys)
    assert code == 0
    assert out.splitlines()[0] == "job.yaml: ok"
    assert "data.sources.0: in the first 90 rows, 11% of the rows of" in out
    assert "a.jsonl:1)" in out


def test_data_that_a_stage_cannot_use_is_an_error_with_its_place(
    job: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(ROWS.replace('"rejected"', '"worse"'))
    code, out = check(job, capsys=capsys)
    assert code == 2
    line = (tmp_path / job).read_text().splitlines().index("  sources:") + 1
    assert out.startswith(f"job.yaml:{line}:3: data.sources: none of the rows gives pairs")
    with pytest.raises(Exception, match="none of the rows gives pairs") as caught:
        refuse_bad_data(load_spec(job))
    assert getattr(caught.value, "exit_code", None) == 2

    (tmp_path / "a.jsonl").write_text(ROWS.replace('"chosen"', '"answer"'))
    code, out = check(job, "--json", capsys=capsys)
    (problem,) = json.loads(out)[job]
    assert (code, problem["path"], problem["line"]) == (2, "data.sources.0", line + 1)
    assert "a.jsonl:1: the row does not fit" in problem["what"]


@pytest.mark.slow
def test_all_rows_are_read_on_request(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(job, "--data", "--json", capsys=capsys)
    facts = json.loads(out)[job]
    assert (code, facts["problems"]) == (0, [])
    for stage in ("sft", "reward", "ppo"):
        (counts,) = facts["data"][f"stages.{stage}"]
        assert counts["rows"] == 90
        assert counts["outcomes"]["no answer"]["rows"] == 10
