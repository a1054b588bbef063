"""Pretraining: learn plain text by next-token prediction, from scratch or from a pretrained model.

Documents follow each other without padding, as in GPT-3 (arXiv 2005.14165, section 2.2); unlike there, attention stays
within a document by default (arXiv 2402.13991).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.gpus import GPUS
from hpc_rlhf.spec.sizes import EVALUATED_ROWS
from hpc_rlhf.spec.stages import PretrainSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data import texts
from hpc_rlhf.train.data.sampler import blended, shuffled, total_steps
from hpc_rlhf.train.data.sequences import Sequences, predicted
from hpc_rlhf.train.data.token_files import TokenStream
from hpc_rlhf.train.models.flops import TrainingFlops
from hpc_rlhf.train.models.loading import check_fits, load_causal, loading
from hpc_rlhf.train.stages.common import finish, language_engine, prepare_model, start_actor
from hpc_rlhf.train.stages.learner import Learner, Row, Samples


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, PretrainSpec)

    # 1. Data.
    data = Text.prepare(context, spec)
    total = total_steps(sum(data.amounts), 1, context.batch.global_, spec.max_steps)
    budget = context.batch.micro * spec.sequence_length

    # 2. Model.
    source = start_actor(context)
    whole = context.world.dims.pipeline > 1
    with loading(context.stop, context.ds_config, whole):
        model = load_causal(source, None if whole else context.dtype, spec.dropout)
    check_fits(model.config, context.tokenizer, context.longest, source)
    flops = TrainingFlops.of(model, spec)
    prepare_model(model, spec, context.spec.seed)
    engine, forward = language_engine(context, model, spec, spec.lr, total, source)

    # 3. Loss: the negative log-probability of every token but the first of a document.
    def measure(rows: list[Row]) -> tuple[Tensor, Tensor]:
        loss = -forward(*packed(rows, context.world.device), summed=True)[0]
        return loss, loss.detach().unsqueeze(0)

    learner = TextLearner(
        context, engine, data, total, (), budget, ("loss",), measure,
        learned_tokens=learned_tokens, flops=flops, forward=forward,
    )  # fmt: skip

    # 4. Resume, or evaluate the start.
    checkpoint = context.resume(learner.load)
    if checkpoint is None:
        before, first = learner.held_out.evaluate(0)["perplexity"], 0
    else:
        before, first = checkpoint.state["perplexity_before"], checkpoint.step

    # 5. Train, evaluate, and write the artifact.
    learner.train(first, {"perplexity_before": before})
    metrics = learner.held_out.finish()
    metrics = {"perplexity_before": before, "perplexity_after": metrics.pop("perplexity"), **metrics}
    finish(context, total, {"": model}, metrics, learner.held_out.handed_on())


@dataclass(frozen=True)
class Text:
    """The sequences of all sources, and the order in which they are learned.

    Attributes:
        names: of the sources, each once.
        amounts: sequences of each source in the whole stage.
    """

    train: Sequences
    held_out: Sequences
    names: list[str]
    amounts: list[int]
    seed: int

    @classmethod
    def prepare(cls, context: StageContext, spec: PretrainSpec) -> Text:
        """Tokenize the sources of a stage. Collective.

        Raises:
            HpcRlhfError: a source cannot be read, or has no text to learn.
        """
        seed, folder = context.spec.seed, context.files.data

        def should_stop() -> bool:  # without a heartbeat: a rank may wait for the others for hours
            return context.stop.flag.code > 0

        with context.stop.cancellable():
            return cls.of(texts.prepare(spec, seed, context.tokenizer, folder, context.world, should_stop), spec, seed)

    @classmethod
    def of(cls, streams: list[tuple[TokenStream, TokenStream]], spec: PretrainSpec, seed: int) -> Text:
        """The text of sources, of each the tokens to train on and those held out.

        Raises:
            HpcRlhfError: a source has no text to learn.
        """
        train, held_out = (
            Sequences([each[split] for each in streams], spec.sequence_length, spec.cross_documents) for split in (0, 1)
        )
        for source, count in zip(spec.sources, train.counts, strict=True):
            if not count:
                what = "the source has no text to learn: no documents, or all are held out"
                raise HpcRlhfError(what, where=source.name, hint="check its files; lower held_out if they are few")
        amounts = [
            max(1, math.floor(source.weight * spec.epochs * count))
            for source, count in zip(spec.sources, train.counts, strict=True)
        ]
        return cls(train, held_out, labels([source.name for source in spec.sources]), amounts, seed)

    def index_at(self, position: int) -> int:
        """The sequence at a position of the stage: a source gets its share of every part of the stage, and its
        sequences come in a new random order in every pass. A step that needs more than there are begins again."""
        source, number = blended(position % sum(self.amounts), self.amounts)
        count = self.train.counts[source]
        turn, place = divmod(number, count)
        return int(self.train.starts[source]) + shuffled(place, count, self.seed, "text", source, turn)


def labels(names: list[str]) -> list[str]:
    """Short names of sources for their metrics: the last part of the path, numbered where several have the same."""
    short = [name.rstrip("/").rpartition("/")[2].partition(".")[0] or name for name in names]
    return [f"{name}-{n}" if short.count(name) > 1 else name for n, name in enumerate(short)]


def learned_tokens(row: Row) -> int:
    return len(row["ids"]) - len(row["documents"])


def packed(rows: list[Row], device: torch.device) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """The tokens of some sequences, (tokens,), the tokens of each document, and the indices of those to predict."""
    lengths = [length for row in rows for length in row["documents"]]
    ids = np.concatenate([row["ids"] for row in rows])
    return torch.from_numpy(ids).to(device), tuple(lengths), torch.from_numpy(predicted(lengths)).to(device)


@dataclass
class TextLearner(Learner):
    """Learns sequences of text. It measures its speed, and evaluates each source.

    Attributes:
        forward: called like a ``LanguageModel``.
    """

    flops: TrainingFlops | None = None
    forward: Any = None

    def length_of(self, rows: Samples) -> Callable[[int], int]:
        assert isinstance(rows, Sequences)
        return rows.length

    def indices(self, step: int) -> list[int]:
        text, size = self.data, self.context.batch.global_
        assert isinstance(text, Text)
        return [text.index_at(position) for position in range(step * size, (step + 1) * size)]

    def step(self, indices: list[int]) -> dict[str, float]:
        start = time.monotonic()
        values = super().step(indices)
        seconds = time.monotonic() - start
        values["tokens_per_second"] = values["tokens"] / seconds
        spec, world = self.context.stage_spec, self.context.world
        gpu = GPUS.get(spec.slurm.gpu or "") if world.device.type == "cuda" else None
        if gpu is not None and self.flops is not None:
            rows = map(self.data.train.__getitem__, indices)
            pairs = sum(length**2 for row in rows for length in row["documents"])
            peak = world.size * gpu.peak(spec.precision)
            values["mfu"] = self.flops.total(values["tokens"], pairs) / seconds / peak
        return values

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss and the perplexity of held-out text, and the perplexity of that of each source. Collective."""
        text = self.data
        assert isinstance(text, Text)
        rows, count = text.held_out, len(text.names)
        batches = self.batches(rows, rows.length, rows.evaluated(self.context.spec.seed, EVALUATED_ROWS // count))

        def losses_and_tokens(chosen: list[Row]) -> Tensor:
            """(2, sources): the sum of the losses, and the tokens, of each source."""
            log_probs = self.forward(*packed(chosen, self.context.world.device))[0]
            tokens = [learned_tokens(row) for row in chosen]
            sums = torch.zeros(2, count, dtype=torch.float64)
            for row, losses in zip(chosen, (-log_probs).split(tokens), strict=True):
                sums[:, row["source"]] += torch.stack((losses.double().sum().cpu(), torch.tensor(float(len(losses)))))
            return sums

        total = torch.stack(self.measured(batches, losses_and_tokens)).sum(dim=0)
        sums = self.context.world.sums({f"{n}": value for n, value in enumerate(total.flatten().tolist())})
        losses, tokens = list(sums.values())[:count], list(sums.values())[count:]
        loss = sum(losses) / sum(tokens)
        by_source = {
            f"perplexity/{name}": perplexity(own / number)
            for name, own, number in zip(text.names, losses, tokens, strict=True)
            if number
        }
        return {"loss": loss, "perplexity": perplexity(loss), **by_source}


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))
