"""Compares what this package computes of a tiny model with what transformers computes of one sequence at a time."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models import agreement, lora, packed_attention, structure
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.language_model import ONE_BY_ONE, LanguageModel
from hpc_rlhf.train.models.loading import load_causal, load_reward
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.rollout.backend import GenerationRequest, Sampling
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime.world import ParallelDims, World
from tests.models.families import VOCABULARY, Family
from tests.train import tiny

CLOSE = 1e-4
# Tokens of the sequences and prompts: unlike, in no order, and longer than the windows.
LENGTHS = (7, 41, 1, 23, 60)
PROMPTS = (3, 30, 11, 1, 19)
NEW_TOKENS = 20
# A rate for everything in a configuration whose name looks like dropout's, or that adds noise otherwise.
NOISE = ("drop", "jitter")


class Differs(Exception):
    """Two computations of the same differ."""


@dataclass
class Outcome:
    """What became of a family.

    Attributes:
        refused: the sentence with which the product refuses it, "" if it works.
        wrong: the checks that failed, with what they say.
        facts: how the family is computed.
    """

    refused: str = ""
    wrong: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Sample:
    """A tiny model of a family in a folder, and its sequences."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tiny.tokenizer()
        write_model(family, folder, self.tokenizer)
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
        self.prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS]

    @property
    def batch(self) -> Ragged:
        return Ragged.of(self.rows)

    @property
    def predicted(self) -> Tensor:
        return self.batch.tail([len(row) - 1 for row in self.rows])

    @cached_property
    def weights(self) -> Tensor:
        """Of the predicted tokens in a loss."""
        return torch.rand(len(self.predicted), generator=torch.Generator().manual_seed(2))

    def plain(self, folder: Path | None = None) -> Any:
        """transformers' own model, without any of our code."""
        where = folder or self.folder
        return auto_class(where).from_pretrained(str(where), dtype=torch.float32).eval()

    def ours(self) -> LanguageModel:
        model = LanguageModel(load_causal(str(self.folder), torch.float32)).train()
        agreement.verify(model, World(0, ParallelDims(1), torch.device("cpu"), None), str(self.folder))
        return model

    def log_probs(self, model: LanguageModel) -> Tensor:
        return model(self.batch.ids, self.batch.lengths, self.predicted)[0]


def auto_class(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(folder))
    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText


def write_model(family: Family, folder: Path, tokenizer: Any) -> None:
    """Write a folder with widely spread weights, and dropout wherever the configuration has a rate for it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    fields = copy.deepcopy(family.fields)
    kind = fields.pop("model_type")
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(kind, **fields, **ids)
    for part in {id(part): part for part in (config, config.get_text_config()) if family.noise}.values():
        for name, value in list(vars(part).items()):
            if any(each in name for each in NOISE) and isinstance(value, float):
                setattr(part, name, 0.3)
    torch.manual_seed(0)
    multimodal = config.get_text_config() is not config
    model = (AutoModelForImageTextToText if multimodal else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, family.spread)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def alone(model: Any, row: list[int]) -> Tensor:
    """Log-probabilities of a sequence from its second token on, by transformers alone."""
    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(row[1:], dtype=torch.int64).unsqueeze(1)).squeeze(1)


def close(actual: Tensor, expected: Tensor, what: str) -> float:
    """The largest difference.

    Raises:
        Differs: it is too large.
    """
    if not actual.isfinite().all():
        raise Differs(f"{what} not finite")
    largest = float((actual - expected).abs().max())
    if not largest <= CLOSE:  # NaN is not close
        raise Differs(f"{what} differ by {largest:.2g}")
    return largest


@torch.no_grad()
def log_probabilities(sample: Sample, outcome: Outcome) -> None:
    plain = sample.plain()
    ours = sample.ours()
    alone_only = getattr(ours.causal, ONE_BY_ONE, False)
    outcome.facts["rows"] = (
        "packed" if packed_attention.is_enabled(ours.causal) else "one by one" if alone_only else "padded"
    )
    expected = torch.cat([alone(plain, row) for row in sample.rows])
    actual = sample.log_probs(ours)
    if not torch.equal(sample.log_probs(ours), actual):
        raise Differs("two training passes differ (dropout)")
    close(actual, expected, "log-probabilities")


def gradients(sample: Sample, outcome: Outcome) -> None:
    """Of transformers' own loss, summed over the sequences."""
    plain = sample.plain()
    for row in sample.rows:
        if len(row) > 1:
            plain(input_ids=torch.tensor([[3]]), use_cache=False)  # dynamic rotary embeddings remember longer rows
            ids = torch.tensor([row])
            (plain(input_ids=ids, labels=ids, use_cache=False).loss * (len(row) - 1)).backward()
    ours = sample.ours()
    (-sample.log_probs(ours).sum()).backward()
    compare_gradients(ours.causal, plain)


