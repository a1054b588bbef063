"""Generated problems: right, different from each other, and the same for the same seed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.estimate.sample_counts import expected_samples
from hpc_rlhf.spec.source import ARITHMETIC_PROBLEMS, SourceSpec
from hpc_rlhf.train import survey
from hpc_rlhf.train.data import arithmetic
from hpc_rlhf.train.data.sources import placed_rows, read
from tests.train.data.specs import spec_of

GYM = {"reasoning_gym": {"task": "chain_sum", "size": 20, "max_terms": 3}}


def test_exact_responses_are_right_in_every_step_and_the_others_are_estimates() -> None:
    rows = list(arithmetic.problems(ARITHMETIC_PROBLEMS, 1))
    assert len({row["prompt"] for row in rows}) == ARITHMETIC_PROBLEMS == 90**2
    exact = right = 0
    for row in rows:
        assert re.fullmatch(r"[1-9]\d\+[1-9]\d=\?", row["prompt"])
        truth = eval(row["prompt"].removesuffix("=?"))
        assert row["answer"] == str(truth)
        right += row["chosen"].split()[-1] == row["answer"]
        steps, _, result = row["chosen"].rpartition(": ")
        if not steps:
            estimate = int(row["chosen"].removeprefix("about "))
            assert estimate % 10 == 0
            assert abs(estimate - truth) <= 5
            continue
        exact += 1
        assert result == row["answer"]
        (ones, low), (tens, high) = (step.split("=") for step in steps.split(", "))
        assert (eval(ones), eval(tens), 10 * int(high) + int(low) % 10) == (int(low), int(high), truth)
    assert 0.32 < exact / len(rows) < 0.35
    assert right / len(rows) < 0.42, "what imitates the responses is mostly wrong"


def test_problems_depend_on_the_seed_alone() -> None:
    assert list(arithmetic.problems(50, 1)) == list(arithmetic.problems(50, 1))
    assert list(arithmetic.problems(50, 1)) != list(arithmetic.problems(50, 2))


def test_reasoning_gym_gives_prompts_with_what_its_scorer_needs() -> None:
    source = SourceSpec.model_validate(GYM)
    samples = list(read(source, 3))
    assert len(samples) == 20
    for sample in samples:
        question = sample.turns[0][1]
        assert str(eval(re.sub(r"[^0-9+\- ]", "", question.replace("\u2212", "-")))) == sample.further["answer"]
        entry = sample.further["reasoning_gym"]
        assert (entry["question"], entry["metadata"]["source_dataset"]) == (question, "chain_sum")
        assert (sample.chosen, sample.unanswered is not None) == ("", True)
    assert next(placed_rows(source, 3))[0] == "reasoning_gym chain_sum, row 0"
    assert [each.prompt for each in samples] == [each.prompt for each in read(source, 3)]
    assert next(read(source, 4)).prompt != samples[0].prompt


def test_problems_do_not_depend_on_how_a_process_hashes_text() -> None:
    source = {"task": "isomorphic_strings", "size": 10}
    shown = f"[row['prompt'] for row in problems({source}, 1)] + [hash('a')]"
    command = f"from hpc_rlhf.train.data.gym import problems; print({shown})"
    printed = [
        subprocess.run(
            [sys.executable, "-c", command], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout.rpartition(b",")
        for seed in ("1", "2")
    ]
    assert printed[0][0] == printed[1][0]
    assert printed[0][2] != printed[1][2]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"task": "chain_sums", "size": 20}, "reasoning_gym chain_sums: reasoning-gym has no such task"),
        ({"task": "chain_sum", "size": 20, "terms": 3}, "does not take these options: .* 'terms'"),
        ({"task": "chain_sum", "size": 20, "min_terms": 9, "max_terms": 3}, "does not take these options"),
        ({"task": "rearc", "size": 20}, "its scorer needs what JSON cannot hold"),
    ],
)
def test_check_names_a_wrong_task_or_option(options: dict[str, Any], what: str) -> None:
    (problem,) = survey.look(spec_of({"reasoning_gym": options}, {"demo": 30})).problems
    assert problem["path"] == "data.sources.0"
    assert re.search(what, problem["what"])


def test_check_names_a_missing_package(tmp_path: Path) -> None:
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError")
    spec = spec_of(GYM, {"demo": 30})
    asked = json.dumps({"specs": [spec.model_dump(mode="json")], "whole": False})
    command = [sys.executable, "-m", "hpc_rlhf.train.survey"]
    env = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, env=env, check=True)
    ((problem,),) = (one["problems"] for one in json.loads(done.stdout.splitlines()[-1]))
    assert problem["what"] == "reasoning_gym chain_sum: the package reasoning-gym is missing"


def test_stages_that_need_responses_refuse_problems_without() -> None:
    (problem,) = survey.look(spec_of(GYM, stages=("sft",))).problems
    assert problem["what"].startswith("none of the rows gives prompts with responses, which sft needs; all 20 were")
    assert survey.look(spec_of({"arithmetic": 60}, stages=("sft", "ppo"))).problems == []
    (problem,) = survey.look(spec_of({"arithmetic": 60}, stages=("reward",))).problems
    assert "pairs of responses" in problem["what"]


def test_generated_rows_are_counted_without_generating_them() -> None:
    spec = spec_of({"arithmetic": 600}, {"reasoning_gym": {"task": "chain_sum", "size": 400}}, stages=("sft",))
    assert expected_samples(spec, "sft") == 950


@pytest.mark.parametrize(
    "options", [{}, {"task": "ab"}, {"task": "ab", "size": 9}, {"task": "ab", "size": True}, {"task": 1, "size": 20}]
)
def test_a_task_needs_a_name_and_a_size(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs task, such as chain_sum, and size"):
        SourceSpec.model_validate({"reasoning_gym": options})


def test_one_origin_and_no_names_for_generated_columns() -> None:
    with pytest.raises(ValueError, match="exactly one of path, demo, arithmetic, reasoning_gym and feedback"):
        SourceSpec(demo=10, arithmetic=10)
    with pytest.raises(ValueError, match="only a source with a path"):
        SourceSpec(arithmetic=10, columns={"prompt": "x"})
