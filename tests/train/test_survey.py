"""What is known of the data before a stage trains is what the stage then does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import StageDir
from hpc_rlhf.run.row_counts import stage_counts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train import survey
from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.runtime.world import World
from tests.train.data.specs import spec_of
from tests.train.data.test_row_counts import BROKEN, pair


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hh(path: str) -> dict[str, Any]:
    return {"path": path, "format": "hh"}


def test_the_survey_predicts_what_the_stages_do(tmp_path: Path, world: World) -> None:
    rows = [*[pair(n) for n in range(120)], *BROKEN, *[pair(n, chosen=" long" * n) for n in range(200, 260)]]
    spec = spec_of(
        hh(write(tmp_path / "a.jsonl", rows)), {"demo": 50, "weight": 1.5}, max_prompt_tokens=24, max_answer_tokens=30,
        held_out=0.2,
    )  # fmt: skip
    predicted = survey.read_all(spec)
    assert predicted.problems == []
    tokenizer = survey.tokenizer_of(spec, tmp_path / "tokenizer")
    for stage in spec.trained:
        files = StageDir(tmp_path / stage)
        prepare(spec, stage, tokenizer, files.data, world)
        assert [counts.to_dict() for counts in stage_counts(files)] == predicted.data[f"stages.{stage}"]
    assert any("cut on the right" in note for note in predicted.notes)


@pytest.mark.parametrize("limits", [{"max_dropped": 0.02}, {"max_prompt_tokens": 2}])
def test_the_survey_predicts_a_refusal(limits: dict[str, Any], tmp_path: Path, world: World) -> None:
    rows = [*[pair(n) for n in range(120)], *BROKEN]
    spec = spec_of(hh(write(tmp_path / "a.jsonl", rows)), **limits)
    predicted = {problem["what"] for problem in survey.read_all(spec).problems}
    tokenizer = survey.tokenizer_of(spec, tmp_path / "tokenizer")
    met = set()
    for stage in spec.trained:
        try:
            prepare(spec, stage, tokenizer, tmp_path / stage, world)
        except HpcRlhfError as error:
            met.add(error.message)
    assert met
    assert {what.partition(": ")[2] for what in predicted} == met


def problems(spec: JobSpec) -> list[tuple[str, str]]:
    return [(problem["path"], problem["what"]) for problem in survey.look(spec).problems]


@pytest.mark.parametrize(
    ("stages", "needs"),
    [(("sft", "reward"), "reward"), (("sft", "dpo"), "dpo"), (("sft", "reward", "ppo", "dpo"), "reward and dpo")],
)
def test_a_stage_that_no_source_serves_is_refused_before_any_trains(
    stages: tuple[str, ...], needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = hh(write(tmp_path / "a.jsonl", [{"chosen": pair(n)["chosen"]} for n in range(9)]))
    what = f"none of the rows gives pairs of responses, which {needs} needs; {{}} were read"
    assert problems(spec_of(single, stages=stages)) == [("data.sources", what.format("all 9"))]
    assert problems(spec_of(single, stages=("sft",))) == []
    assert problems(spec_of(single, {"demo": 10}, stages=stages)) == [], "another source has pairs"
    late = hh(write(tmp_path / "b.jsonl", [{"chosen": pair(n)["chosen"], "rejected": None} for n in range(3000)]))
    assert problems(spec_of(late, stages=stages)) == [("data.sources", what.format("all 3,000"))]
    monkeypatch.setattr(survey, "SEARCHED", 2000)
    survey.sampled.cache_clear()
    assert problems(spec_of(late, stages=stages)) == [("data.sources", what.format("the first 2,000 of each source"))]
    monkeypatch.undo()
    write(tmp_path / "b.jsonl", [{**pair(n), **({"rejected": None} if n < 3000 else {})} for n in range(3001)])
    survey.sampled.cache_clear()
    assert problems(spec_of(late, stages=stages)) == [], "there is one far behind"


def test_each_file_is_opened(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", [pair(n) for n in range(3)])
    (tmp_path / "2.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    ((path, what),) = problems(spec_of(hh(str(tmp_path))))
    assert path == "data.sources.0"
    assert what.startswith(f"{tmp_path}/2.jsonl:1: the row does not fit the format hh: 'chosen' is missing")


def test_a_look_at_the_data_needs_no_torch(tmp_path: Path) -> None:
    spec = spec_of(hh(write(tmp_path / "a.jsonl", [pair(n) for n in range(3)])))
    code = "import sys; from hpc_rlhf.train import survey; survey.main(); print(*sys.modules, file=sys.stderr)"
    asked = json.dumps({"specs": [spec.model_dump(mode="json")], "whole": False})
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["problems"] == []
    assert not {"torch", "numpy", "transformers", "datasets", "pandas", "pyarrow"} & set(done.stderr.split())


def test_a_column_that_a_reward_needs_and_no_row_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def score(completions, level, hint=None): ...")
    rewards = [{"exact": "answer"}, {"format": "a"}, {"function": f"{tmp_path}/rewards.py:score"}]
    rows = [{"prompt": f"{n}?", "chosen": "yes", "answer": "7"} for n in range(300)]
    local = {"path": write(tmp_path / "a.jsonl", rows), "format": "prompt-chosen-rejected"}

    def missing(*sources: dict[str, Any]) -> list[tuple[str, str]]:
        spec = spec_of(*sources, stages=("sft",))
        return problems(spec.model_validate({**spec.model_dump(), "stages": {"sft": {}, "grpo": {"rewards": rewards}}}))

    lacks = "needs the column {}, and no row has it; further columns are {}"
    assert missing({"demo": 50}) == [
        ("stages.grpo.rewards.0", lacks.format("answer", "none")),
        ("stages.grpo.rewards.2", lacks.format("level", "none")),
    ]
    assert missing(local) == [("stages.grpo.rewards.2", lacks.format("level", "answer"))]
    write(tmp_path / "a.jsonl", [*rows, {**rows[0], "level": 3}])
    assert missing(local, {"demo": 50}) == []


@pytest.mark.parametrize(
    ("column", "hints", "unread"), [("answer", [], ["notes"]), ("anwser", ["did you mean answer?"], [])]
)
def test_a_column_of_a_reward_is_no_column_that_is_not_read(
    tmp_path: Path, column: str, hints: list[str], unread: list[str]
) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "yes", "answer": "7", "notes": "one two three four"} for n in range(9)]
    spec = spec_of({"path": write(tmp_path / "a.jsonl", rows), "format": "prompt-chosen-rejected"}, stages=("sft",))
    stages = {"sft": {}, "grpo": {"rewards": [{"exact": column}]}}
    seen = survey.look(spec.model_validate({**spec.model_dump(), "stages": stages}))
    assert [problem["hint"] for problem in seen.problems] == hints
    assert [note.split(" of ")[0].rpartition(" ")[2] for note in seen.notes if "is not read" in note] == unread
