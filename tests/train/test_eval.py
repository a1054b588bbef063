"""The evaluation: its numbers match a direct calculation, on any number of ranks, stopped or not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.stages import EvalSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.tokenized import StageData, prepare
from hpc_rlhf.train.metrics import MetricsLog
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.eval import questions
from hpc_rlhf.train.stages.eval import stage as evaluation
from hpc_rlhf.train.stages.eval.questions import HeldOut, held_out
from hpc_rlhf.train.stages.eval.report import Measured, Results, make_report
from tests.train import tiny
from tests.train.finished import as_if_trained
from tests.train.stages import log_tail, make_run, run_stage, tiny_spec

pytestmark = pytest.mark.train
PROMPTS = 12


def spec_of(folder: Path, ranks: int = 1, **fields: Any) -> JobSpec:
    spec = tiny_spec(folder, ranks, sft={}, reward={}, ppo={"ema": True})
    raw = spec.model_dump(mode="json")
    raw["stages"]["eval"] = {"prompts": PROMPTS, **fields}
    raw["stages"]["eval"]["slurm"] = {"gpus_per_node": 0, "ranks_per_node": ranks}
    return JobSpec.model_validate(raw)


def evaluate(run: RunDir, spec: JobSpec, world: World, attempt: str = "a", stop: StopFlag | None = None) -> None:
    context = StageContext(spec, "eval", run, world, stop or StopFlag(), attempt)
    context.checkpoints.store.claim()
    evaluation.run(context)
    context.checkpoints.commit()


def report_of(run: RunDir) -> dict[str, Any]:
    manifest.require(run.stage("eval").model, "the report")
    report: dict[str, Any] = json.loads(run.stage("eval").report.read_text())
    return report


def results_of(run: RunDir) -> Results:
    """The measurements in the last checkpoint."""
    last = max(run.stage("eval").checkpoints.glob("step-*"))
    return Results.read(json.loads((last / evaluation.RESULTS).read_text()))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[RunDir, JobSpec]:
    torch.set_num_threads(1)
    spec = spec_of(tmp_path_factory.mktemp("eval") / "run")
    run = make_run(spec)
    as_if_trained(run, spec)
    evaluate(run, spec, world)
    return run, spec


def again(done: tuple[RunDir, JobSpec], folder: Path, **fields: Any) -> tuple[RunDir, JobSpec]:
    """The same trained models in another run directory, not evaluated."""
    spec = spec_of(folder / "run", **fields)
    run = make_run(spec)
    for stage in ("sft", "reward", "ppo"):
        shutil.copytree(done[0].stage(stage).path, run.stage(stage).path, dirs_exist_ok=True)
    return run, spec


@torch.no_grad()
def plain_log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of one response's tokens, from all logits of one sequence."""
    ids = torch.tensor([prompt + answer])
    log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
    return log_probs.gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)[-len(answer) :]


