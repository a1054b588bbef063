"""Evaluation: the models of a run side by side, on data that none of them was trained on.

Every model answers the same held-out prompts, drawn with the same random numbers. What the reward model gives
for an answer, and how far the model went from where PPO and DPO started, tell what was achieved.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from hpc_rlhf.spec.stages import EvalSpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.interruptible_loading import loading
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import check_fits, load_causal, load_reward
from hpc_rlhf.train.rollout.experience import Rollout
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.stages.common import commit, new_artifact
from hpc_rlhf.train.stages.eval.data import held_out
from hpc_rlhf.train.stages.eval.questions import Questions
from hpc_rlhf.train.stages.eval.report import Found, Measured, lines, make_report

FOUND = "found.json"


class Evaluation:
    """One attempt at the evaluation.

    Attributes:
        sources: where each model loads from. The one that the others are held against, ``base``, is the last.
        found: what the steps done have found.
    """

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.stage_spec, EvalSpec)
        self.context = context
        self.spec = context.stage_spec
        self.trained = context.spec.trained
        self.held = held_out(context, self.spec.prompts)
        self.base = "sft" if "sft" in self.trained else "start"
        self.sources = self._sources()
        self.questions = Questions(context, self.spec)
        self.found = Found()

    def _sources(self) -> dict[str, str]:
        run, ppo = self.context.run, self.context.spec.stages.ppo
        tuned = [name for name in ("ppo", "dpo") if name in self.trained]
        sources: dict[str, str] = {name: str(run.stage(name).model) for name in tuned}
        if ppo is not None and ppo.ema:
            sources["ema"] = str(run.stage("ppo").ema_model)
        if sources or "sft" in self.trained:
            sources["start"] = self.context.start_model(self.context.spec.models.actor)
        if "sft" in self.trained:
            sources["sft"] = str(run.stage("sft").model)
        return sources

    # What is kept where the evaluation stops

    def take(self, snapshot: Snapshot) -> None:
        if self.context.world.is_main:
            snapshot.data(FOUND, json.dumps(asdict(self.found)).encode())

    def load(self, found: Checkpoint) -> None:
        self.found = Found.read(json.loads((found.folder / FOUND).read_text()))

    # The steps

    def steps(self) -> list[Callable[[], dict[str, float | None]]]:
        """A model at a time, and the judge last. Each gives its telling numbers. All are collective."""
        steps: list[Callable[[], dict[str, float | None]]] = [
            partial(self.measure, name, source) for name, source in self.sources.items()
        ]
        return [*steps, self.judge] if "reward" in self.trained else steps

    def measure(self, name: str, source: str) -> dict[str, float | None]:
        """Everything that one model is needed for."""
        context, ask, mine = self.context, self.questions, Measured()
        with loading(context.stop, context.ds_config):
            model = load_causal(source, context.dtype)
        check_fits(model.config, context.tokenizer, context.longest, source)
        engine = engines.frozen_engine(LanguageModel(model), context.ds_config, context.world.device)
        told, prompts = self.held.told, self.held.asked.prompts
        if len(told):
            loss = -math.fsum(ask.likelihoods(engine, told)) / sum(map(len, told.answers))
            mine.perplexity = math.exp(min(50.0, loss))
        if name in ("dpo", self.base) and "dpo" in self.trained:
            chosen, rejected = (ask.likelihoods(engine, part) for part in self.held.pairs)
            mine.preferences = [c - r for c, r in zip(chosen, rejected, strict=True)]
        mine.answers = ask.answers(RolloutEngine(model, context.world), prompts)
        mine.log_probs = ask.log_probs(engine, Rollout(prompts, mine.answers))
        for other in self.found.models.values() if name == self.base else ():
            other.base_log_probs = ask.log_probs(engine, Rollout(prompts, other.answers))
        self.found.models[name] = mine
        return {"perplexity": mine.perplexity}

    def judge(self) -> dict[str, float | None]:
        """Everything that the reward model is needed for."""
        context, found, source = self.context, self.found, str(self.context.run.stage("reward").model)
        with loading(context.stop, context.ds_config):
            model = load_reward(source, context.dtype, None)
        check_fits(model.classifier.config, context.tokenizer, context.longest, source)
        engine = engines.frozen_engine(model, context.ds_config, context.world.device)
        ask, asked = self.questions, self.held.asked
        found.chosen, found.rejected = (ask.scores(engine, part) for part in self.held.pairs)
        found.references = ask.scores(engine, asked)
        for one in found.models.values():
            one.rewards = ask.scores(engine, Rollout(asked.prompts, one.answers))
        accuracy = found.accuracy()
        return {"accuracy": None if accuracy is None else accuracy["value"]}

    # The artifact

    def hand_over(self, total: int) -> None:
        """Write the report, and the answers for people to read. Collective."""
        context, files = self.context, self.context.files
        partial = new_artifact(context)
        report = make_report(self.found, self.held, self.base, self.spec, context.tokenizer)
        if context.world.is_main:
            partial.mkdir(parents=True)
            (partial / files.report.name).write_text(json.dumps(report, indent=1) + "\n")
            with (partial / files.answers.name).open("w", encoding="utf-8") as file:
                for line in lines(self.found, self.held, self.base, context.tokenizer):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        models = {name: report["models"][name] for name in self.sources}
        won = {name: one["win_rate"]["value"] for name, one in models.items() if "win_rate" in one}
        commit(context, partial, total, {"prompts": report["prompts"], "base": self.base, "win_rates": won})


def run(context: StageContext) -> None:
    # 1. Held-out data, and what an earlier attempt found.
    work = Evaluation(context)
    steps = work.steps()
    found = context.resume(work.load)
    first = found.step if found else 0

    # 2. The models one after the other, so that only one is in memory; what they said is judged at the end.
    for number in range(first, len(steps)):
        context.checkpoints.safe_point(number, work.take, {})
        context.metrics.log(number + 1, len(steps), "eval", steps[number]())
        gc.collect()
        if context.world.device.type == "cuda":
            torch.cuda.empty_cache()
    context.checkpoints.safe_point(len(steps), work.take, {})

    # 3. The report.
    work.hand_over(len(steps))
