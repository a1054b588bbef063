"""The accuracy of an evaluation: brute force over its written responses gives the same, stopped or not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from hpc_rlhf import intervals
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.rewards import RewardItem
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.metrics import MetricsLog
from hpc_rlhf.train.rewards.blend import Scores
from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.eval import stage as evaluation
from hpc_rlhf.train.stages.eval.accuracy import Verdicts, accuracy_metrics, verdicts
from tests.train.finished import as_if_trained
from tests.train.stages import make_run, tiny_spec

PROMPTS, SAMPLES = 10, 4
LETTER = "([a-e])"
REWARDS = [{"exact": "answer", "format": LETTER}, {"format": ".*t.*", "weight": 0.1, "name": "has_t"}]


def spec_of(folder: Path) -> JobSpec:
    """A run whose prompts, of two sources, ask for a letter."""
    raw = tiny_spec(folder / "run", 1, sft={}, dpo={}).model_dump(mode="json")
    rewarded = {"rewards": REWARDS, "group_size": 2, "micro_batch": 4, "global_batch": 16, "precision": "fp32"}
    raw["stages"] = {"sft": raw["stages"]["sft"], "grpo": {**rewarded, "max_steps": 1}}
    raw["stages"]["eval"] = {"prompts": PROMPTS, "samples": SAMPLES, "temperature": 1.5}
    sources = []
    for name, letters in (("one", "ab"), ("two", "cde")):
        file = folder / f"{name}.jsonl"
        rows = [
            {"prompt": f"{name} {n}: which letter?", "chosen": f"It is {letters[n % len(letters)]}.",
             "answer": letters[n % len(letters)]} for n in range(60)
        ]  # fmt: skip
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"path": str(file), "format": "prompt-chosen-rejected"})
    raw["data"] |= {"sources": sources, "held_out": 0.3}
    return JobSpec.model_validate(raw)


def evaluate(run: RunDir, spec: JobSpec, world: World, attempt: str, stop: StopFlag | None = None) -> None:
    context = StageContext(spec, "eval", run, world, stop or StopFlag(), attempt)
    context.checkpoints.store.claim()
    evaluation.run(context)
    context.checkpoints.commit()


def report_of(run: RunDir) -> dict[str, Any]:
    manifest.require(run.stage("eval").model, "the report")
    report: dict[str, Any] = json.loads(run.stage("eval").report.read_text())
    return report


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[RunDir, JobSpec]:
    torch.set_num_threads(1)
    spec = spec_of(tmp_path_factory.mktemp("accuracy"))
    run = make_run(spec)
    as_if_trained(run, spec)
    evaluate(run, spec, world, "a")
    return run, spec


def letters(run: RunDir, model: str) -> dict[str, list[str | None]]:
    """The last letter in each response of a model, by prompt."""
    rows = [json.loads(line) for line in run.stage("eval").answers.read_text().splitlines()]
    texts = {row["prompt"]: [row["answers"][model], *row["further"][model]] for row in rows}
    return {prompt: [(re.findall(LETTER, one) or [None])[-1] for one in some] for prompt, some in texts.items()}


def right_letter(prompt: str) -> str:
    name, number = re.findall(r"(\w+) (\d+):", prompt)[0]
    known = {"one": "ab", "two": "cde"}[name]
    return known[int(number) % len(known)]


def share_of(given: list[str | None], right: str) -> float:
    """Whether the most frequent letter is right; a tie counts in part."""
    votes = Counter(letter for letter in given if letter is not None)
    most = [letter for letter, count in votes.items() if count == max(votes.values())]
    return (right in most) / max(1, len(most))


@pytest.mark.train
def test_accuracy_is_that_of_the_written_responses(done: tuple[RunDir, JobSpec]) -> None:
    run, _ = done
    report = report_of(run)
    assert (report["samples"], report["judged_by"]) == (SAMPLES, ["exact"])
    assert set(report["models"]) == {"start", "sft", "grpo", "reference"}
    ways: dict[str, tuple[int, Callable[[list[str | None], str], float]]] = {
        "accuracy": (1, lambda given, right: right in given),
        "pass@2": (2, lambda given, right: right in given),
        "pass@4": (4, lambda given, right: right in given),
        "majority@2": (2, share_of),
        "majority@4": (4, share_of),
    }
    for model in ("start", "sft", "grpo"):
        by_prompt = letters(run, model)
        assert len(by_prompt) == PROMPTS
        for name, (k, passes) in ways.items():
            shares = {
                prompt: fmean(passes(list(some), right_letter(prompt)) for some in combinations(given, k))
                for prompt, given in by_prompt.items()
            }
            number = report["models"][model][name]
            assert number["value"] == pytest.approx(fmean(shares.values()), abs=1e-6)
            expected = intervals.share(sum(shares.values()), PROMPTS)
            assert (number["low"], number["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)
            for source, one in report["models"][model]["sources"].items():
                own = [share for prompt, share in shares.items() if f"{Path(source).stem} " in prompt]
                assert one[name]["value"] == pytest.approx(fmean(own), abs=1e-6)
    values = [report["models"][model]["accuracy"]["value"] for model in ("sft", "grpo")]
    assert 0 < values[0] < 1, "a model that is never right proves nothing"
    assert report["models"]["grpo"]["accuracy_gain"]["value"] == pytest.approx(values[1] - values[0], abs=1e-6)
    assert 0 < report["models"]["sft"]["reward/has_t"]["value"] < 1
    facts = manifest.read(run.stage("eval").model)
    assert facts is not None
    assert facts["metrics"]["accuracies"]["grpo"] == values[1]


@pytest.mark.train
def test_a_stopped_evaluation_judges_no_model_twice(
    done: tuple[RunDir, JobSpec], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, spec = done
    before, stop, judged = report_of(run), StopFlag(), []
    log, verify = MetricsLog.log, evaluation.Evaluation.verify

    def log_and_stop(self: MetricsLog, step: int, *args: Any) -> None:
        log(self, step, *args)
        stop.received = 2 if step == 4 else 0

    def count(self: evaluation.Evaluation, name: str, step: int) -> dict[str, float | None]:
        judged.append(name)
        return verify(self, name, step)

    for path in (run.stage("eval").model, run.stage("eval").checkpoints, run.stage("eval").metrics):
        path.rename(tmp_path / path.name)
    monkeypatch.setattr(MetricsLog, "log", log_and_stop)
    monkeypatch.setattr(evaluation.Evaluation, "verify", count)
    with pytest.raises(StageStopped) as stopped:
        evaluate(run, spec, world, "b", stop)
    assert stopped.value.step == 4
    monkeypatch.setattr(MetricsLog, "log", log)
    evaluate(run, spec, world, "c")
    assert judged == ["grpo", "start", "sft"]
    assert report_of(run) == before


def item(**fields: Any) -> RewardItem:
    return RewardItem.model_validate(fields)


def test_a_response_is_right_if_all_rewards_that_judge_its_answer_say_so() -> None:
    rewards = [item(math="a"), item(exact="b"), item(format=".*")]
    parts: dict[str, list[float | None]] = {
        "math": [1.0, 0.0, None, None, 1.0, 1.0],
        "exact": [1.0, 1.0, 1.0, None, 0.5, None],
        "format": [0.0] * 6,
    }
    scores = Scores([None] * 6, parts, [False] * 5 + [True])
    texts = [r"so \boxed{\frac{1}{2}}", "3 or 4", "x", "", "1 or 1,200.5", ""]
    result = verdicts(rewards, scores, texts)
    assert result.right == [True, False, True, None, False, None]
    assert result.answers == [r"\frac{1}{2}", "4", "x", None, "1,200.5", None]
    assert not verdicts([item(function="f.py:f")], Scores([1.0], {"function": [1.0]}, [False]), ["4"]).answers
    assert verdicts([item(function="f.py:f")], Scores([0.9], {"function": [0.9]}, [False]), ["4"]).right == [False]
    assert verdicts([item(model="some/model")], Scores([2.0], {"model": [2.0]}, [False]), ["4"]).right == [None]


def test_prompts_with_too_few_judged_responses_are_left_out() -> None:
    right = [True, False, None, None, True, None]  # three prompts
    metrics = accuracy_metrics(Verdicts(right=right, answers=["4"] * 6), 2)
    assert metrics["accuracy"] == intervals.share(1.5, 2)
    assert metrics["pass@2"] == intervals.share(1, 1)
    assert set(metrics) == {"accuracy", "pass@2", "majority@2"}
