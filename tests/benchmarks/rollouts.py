"""Rollouts of a model sharded by ZeRO-3: by our engine, by vLLM, by DeepSpeed and by transformers' generate."""

from __future__ import annotations

import copy
import json
import os
from argparse import Namespace
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from hpc_rlhf.rank import exit_after
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import load_causal, sharded_loading
from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine
from hpc_rlhf.train.runtime.world import World, join, leave
from tests.benchmarks import workload
from tests.benchmarks.measure import Clock, Result, main
from tests.train.stages import make_run


@dataclass
class Sharded:
    """A model in a ZeRO-3 training engine, like PPO's actor, and this rank's prompts of each rollout."""

    world: World
    model: Any
    engine: Any
    tokenizer: Any
    prompts: list[list[list[int]]]

    @classmethod
    def load(cls, options: Namespace, ours: bool) -> Sharded:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        world = join(ranks)
        fields = workload.job(options.work, options.run / "run", "ppo", options.samples * ranks, 1, ranks)
        fields["stages"]["ppo"]["zero"] = 3
        spec = JobSpec.model_validate(fields)
        run = world.on_main(lambda: str(make_run(spec).ds_config("ppo")))
        with open(run) as file:
            config = json.load(file)
        assert spec.stages.ppo is not None
        source = str(options.work / "model")
        with sharded_loading(config):
            if ours:
                model = load_causal(source, workload.dtype())
            else:
                model = AutoModelForCausalLM.from_pretrained(source, dtype=workload.dtype())
        wrapped = LanguageModel(model) if ours else model
        engine = engines.training_engine(wrapped, copy.deepcopy(config), spec.stages.ppo, 1e-5, 100)
        engine.eval()
        rows = cycle(row["prompt_ids"] for row in workload.rows(options.work, "ppo"))
        share = slice(world.rank * options.samples, (world.rank + 1) * options.samples)
        prompts = [list(islice(rows, options.samples * ranks))[share] for _ in range(options.steps)]
        return cls(world, model, engine, AutoTokenizer.from_pretrained(source), prompts)

    def padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, padded on the left to the longest, int64."""
        width = max(map(len, prompts))
        ids = [[self.tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self.world.device), torch.tensor(mask, device=self.world.device)

    def request(self, prompts: list[list[int]], step: int) -> GenerationRequest:
        keys: list[tuple[object, ...]] = [(step, self.world.rank, row) for row in range(len(prompts))]
        eos = self.tokenizer.eos_token_id
        return GenerationRequest(prompts, workload.ANSWER, eos, keys=keys, max_batch=len(prompts))


def _timed(options: Namespace, sharded: Sharded, roll_out: Any, children: bool = False) -> Result:
    """Args: roll_out: takes prompts and the number of the rollout; returns the number of generated tokens."""
    clock, tokens = Clock(children), 0
    for step, prompts in enumerate(sharded.prompts):
        made = roll_out(prompts, step)
        sharded.world.barrier()
        clock.step()
        tokens += made * (step >= options.warm_up)
    length = tokens / (options.samples * (options.steps - options.warm_up))
    result = clock.result(
        options.warm_up,
        options.samples * (options.steps - options.warm_up),
        tokens,
        next(sharded.model.parameters()).dtype,
        answer_tokens=length,
    )
    leave()
    return result


def ours(options: Namespace) -> Result:
    sharded = Sharded.load(options, ours=True)
    rollouts = RolloutEngine(sharded.model, sharded.world)

    def roll_out(prompts: list[list[int]], step: int) -> int:
        return sum(rollouts.generate(sharded.request(prompts, step)).response_lengths)

    return _timed(options, sharded, roll_out)


def vllm(options: Namespace) -> Result:
    """Each rollout includes the sync of the weights, as in a stage."""
    sharded = Sharded.load(options, ours=True)
    longest = workload.PROMPT + workload.ANSWER
    rollouts = VllmEngine(
        sharded.model, sharded.world, RolloutSpec(engine="vllm"), options.run / "vllm", longest, "bench", "rollout",
        SlurmSpec(),
    )  # fmt: skip

    def roll_out(prompts: list[list[int]], step: int) -> int:
        rollouts.sync_weights(sharded.model)
        return sum(rollouts.generate(sharded.request(prompts, step)).response_lengths)

    result = _timed(options, sharded, roll_out, children=True)
    rollouts.close()
    return result


def hybrid_engine(options: Namespace) -> Result:
    from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
    from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout

    sharded = Sharded.load(options, ours=False)
    rollout = HybridEngineRollout(sharded.engine, sharded.tokenizer)

    def roll_out(prompts: list[list[int]], step: int) -> int:
        made = rollout.generate(
            RolloutRequest(*sharded.padded(prompts)), SamplingConfig(workload.ANSWER, temperature=1.0)
        )
        start = int(made.response_start_idx[0])
        return int(made.attention_mask[:, start:].sum())

    return _timed(options, sharded, roll_out)


def generate(options: Namespace) -> Result:
    sharded = Sharded.load(options, ours=False)

    def roll_out(prompts: list[list[int]], step: int) -> int:
        ids, mask = sharded.padded(prompts)
        with torch.no_grad():
            made = sharded.model.generate(
                ids, attention_mask=mask, max_new_tokens=workload.ANSWER, do_sample=True, top_k=0, top_p=1.0,
                pad_token_id=sharded.tokenizer.pad_token_id, synced_gpus=True,
            )  # fmt: skip
        return int((made[:, ids.shape[1] :] != sharded.tokenizer.pad_token_id).sum())

    return _timed(options, sharded, roll_out)


if __name__ == "__main__":
    exit_after(lambda: main({"ours": ours, "vllm": vllm, "hybrid-engine": hybrid_engine, "generate": generate}))
