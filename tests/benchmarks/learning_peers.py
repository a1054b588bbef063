"""The peers of our stages: DeepSpeed-Chat's loop and TRL's trainers on given samples, and the evaluation of all."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.spec.yaml_source import read_yaml
from hpc_rlhf.train.algorithms import schedule
from tests.benchmarks import workload

SAMPLES, STEPS = 8, 200
PEERS = {"sft": ("DeepSpeed-Chat",), "reward": ("DeepSpeed-Chat", "TRL"), "kto": ("TRL",), "grpo": ("TRL",)}
ANSWERS = {"sft": ("chosen_ids",), "reward": ("chosen_ids", "rejected_ids")}

Row = dict[str, Any]
# GRPO's job, and after how many steps its models are judged.
GRPO: Any = read_yaml(Path(__file__).parents[2] / "jobs/tiny-grpo.yaml", "jobs/tiny-grpo.yaml").plain()
GRPO_EVERY = 10
# Fields of our KTO stage that its peer takes, too.
KTO = {"lr": 1e-4, "beta": 0.1}
SAMPLED = 4  # responses to each held-out prompt, besides the most likely one


def whole(samples: list[Row], stage: str) -> list[list[int]]:
    """Prompts with responses: all chosen ones, then, for pairs, all rejected ones."""
    return [row["prompt_ids"] + row[name] for name in ANSWERS[stage] for row in samples]


def batches(samples: list[Row], stage: str) -> Iterator[tuple[Any, Any]]:
    """Ids and mask per step, padded to the longest."""
    from tests.benchmarks.deepspeed_chat import _padded

    for first in range(0, len(samples), SAMPLES):
        sequences = whole(samples[first : first + SAMPLES], stage)
        yield _padded(sequences, pad=0, width=max(map(len, sequences)))


def _loaded(kind: str, folder: Path, **more: Any) -> Any:
    import torch
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **more)


def deepspeed_chat(stage: str, start: Path, samples: list[Row], lr: float, seed: int, target: Path) -> None:
    """DeepSpeed-Chat's loop, with its loss, its engine and its initialization of the reward head."""
    import deepspeed
    import torch
    from transformers import get_scheduler

    from tests.benchmarks.deepspeed_chat import PairLoss, Scorer, _config, _join

    _join()
    torch.manual_seed(seed)
    model = _loaded("AutoModelForCausalLM", start)
    net: Any = model if stage == "sft" else PairLoss(Scorer(model.model).float(), model.config.pad_token_id)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    config = {**_config(SAMPLES), "bf16": {"enabled": False}}
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, lr_scheduler=schedule, config=config)
    losses = []
    for ids, mask in batches(samples, stage):
        if stage == "sft":
            labels = ids.masked_fill(mask == 0, -100)
            loss = engine(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        else:
            loss = engine(ids, mask)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if stage == "reward":
        scorer = net.scorer
        model = _loaded("AutoModelForSequenceClassification", start, num_labels=1)
        model.model.load_state_dict(scorer.body.state_dict())
        model.score.load_state_dict(scorer.v_head.state_dict())
    _keep(model, losses, target)


def trl(stage: str, start: Path, samples: list[Row], lr: float, seed: int, target: Path) -> None:
    """TRL's reward trainer, given the pairs in order."""
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    assert stage == "reward"
    torch.manual_seed(seed)
    pairs = [{name: row["prompt_ids"] + row[name] for name in ANSWERS[stage]} for row in samples]
    trainer = RewardTrainer(
        _loaded("AutoModelForSequenceClassification", start, num_labels=1),
        RewardConfig(
            output_dir=str(target / "trl"), max_steps=STEPS, learning_rate=lr, lr_scheduler_type="cosine",
            per_device_train_batch_size=SAMPLES, adam_beta2=0.95, max_grad_norm=1.0, use_cpu=True, bf16=False,
            gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=workload.LONGEST,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(start.with_name("tokenizer")),
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    _keep(trainer.model, losses, target)


def trl_kto(stage: str, start: Path, samples: list[Row], lr: float, seed: int, target: Path) -> None:
    """TRL's KTO trainer, given the labeled responses in order, each with our response to another prompt."""
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    torch.manual_seed(seed)
    rows = [
        {
            "prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "KL_completion_ids": row["other_ids"],
            "label": row["label"] > 0,
        }
        for row in samples
    ]  # fmt: skip
    words = {"prompt": "a", "completion": "b"}
    trainer = KTOTrainer(
        _loaded("AutoModelForCausalLM", start), _loaded("AutoModelForCausalLM", start),
        KTOConfig(
            output_dir=str(target / "trl"), max_steps=STEPS, learning_rate=lr, lr_scheduler_type="cosine",
            per_device_train_batch_size=SAMPLES, adam_beta2=0.95, max_grad_norm=1.0, use_cpu=True, bf16=False,
            gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=workload.LONGEST,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, beta=KTO["beta"],
        ),
        train_dataset=datasets.Dataset.from_list([{**words, "label": True}, {**words, "label": False}]),
        processing_class=AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    trainer.train_dataset = datasets.Dataset.from_list(rows)  # it is given texts only, which it would tokenize itself
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    _keep(trainer.model, losses, target)


def right(responses: list[str], answers: list[str]) -> list[float]:
    """Whether a response ends with the answer, as GRPO's job rewards it."""
    (reward,) = GRPO["stages"]["grpo"]["rewards"]
    last = [re.search(reward["format"], response) for response in responses]
    return [float(bool(found) and found[1] == answer) for found, answer in zip(last, answers, strict=True)]


def trl_grpo(stage: str, start: Path, samples: list[Row], lr: float, seed: int, target: Path) -> None:
    """TRL's GRPO trainer, given the prompts in order, with our learning rate in each step; keeps models on the way."""
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    spec, tokenizer = GrpoSpec.model_validate(GRPO["stages"][stage]), AutoTokenizer.from_pretrained(start)
    assert spec.max_steps is not None
    assert spec.global_batch is not None
    prompts = tokenizer.batch_decode([row["prompt_ids"] for row in samples])
    assert tokenizer(prompts)["input_ids"] == [row["prompt_ids"] for row in samples]
    rows = [{"prompt": text, "answer": row["columns"]["answer"]} for text, row in zip(prompts, samples, strict=True)]
    warmup = schedule.warmup_steps(spec.warmup, spec.max_steps)
    model = _loaded("AutoModelForCausalLM", start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=spec.betas, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(schedule.factor, spec.schedule, warmup=warmup, total=spec.max_steps)
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, answer, **_: right(completions, answer),
        args=GRPOConfig(
            output_dir=str(target / "trl"), max_steps=spec.max_steps, per_device_train_batch_size=spec.global_batch,
            num_generations=spec.group_size, max_completion_length=GRPO["data"]["max_answer_tokens"],
            temperature=spec.temperature, beta=spec.kl_coef, epsilon=spec.cliprange, loss_type="dapo",
            max_grad_norm=spec.clip_grad, shuffle_dataset=False, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="steps", save_steps=GRPO_EVERY, save_only_model=True,
            report_to=[], logging_steps=1, disable_tqdm=True, seed=seed,
        ),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, optimizers=(optimizer, rate),
    )  # fmt: skip
    trainer.train()
    _keep(trainer.model, [line["loss"] for line in trainer.state.log_history if "loss" in line], target)


def trainer(*arguments: Any) -> None:
    from tests.benchmarks import learning_text

    learning_text.trainer(*arguments)


TRAIN: dict[tuple[str, str], Callable[..., None]] = {
    ("DeepSpeed-Chat", "sft"): deepspeed_chat,
    ("DeepSpeed-Chat", "reward"): deepspeed_chat,
    ("TRL", "reward"): trl,
    ("TRL", "kto"): trl_kto,
    ("TRL", "grpo"): trl_grpo,
    ("Trainer", "pretrain"): trainer,
}


def _keep(model: Any, losses: list[float], target: Path) -> None:
    model.save_pretrained(target)
    (target / "losses.json").write_text(json.dumps(losses))


def _logged(side: str, log: Path, stage: str, *arguments: Any) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    TRAIN[side, stage](stage, *arguments)


def train(side: str, stage: str, start: Path, samples: list[Row], lr: float, seed: int, target: Path) -> list[float]:
    """Train a peer in its own process unless it was trained before; returns the loss of each step.

    Args:
        start: folder of the initial model, next to that of the tokenizer.
        samples: of all steps, in order.
        target: folder for the model.
    """
    losses = target / "losses.json"
    if losses.exists():
        return list(json.loads(losses.read_text()))
    target.mkdir(exist_ok=True)
    arguments = (stage, start, samples, lr, seed, target)
    log = target.with_suffix(".log")
    process = multiprocessing.get_context("spawn").Process(target=_logged, args=(side, log, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{side} ended with {process.exitcode}:\n{log.read_text()[-3000:]}")
    return list(json.loads(losses.read_text()))


def judged(stage: str, folder: Path, held: list[Row]) -> list[float]:
    """The log-probability of each held-out sample, or whether the chosen response of each pair scores higher."""
    import torch

    kind = {"sft": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}[stage]
    model, found = _loaded(kind, folder).eval(), []
    with torch.no_grad():
        for ids, mask in batches(held, stage):
            logits = model(input_ids=ids, attention_mask=mask).logits
            if stage == "sft":
                each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
                found += (each * mask[:, 1:]).sum(1).tolist()
            else:
                chosen, rejected = logits.squeeze(-1).chunk(2)
                found += (chosen > rejected).float().tolist()
    return found


def preferred(start: Path, folder: Path, held: list[Row]) -> list[float]:
    """For each held-out pair, whether training has raised the log-probability of its good response more."""
    import torch

    ratios = torch.zeros(len(held))
    with torch.no_grad():
        for sign, model in ((1, _loaded("AutoModelForCausalLM", folder)), (-1, _loaded("AutoModelForCausalLM", start))):
            for number, row in enumerate(held):
                ids = torch.tensor(row["prompt_ids"] + row["chosen_ids"])
                logits = model(input_ids=ids[None, :-1], logits_to_keep=len(row["chosen_ids"])).logits[0]
                log_probs = logits.log_softmax(-1).gather(1, ids[-len(logits) :, None])
                ratios[number] += sign * log_probs.sum()
    pairs = [
        (first, first + 1)
        for first in range(len(held) - 1)
        if held[first]["prompt_ids"] == held[first + 1]["prompt_ids"]
        and held[first]["label"] > held[first + 1]["label"]
    ]
    return [float(ratios[good] > ratios[bad]) for good, bad in pairs]


def accuracy(folder: Path, weights: dict[str, Any], held: list[Row], seed: int) -> tuple[list[float], list[float]]:
    """For each held-out prompt, whether the most likely response is right, and the share of sampled ones that are.

    Args:
        folder: of a model with its tokenizer.
        weights: replace those in the folder, by name, whatever their shape.
    """
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = _loaded("AutoModelForCausalLM", folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name, flat in weights.items():
            own = model.get_parameter(name)
            own.copy_(flat.view_as(own))
    tokenizer.padding_side = "left"
    torch.manual_seed(seed)
    asked = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in held]}, return_tensors="pt")
    found = []
    for each in ({"do_sample": False}, {"do_sample": True, "top_k": 0, "num_return_sequences": SAMPLED}):
        ids = model.generate(**asked, **each, max_new_tokens=GRPO["data"]["max_answer_tokens"])
        texts = tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        each_of = len(texts) // len(held)
        answers = [row["columns"]["answer"] for row in held for _ in range(each_of)]
        found.append(torch.tensor(right(texts, answers)).view(len(held), each_of).mean(dim=1).tolist())
    return found[0], found[1]