def test_the_report_matches_a_direct_calculation(done: tuple[RunDir, JobSpec], world: World) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    run, spec = done
    report, results = report_of(run), results_of(run)
    context = StageContext(spec, "eval", run, world, StopFlag(), "look")
    held = held_out(context, PROMPTS)
    prompts = held.prompts.prompts
    assert report["prompts"] == len(prompts) == PROMPTS
    sft = AutoModelForCausalLM.from_pretrained(run.stage("sft").model)
    ppo = AutoModelForCausalLM.from_pretrained(run.stage("ppo").model)
    judge = AutoModelForSequenceClassification.from_pretrained(run.stage("reward").model)

    rows = prepare(spec, "sft", context.tokenizer, run.stage("sft").data, world).held_out
    for name, model in (("sft", sft), ("ppo", ppo)):
        log_probs = [plain_log_probs(model, row["prompt_ids"], row["chosen_ids"]) for row in rows]
        loss = -sum(part.sum().item() for part in log_probs) / sum(map(len, log_probs))
        assert report["models"][name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)

    answers = results.models["ppo"].answers
    kls = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ratio = plain_log_probs(sft, prompt, answer) - plain_log_probs(ppo, prompt, answer)
        kls.append((ratio.exp() - 1 - ratio).sum().item())
    assert report["models"]["ppo"]["kl"]["value"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)

    @torch.no_grad()
    def judged(answers: list[list[int]]) -> list[float]:
        pairs = zip(prompts, answers, strict=True)
        return [judge(input_ids=torch.tensor([p + a])).logits.item() for p, a in pairs]

    ours, theirs = judged(answers), judged(results.models["sft"].answers)
    won = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)) / PROMPTS
    assert report["models"]["ppo"]["reward"]["value"] == pytest.approx(sum(ours) / PROMPTS, rel=1e-4)
    gain = (sum(ours) - sum(theirs)) / PROMPTS
    assert report["models"]["ppo"]["reward_gain"]["value"] == pytest.approx(gain, abs=1e-4)
    assert report["models"]["ppo"]["win_rate"]["value"] == pytest.approx(won, abs=1e-6)
    assert results.references == pytest.approx(judged(held.prompts.responses), rel=1e-4)


def test_a_model_against_itself_is_a_draw(done: tuple[RunDir, JobSpec]) -> None:
    """The same model samples the same responses, with the same random numbers."""
    same = report_of(done[0])["models"]["ema"]
    assert (same["win_rate"]["value"], same["reward_gain"]["value"], same["kl"]["value"]) == (0.5, 0.0, 0.0)
    assert same["win_rate"]["low"] < 0.5 < same["win_rate"]["high"]


def test_responses_are_written_as_text(done: tuple[RunDir, JobSpec]) -> None:
    rows = [json.loads(line) for line in done[0].stage("eval").answers.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == PROMPTS
    assert all(list(row["answers"]) == ["start", "sft", "ppo", "ema", "reference"] for row in rows)
    assert all(set(row["rewards"]) == set(row["answers"]) for row in rows)


def test_two_sharded_ranks_get_the_same_results(done: tuple[RunDir, JobSpec], tmp_path: Path) -> None:
    run, _ = again(done, tmp_path, ranks=2, zero=3, offload_params=True, micro_batch=1)
    assert run_stage(run, "eval", 2) == [0, 0], log_tail(run, "eval")
    ours, theirs = results_of(run), results_of(done[0])
    assert {name: one.answers for name, one in ours.models.items()} == {
        name: one.answers for name, one in theirs.models.items()
    }
    for field in ("references", "chosen", "rejected"):
        assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-4, abs=1e-5)
    report, whole = report_of(run)["models"]["ppo"], report_of(done[0])["models"]["ppo"]
    for field in ("kl", "reward", "reward_gain", "win_rate"):
        assert report[field] == pytest.approx(whole[field], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("where", ["after a model", "between two tokens"])
def test_a_stopped_evaluation_resumes_with_the_next_model(
    done: tuple[RunDir, JobSpec], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run, spec = again(done, tmp_path)
    stop, measured = StopFlag(), []
    log, generate, measure = MetricsLog.log, RolloutEngine.generate, evaluation.Evaluation.measure

    def log_and_stop(self: MetricsLog, *args: Any) -> None:
        log(self, *args)
        stop.received = 2 if where == "after a model" else 0

    def generate_and_stop(self: RolloutEngine, *args: Any) -> Rollout:
        stop.received = 2 if len(measured) == 2 and where == "between two tokens" else stop.received
        return generate(self, *args)

    def count(self: evaluation.Evaluation, name: str, source: str) -> dict[str, float | None]:
        measured.append(name)
        return measure(self, name, source)

    monkeypatch.setattr(MetricsLog, "log", log_and_stop)
    monkeypatch.setattr(RolloutEngine, "generate", generate_and_stop)
    monkeypatch.setattr(evaluation.Evaluation, "measure", count)
    with pytest.raises(StageStopped) as stopped:
        evaluate(run, spec, world, "first", stop)
    assert stopped.value.step == 1
    stop.received = 0
    monkeypatch.setattr(MetricsLog, "log", log)
    monkeypatch.setattr(RolloutEngine, "generate", generate)
    evaluate(run, spec, world, "second", stop)
    repeated = ["ema"] if where == "between two tokens" else []
    assert measured == ["ppo", *repeated, "ema", "start", "sft"]
    assert report_of(run) == report_of(done[0])


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}], ids=lambda one: next(iter(one))
)
def test_responses_that_are_no_samples_of_the_whole_distribution_give_no_kl(
    done: tuple[RunDir, JobSpec], world: World, tmp_path: Path, sampling: dict[str, float]
) -> None:
    run, spec = again(done, tmp_path, prompts=2, **sampling)
    evaluate(run, spec, world)
    assert "kl" not in report_of(run)["models"]["ppo"]


