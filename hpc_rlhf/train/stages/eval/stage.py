"""Evaluation: the models of a run side by side, on data that none of them was trained on.

Every model answers the same held-out prompts, sampled with the same random numbers. The reward model's scores
and the KL divergence from the model that PPO, GRPO and DPO started from show what training achieved.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch

from hpc_rlhf.spec.stages import BASE, POLICIES, Data, EvalSpec, kind_of
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import agreement
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import check_fits, has_score_head, load_causal, load_reward, loading
from hpc_rlhf.train.rewards.blend import Blend
from hpc_rlhf.train.rewards.build import build_rewards, text_rewards
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rollout.backend import Rollout, RolloutBackend
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine
from hpc_rlhf.train.stages.common import commit, new_artifact, reward_model
from hpc_rlhf.train.stages.eval.accuracy import accuracy_metrics, verdicts
from hpc_rlhf.train.stages.eval.questions import Questions, held_out
from hpc_rlhf.train.stages.eval.report import Measured, Results, lines, make_report, texts
from hpc_rlhf.train.stages.rollout import vllm_engine

RESULTS = "found.json"


class Evaluation:
    """One attempt at the evaluation.

    Attributes:
        sources: where each model loads from. The last one is ``base``, which the others are compared with.
        reward: where the reward model loads from, if there is one.
        results: of the steps so far.
    """

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.stage_spec, EvalSpec)
        self.context = context
        self.spec = context.stage_spec
        self.trained = context.spec.trained
        self.held = held_out(context, self.spec.prompts)
        self.base = BASE.name if BASE.name in self.trained else "start"
        self.compares_pairs = any(_learns_from_pairs(name) for name in self.trained)
        self.sources = self._sources()
        self.reward = reward_model(context)
        if context.spec.judge is None and self.reward is not None and not has_score_head(self.reward):
            self.reward = None  # no stage has used it, so it may be a language model
        self.rewards = context.spec.evaluated_rewards
        self.text_rewards = text_rewards(context, self.rewards)
        self.questions = Questions(context, self.spec)
        self.results = Results()
        self._vllm: VllmEngine | None = None

    def _sources(self) -> dict[str, str]:
        run = self.context.run
        policies = {model: stage for model, stage in self.context.spec.policies.items() if model != BASE.name}
        sources = {model: str(run.stage(stage).model) for model, stage in policies.items() if model == stage}
        sources |= {model: str(run.stage(stage).ema_model) for model, stage in policies.items() if model != stage}
        if sources or BASE.name in self.trained:
            pretrained = next((name for name in self.trained if kind_of(name).makes == "base model"), None)
            actor = self.context.spec.models.actor
            sources["start"] = str(run.stage(pretrained).model) if pretrained else self.context.start_model(actor)
        if BASE.name in self.trained:
            sources[BASE.name] = str(run.stage(BASE.name).model)
        return sources

    # Checkpoints

    def save(self, snapshot: Snapshot) -> None:
        if self.context.world.is_main:
            snapshot.data(RESULTS, json.dumps(asdict(self.results)).encode())

    def load(self, checkpoint: Checkpoint) -> None:
        self.results = Results.read(json.loads((checkpoint.folder / RESULTS).read_text()))

    # The steps

    def steps(self) -> list[Callable[[], dict[str, float | None]]]:
        """A step for each model, then for each model that of the rewards, then the reward model's. Each returns metrics
        to log. All are collective."""
        steps: list[Callable[[], dict[str, float | None]]] = [
            partial(self.measure, name, source) for name, source in self.sources.items()
        ]
        if self.rewards and len(self.held.prompts):
            steps += [partial(self.verify, name, len(steps) + place) for place, name in enumerate(self.sources)]
        return [*steps, self.judge] if self.reward is not None else steps

    def measure(self, name: str, source: str) -> dict[str, float | None]:
        """All measurements that need this model."""
        context, ask, measured = self.context, self.questions, Measured()
        with loading(context.stop, context.ds_config):
            model = load_causal(source, context.dtype)
        check_fits(model.config, context.tokenizer, context.longest, source)
        engine = engines.frozen_engine(LanguageModel(model), context.ds_config, context.world.device)
        agreement.verify(engine, context.world, source)
        texts, prompts = self.held.texts, self.held.prompts.prompts
        if len(texts):
            loss = -math.fsum(ask.likelihoods(engine, texts)) / sum(texts.response_lengths)
            measured.perplexity = math.exp(min(loss, 50.0))
        if self.compares_pairs and (name == self.base or _learns_from_pairs(name)):
            chosen, rejected = (ask.likelihoods(engine, part) for part in self.held.pairs)
            measured.preferences = [c - r for c, r in zip(chosen, rejected, strict=True)]
        responses = ask.responses(self._backend(model), prompts)
        if self._vllm is not None:
            self._vllm.release()
        measured.answers, measured.further = [each[0] for each in responses], [each[1:] for each in responses]
        measured.log_probs = self._log_probs(engine, measured)
        for other in self.results.models.values() if name == self.base else ():
            other.base_log_probs = self._log_probs(engine, other)
        self.results.models[name] = measured
        return {f"{name}_perplexity": measured.perplexity}

    def _backend(self, model: Any) -> RolloutBackend:
        """What generates a model's responses. Collective."""
        if self.spec.rollout.engine == "in_process":
            return RolloutEngine(model, self.context.world)
        with self.context.stop.cancellable():
            self._vllm = self._vllm or vllm_engine(self.context, self.spec.rollout, model)
            self._vllm.sync_weights(model)
        return self._vllm

    def _log_probs(self, engine: Any, measured: Measured) -> list[list[float]]:
        """Log-probabilities of the tokens of a model's responses, at the temperature that they were drawn at."""
        answered = Rollout.of(self.held.prompts.prompts, measured.answers)
        rows = self.questions.log_probs(engine, answered, self.spec.temperature or 1.0)
        return [[round(number, 6) for number in row] for row in rows]

    @cached_property
    def blend(self) -> Blend:
        """The rewards. Collective."""
        return build_rewards(self.context, self.rewards, self.text_rewards)

    def verify(self, name: str, step: int) -> dict[str, float | None]:
        """What the rewards say about all responses of a model.

        Args:
            step: steps done.
        """
        measured, samples = self.results.models[name], self.spec.samples
        responses = measured.responses
        prompts = [prompt for prompt in self.held.prompts.prompts for _ in range(samples)]
        columns = {key: [cell for cell in cells for _ in range(samples)] for key, cells in self.held.columns.items()}
        self.blend.begin(step, name)
        scores = self.questions.details(self.blend, Rollout.of(prompts, responses), columns)
        measured.verdicts = verdicts(self.rewards, scores, texts(responses, self.context.tokenizer))
        accuracy = accuracy_metrics(measured.verdicts, samples).get("accuracy")
        return {f"{name}_accuracy": accuracy.estimate if accuracy else None}

    def judge(self) -> dict[str, float | None]:
        """All measurements that need the reward model."""
        context, results, source = self.context, self.results, self.reward
        assert source is not None
        with loading(context.stop, context.ds_config):
            model = load_reward(source, context.dtype, None)
        check_fits(model.classifier.config, context.tokenizer, context.longest, source)
        engine = engines.frozen_engine(model, context.ds_config, context.world.device)
        agreement.verify(engine, context.world, source)
        ask = self.questions
        rewards = ModelReward(engine, context.world, ask.budget, partial(context.stop.check, "evaluation"))
        results.chosen, results.rejected = (ask.scores(rewards, part) for part in self.held.pairs)
        if self.held.has_references:
            results.references = ask.scores(rewards, self.held.prompts)
        for measured in results.models.values():
            measured.rewards = ask.scores(rewards, Rollout.of(self.held.prompts.prompts, measured.answers))
        accuracy = results.accuracy()
        return {"reward_accuracy": None if accuracy is None else accuracy["value"]}

    # The artifact

    def hand_over(self, total: int) -> None:
        """Write the report, and the responses for people to read. Collective."""
        context, files = self.context, self.context.files
        folder = new_artifact(context)
        report = make_report(self.results, self.held, self.base, self.spec, context.tokenizer, self.rewards)
        if context.world.is_main:
            folder.mkdir(parents=True)
            (folder / files.report.name).write_text(json.dumps(report, indent=1) + "\n")
            with (folder / files.answers.name).open("w", encoding="utf-8") as file:
                for line in lines(self.results, self.held, self.base, context.tokenizer):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        models = {name: report["models"][name] for name in self.sources}
        rates = {
            plural: {name: one[key]["value"] for name, one in models.items() if key in one}
            for key, plural in (("win_rate", "win_rates"), ("accuracy", "accuracies"))
        }
        commit(context, folder, total, {"prompts": report["prompts"], "base": self.base, **rates})


def _learns_from_pairs(model: str) -> bool:
    """Whether it is a policy that a stage trains on pairs."""
    return model in POLICIES and POLICIES[model].data is Data.PAIRS


def run(context: StageContext) -> None:
    # 1. Held-out data, and the results of an earlier attempt.
    evaluation = Evaluation(context)
    steps = evaluation.steps()
    checkpoint = context.resume(evaluation.load)
    first = checkpoint.step if checkpoint else 0

    # 2. The models one after the other, so that only one is in memory; their responses are scored at the end.
    for number in range(first, len(steps)):
        context.checkpoints.safe_point(number, evaluation.save, {})
        context.metrics.log(number + 1, len(steps), "eval", steps[number]())
        gc.collect()
        if context.world.device.type == "cuda":
            torch.cuda.empty_cache()
    context.checkpoints.safe_point(len(steps), evaluation.save, {})

    # 3. The report.
    evaluation.hand_over(len(steps))