def compare_gradients(ours: Any, plain: Any) -> None:
    names = {name: name.replace("language_model.", "") for name, _ in plain.named_parameters()}
    expected = {names[name]: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    if not expected.keys() <= actual.keys():
        raise Differs(f"no gradient of {sorted(expected.keys() - actual.keys())[:3]}")
    for name, wanted in expected.items():
        scale = max(1.0, float(wanted.abs().max()))
        close(actual[name] / scale, wanted / scale, f"gradients of {name}")


def activation_checkpointing(sample: Sample, outcome: Outcome) -> None:
    ours, other = sample.ours(), sample.ours()
    outcome.facts["recomputes"] = other.causal.supports_gradient_checkpointing
    if not outcome.facts["recomputes"]:  # refused by prepare_model
        return
    other.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (ours, other):
        (-sample.log_probs(model).sum()).backward()
    compare_gradients(other.causal, ours.causal)


@torch.no_grad()
def rollouts(sample: Sample, outcome: Outcome) -> None:
    responses = respond(sample, sample.ours().causal)
    check_greedy(sample.plain(), sample.prompts, responses)


def respond(sample: Sample, causal: Any) -> list[list[int]]:
    """Greedy responses, more than run at the same time, so that rows are refilled and moved."""
    world = World(0, ParallelDims(1), torch.device("cpu"), None)
    eos = sample.tokenizer.eos_token_id
    request = GenerationRequest(sample.prompts, NEW_TOKENS, eos, Sampling(greedy=True), max_batch=3)
    return RolloutEngine(causal, world).generate(request).responses


@torch.no_grad()
def check_greedy(plain: Any, prompts: list[list[int]], responses: list[list[int]]) -> None:
    wrong = 0
    for prompt, response in zip(prompts, responses, strict=True):
        logits = plain(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
        wrong += int((chosen < logits.max(dim=-1).values - CLOSE).sum())
    if wrong:
        raise Differs(f"{wrong} of {sum(map(len, responses))} greedy tokens are not the likeliest")


@torch.no_grad()
def rewards(sample: Sample, outcome: Outcome) -> None:
    ours = load_reward(str(sample.folder), torch.float32, seed=3).train()
    agreement.verify(ours, World(0, ParallelDims(1), torch.device("cpu"), None), str(sample.folder))
    (head,) = [p for name, p in ours.named_parameters() if name.endswith("score.weight")]
    plain = sample.plain()
    body = structure.body(plain if plain.config.get_text_config() is plain.config else plain.get_decoder())
    expected = [
        body(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] @ head[0] for row in sample.rows
    ]
    values = ours(sample.batch.ids, sample.batch.lengths)
    close(values, torch.cat(expected), "rewards")
    folder = sample.folder.with_name("reward")
    export(ours.classifier, sample.tokenizer, folder, True)
    again = load_reward(str(folder), torch.float32, seed=None)
    close(again(sample.batch.ids, sample.batch.lengths), values, "rewards of the exported model")


@torch.no_grad()
def round_trip(sample: Sample, outcome: Outcome) -> None:
    ours = sample.ours()
    first = next(p for p in ours.causal.parameters() if p.dim() >= 2)
    first.mul_(1.5)
    folder = sample.folder.with_name("exported")
    export(ours.causal, sample.tokenizer, folder, True)
    plain = sample.plain(folder)
    close(sample.log_probs(ours), torch.cat([alone(plain, row) for row in sample.rows]), "exported log-probabilities")


@torch.no_grad()
def adapters(sample: Sample, outcome: Outcome) -> None:
    ours = sample.ours()
    before = sample.log_probs(ours)
    whole = sum(p.numel() for p in ours.causal.parameters())
    lora.adapt(ours.causal, LoraSpec(rank=4), 5)
    adapted = lora.adapters(ours.causal)
    for adapter in adapted:
        adapter.lora_b.normal_(0, 0.1)
    outcome.facts["adapted share"] = round(sum(adapter.frozen.numel() for adapter in adapted) / whole, 2)
    actual = sample.log_probs(ours)
    if torch.allclose(actual, before, atol=1e-2):
        raise Differs("adapters change nothing")
    folder = sample.folder.with_name("adapted")
    export(ours.causal, sample.tokenizer, folder, True)
    plain = sample.plain(folder)
    close(actual, torch.cat([alone(plain, row) for row in sample.rows]), "merged log-probabilities")
    check_greedy(plain, sample.prompts, respond(sample, ours.causal))


CHECKS: tuple[Callable[[Sample, Outcome], None], ...] = (
    log_probabilities, gradients, activation_checkpointing, rollouts, rewards, round_trip, adapters,
)  # fmt: skip


def check(family: Family, folder: Path, checks: Sequence[Callable[[Sample, Outcome], None]] = CHECKS) -> Outcome:
    """The checks of a family.

    Args:
        folder: an empty one.
    """
    torch.set_num_threads(1)
    outcome = Outcome()
    sample = Sample(family, folder / "model")
    for each in checks:
        try:
            each(sample, outcome)
        except HpcRlhfError as error:
            if each is checks[0]:
                outcome.refused = str(error).replace(str(sample.folder), "MODEL")
                return outcome
            outcome.wrong[each.__name__] = f"refused: {error}"
        except Differs as error:
            outcome.wrong[each.__name__] = str(error)
        except Exception:
            outcome.wrong[each.__name__] = traceback.format_exc()
    return outcome