@pytest.mark.parametrize(
    ("stages", "models"),
    [
        (("sft",), ["start", "sft", "reference"]),
        (("reward",), []),
        (("reward", "ppo"), ["start", "ppo", "reference"]),
        (("sft", "dpo"), ["start", "sft", "dpo", "reference"]),
    ],
)
def test_only_trained_models_are_evaluated(
    world: World, tmp_path: Path, stages: tuple[str, ...], models: list[str]
) -> None:
    raw = tiny_spec(tmp_path, 1, **{stage: {} for stage in stages}).model_dump(mode="json")
    raw["stages"]["eval"] = {"prompts": 4}
    spec = JobSpec.model_validate(raw)
    run = make_run(spec)
    as_if_trained(run, spec)
    evaluate(run, spec, world)
    report = report_of(run)
    assert list(report["models"]) == models
    assert (report["reward_accuracy"] is not None) == ("reward" in stages)
    assert all(("reward" in one) == ("reward" in stages) for one in report["models"].values())
    assert [name for name, one in report["models"].items() if "pair_accuracy" in one] == (
        ["dpo"] if "dpo" in stages else []
    )
    against = {name for name, one in report["models"].items() if "win_rate" in one}
    assert against == (set(models) - {"start"} if "reward" in stages else set())


def test_each_prompt_is_asked_once_and_plain_text_never(
    done: tuple[RunDir, JobSpec], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}

    rows = [row(prompt) for prompt in ("a", "b", "", "a", "b", "c", "")]
    monkeypatch.setattr(questions, "prepare", lambda *_: StageData(rows, rows))
    context = StageContext(done[1], "eval", done[0], world, StopFlag(), "look")
    assert sorted(held_out(context, 100).questions) == ["a", "b", "c"]
    few = held_out(context, 2)
    assert len(few.questions) == len(few.prompts) == 2
    assert len(few.texts) == len(few.pairs[0]) == len(rows)


def test_pair_accuracy_counts_pairs_where_dpo_moved_towards_the_chosen() -> None:
    """Three pairs: it moved towards the chosen response, away from it, and not at all, which counts half."""
    held = HeldOut([], Rollout.of([], []), Rollout.of([], []), (Rollout.of([], []), Rollout.of([], [])))
    results = Results({"dpo": Measured(preferences=[1.0, -2.0, 0.5]), "sft": Measured(preferences=[0.5, -1.0, 0.5])})
    report = make_report(results, held, "sft", EvalSpec(), tiny.tokenizer())
    assert report["models"]["dpo"]["pair_accuracy"]["value"] == 0.5


def test_nothing_held_out_is_an_error(done: tuple[RunDir, JobSpec], world: World) -> None:
    run, spec = done
    none = spec.model_copy(update={"data": spec.data.model_copy(update={"held_out": 0.0})})
    with pytest.raises(HpcRlhfError, match="no samples are held out"):
        held_out(StageContext(none, "eval", run, world, StopFlag(), "none"), PROMPTS)
