"""The loss of KTO: its closed form, its gradient, and TRL's loss on the same batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hpc_rlhf.train.algorithms.kto import reference_point, value_loss
from tests.train import tiny

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_and_margins_match_the_paper() -> None:
    given = [(3.0, True), (-2.0, True), (3.0, False), (-2.0, False), (0.5, False)]
    ratios, kinds = torch.tensor([ratio for ratio, _ in given]), torch.tensor([kind for _, kind in given])
    losses, margins = value_loss(ratios, kinds, 0.5, beta=0.2, desirable_weight=1.5, undesirable_weight=0.7)
    for (ratio, good), loss, margin in zip(given, losses.tolist(), margins.tolist(), strict=True):
        weight, distance = (1.5, 0.2 * (ratio - 0.5)) if good else (0.7, 0.2 * (0.5 - ratio))
        assert loss == pytest.approx(weight * (1 - sigmoid(distance)))  # lambda_y - v(x, y)
        assert margin == pytest.approx(distance, abs=1e-7)


def test_the_gradient_is_greatest_at_the_reference_point_and_saturates() -> None:
    ratios = torch.tensor([0.0, 40.0, -40.0], requires_grad=True)
    losses, margins = value_loss(ratios, torch.tensor([True, True, True]), 0.0, 0.4, 1.0, 1.0)
    assert not margins.requires_grad
    losses.sum().backward()
    assert ratios.grad is not None
    assert ratios.grad[0].item() == pytest.approx(-0.4 / 4)
    assert ratios.grad[1:].abs().max() < 1e-6


def test_the_reference_point_is_a_mean_and_never_negative() -> None:
    assert reference_point(6.0, 4.0) == 1.5
    assert reference_point(-6.0, 4.0) == 0.0


@pytest.mark.train
def test_the_loss_is_that_of_trls_trainer_on_the_same_batch(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    policy, ref = (LlamaForCausalLM(LlamaConfig(**SIZES)).eval() for _ in range(2))
    rows = [
        {"prompt": f"Count from {n}.", "completion": f" {n} {n + 1} {'more ' * n}", "label": n % 3 > 0}
        for n in range(6)
    ]
    config = trl.KTOConfig(
        str(tmp_path), per_device_train_batch_size=6, max_steps=1, learning_rate=0.0, use_cpu=True, bf16=False,
        logging_steps=1, report_to=[], beta=0.3, desirable_weight=1.2, undesirable_weight=0.8, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trainer = trl.KTOTrainer(policy, ref, config, train_dataset=data, processing_class=tiny.tokenizer())
    trainer.train()
    logged = trainer.state.log_history[0]

    tokens = trainer.train_dataset

    def log_ratio(prompt: list[int], response: list[int]) -> float:
        def log_prob(model: LlamaForCausalLM) -> float:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item()

        return log_prob(policy) - log_prob(ref)

    responses = tokens["completion_ids"]
    pairs = zip(tokens["prompt_ids"], [responses[-1], *responses[:-1]], strict=True)
    kl = reference_point(sum(log_ratio(*pair) for pair in pairs), len(rows))
    assert kl > 0
    assert kl == pytest.approx(logged["kl"], rel=1e-4)
    ratios = torch.tensor([log_ratio(*pair) for pair in zip(tokens["prompt_ids"], responses, strict=True)])
    labels = torch.tensor([bool(row["label"]) for row in rows])
    losses, _ = value_loss(ratios, labels, kl, 0.3, 1.2, 0.8)
    assert losses.mean().item() == pytest.approx(logged["loss"], abs=1e-4)
