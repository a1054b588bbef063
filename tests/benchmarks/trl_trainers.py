"""TRL's trainers, without their slow defaults: activation checkpointing, autocast, logging.

SFT, the reward model and GRPO by the newest TRL, PPO by 1.12, the last release seen that has it (``make bench``
puts it into a folder of its own). AdamW is fused. SFT packs by best fit, which keeps attention inside each sample, one
row of 512 in a pass: its mask of a pass is as large as all its rows squared.

Weights and Adam's moments are in bfloat16, which takes the least memory and time, but loses small updates. The tasks
``…-fp32`` keep them in float32, as the other sides do, and compute in bfloat16 by autocast. They do not
run on a processor without fast bfloat16, where all sides are in float32 anyway.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.benchmarks import workload
from tests.benchmarks.measure import Clock, Result, main

# Rows of 512 tokens that SFT packs into one pass.
PACKED_ROWS = 1


class _Ticks(TrainerCallback):
    """A clock that stops at the end of every optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()


def _float32_weights(options: Namespace) -> bool:
    return bool(options.task.endswith("-fp32"))


def _arguments(options: Namespace, **more: Any) -> dict[str, Any]:
    import torch

    return {
        "output_dir": str(options.run / "trl"), "max_steps": options.steps, "learning_rate": 1e-3,
        "per_device_train_batch_size": options.samples, "use_cpu": not torch.cuda.is_available(),
        "bf16": _float32_weights(options), "gradient_checkpointing": False, "max_grad_norm": 1.0, "save_strategy": "no",
        "report_to": [], "logging_steps": 10**6, "disable_tqdm": True, "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused", "dataloader_num_workers": 0, **more,
    }  # fmt: skip


def _tokenizer(work: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work / "model")


def _model(options: Namespace, kind: str, folder: str, **more: Any) -> Any:
    import torch
    import transformers

    dtype = torch.float32 if _float32_weights(options) else workload.dtype()
    return getattr(transformers, kind).from_pretrained(options.work / folder, dtype=dtype, **more)


def _counted(trainer: Any) -> list[int]:
    """Counts the real tokens of each batch of the trainer."""
    tokens: list[int] = []
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(examples)
        mask = batch.get("attention_mask")
        tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    trainer.data_collator = counting
    return tokens


def sft(options: Namespace) -> Result:
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = [row["prompt_ids"] + row["chosen_ids"] for row in workload.rows(options.work, "sft")]
    data = datasets.Dataset.from_dict({"input_ids": rows})
    mean = sum(map(len, rows)) / len(rows)
    packs = max(1, round(options.samples * mean / workload.LONGEST))  # as many samples a step as the others
    at_once = min(PACKED_ROWS, packs)
    clock = Clock()
    trainer = SFTTrainer(
        _model(options, "AutoModelForCausalLM", "model"),
        SFTConfig(
            **_arguments(
                options, per_device_train_batch_size=at_once, gradient_accumulation_steps=packs // at_once
            ),
            packing=True, max_length=workload.LONGEST, shuffle_dataset=True,
        ),
        train_dataset=data, processing_class=_tokenizer(options.work), callbacks=[_Ticks(clock)],
    )  # fmt: skip
    counts = _counted(trainer)
    loss = trainer.train().training_loss
    passes = counts[options.warm_up * (packs // at_once) : options.steps * (packs // at_once)]
    return clock.result(options.warm_up, round(sum(passes) / mean), sum(passes), trainer.model.dtype, loss=loss)


def reward(options: Namespace) -> Result:
    import datasets
    from trl import RewardConfig, RewardTrainer

    rows = [
        {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}
        for row in workload.rows(options.work, "reward")
    ]
    clock = Clock()
    trainer = RewardTrainer(
        _model(options, "AutoModelForSequenceClassification", "model", num_labels=1),
        RewardConfig(**_arguments(options), max_length=workload.LONGEST),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=_tokenizer(options.work),
        callbacks=[_Ticks(clock)],
    )  # fmt: skip
    counts = _counted(trainer)
    loss = trainer.train().training_loss
    tokens = sum(counts[options.warm_up : options.steps])
    return clock.result(
        options.warm_up, options.samples * (options.steps - options.warm_up), tokens, trainer.model.dtype, loss=loss
    )


def ppo(options: Namespace) -> Result:
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = _tokenizer(options.work)
    tokenizer.padding_side = "left"
    prompts = [row["prompt_ids"] for row in workload.rows(options.work, "ppo")]
    clock = Clock()
    scorers = [_model(options, "AutoModelForSequenceClassification", "reward", num_labels=1) for _ in range(2)]
    arguments = _arguments(options, learning_rate=1e-5)
    del arguments["max_steps"]
    trainer = PPOTrainer(
        args=PPOConfig(
            **arguments, total_episodes=options.samples * options.steps, num_ppo_epochs=1,
            response_length=workload.ANSWER, temperature=1.0, num_sample_generations=0,
            local_rollout_forward_batch_size=options.samples,
        ),
        processing_class=tokenizer,
        model=_model(options, "AutoModelForCausalLM", "model"),
        ref_model=_model(options, "AutoModelForCausalLM", "model"),
        reward_model=scorers[0], value_model=scorers[1],
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": prompts[:8]}),
        callbacks=[_Ticks(clock)],
    )  # fmt: skip
    mean = sum(map(len, prompts)) / len(prompts) + workload.ANSWER
    trainer.train()
    samples = options.samples * (options.steps - options.warm_up)
    dtype = trainer.policy_model.dtype
    return clock.result(options.warm_up, samples, round(samples * mean), dtype, answer_tokens=workload.ANSWER)


def grpo(options: Namespace) -> Result:
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = _tokenizer(options.work)
    ids = [row["prompt_ids"] for row in workload.rows(options.work, "grpo")]
    prompts = tokenizer.batch_decode(ids)
    assert tokenizer(prompts)["input_ids"] == ids
    lengths: list[int] = []
    rewards: list[float] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        rewards.extend(workload.reward(completions))
        return rewards[-len(completions) :]

    clock = Clock()
    trainer = GRPOTrainer(
        _model(options, "AutoModelForCausalLM", workload.model("grpo")),
        reward_funcs=reward,
        args=GRPOConfig(
            **_arguments(options, learning_rate=1e-5), num_generations=workload.GROUP, temperature=1.0,
            max_completion_length=workload.ANSWER,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer, callbacks=[_Ticks(clock)],
    )  # fmt: skip
    trainer.train()
    samples = options.samples * (options.steps - options.warm_up)
    return clock.result(
        options.warm_up, samples, sum(lengths[options.warm_up :]), trainer.model.dtype,
        answer_tokens=sum(lengths) / len(rewards), reward=sum(rewards) / len(rewards),
    )  # fmt: skip


if __name__ == "__main__":
    main({"sft": sft, "sft-fp32": sft, "reward": reward, "reward-fp32": reward, "ppo": ppo, "grpo": grpo})
