"""At a stage's start: what a model computes for a sequence is what transformers computes for it alone.

Rows in which sequences follow one another, and padded ones, are right for most architectures, but not for all:
recurrent layers may carry one sequence's state into the next, and some keep state in the module. So a few short random
sequences go through the loaded model in different arrangements, and the fastest one that agrees is used. Ranks share
the tokens of packed rows only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec import sequence_checks
from hpc_rlhf.train.models import packed_attention, structure
from hpc_rlhf.train.models.language_model import ONE_BY_ONE, SEQUENCE_GROUP, LanguageModel, RewardModel
from hpc_rlhf.train.parallel.deepspeed_internals import is_zero3
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.runtime.world import World

LENGTHS = (12, 5, 19, 8)
# The sequence that also goes through the model alone, without its last tokens: they must not matter.
ALONE, LEFT_OUT = 2, 3
PACKED, PADDED, SINGLE = "packed into one row", "in padded rows", "one by one"


def tolerance(dtype: torch.dtype) -> float:
    """How far outputs may differ by rounding, as a fraction of their standard deviation.

    Sequences that reach each other differ by more than a tenth of it; rounding in half precision by 1 to 3 hundredths.
    """
    return 1e-4 if dtype == torch.float32 else 0.1


def random_sequences(config: Any, lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Random tokens that a model takes, the same on every rank: (length,), int64."""
    text = config.get_text_config()
    special = {text.pad_token_id, text.bos_token_id, *_listed(text.eos_token_id)}
    tokens = torch.tensor([token for token in range(min(text.vocab_size, 10_000)) if token not in special])
    longest = getattr(text, "max_position_embeddings", None) or max(lengths)
    generator = torch.Generator().manual_seed(0)
    return [
        tokens[torch.randint(len(tokens), (min(length, longest),), generator=generator)].to(device)
        for length in lengths
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Within it, nothing has a gradient; afterwards random numbers continue as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        yield


def verify(engine: Any, world: World, source: str, dropout: float = 0.0) -> None:
    """Choose how sequences are arranged in a model's passes, in place. Collective.

    Args:
        engine: a ``LanguageModel`` or ``RewardModel``, or the DeepSpeed engine around one. One in training mode must
            not draw random numbers either, unless it has dropout.
        source: what the model was loaded from, for errors.

    Raises:
        HpcRlhfError: passes draw random numbers, no arrangement gives what transformers gives, or ranks cannot share
            the model's sequences.
    """
    training = engine.training
    trial = _Trial(engine, world, source)
    if world.sequence_group is not None:
        trial.check_shared()
    try:
        engine.train(training and not dropout)
        with undisturbed(world.device):
            if engine.training:
                trial.check_noise()
            trial.arrange()
    finally:
        engine.train(training)


class _Trial:
    def __init__(self, engine: Any, world: World, source: str) -> None:
        self.engine = engine
        self.world = world
        self.source = source
        self.model: LanguageModel | RewardModel = getattr(engine, "module", engine)
        is_language = isinstance(self.model, LanguageModel)
        self.inner: Any = self.model.causal if is_language else self.model.classifier
        self.kind = self.inner.config.model_type
        self.sharded = any(map(is_zero3, self.model.parameters()))
        self.tolerance = tolerance(self.inner.dtype)
        # Long enough to go on from one rank's share of a row to the next, whose size is rounded up.
        longer = 1 if world.sequence_group is None else 2 * world.dims.sequence
        self.sequences = random_sequences(self.inner.config, [longer * each for each in LENGTHS], world.device)

    def outputs(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities of each sequence's tokens but the first, or its values: float64."""
        lengths = [len(sequence) for sequence in sequences]
        batch = Ragged(torch.cat(list(sequences)), tuple(lengths))
        if isinstance(self.model, LanguageModel):
            lengths = [length - 1 for length in lengths]
            flat, _ = self.engine(batch.ids, batch.lengths, batch.tail(lengths))
        else:
            flat = self.engine(batch.ids, batch.lengths)
        return list(flat.detach().double().split(lengths))

    # Random numbers

    def check_noise(self) -> None:
        """Refuse a model of which two passes over the same tokens differ in training, but not in evaluation."""
        noise = self._noise()
        if self.world.max(noise > 0):
            self.engine.eval()
            floor = self._noise()
            self.engine.train()
            if self.world.max(noise > 4 * floor + 1e-6):
                raise HpcRlhfError(
                    f"{self.kind} models draw random numbers in training where dropout is 0: two passes over the same "
                    f"tokens differ by {noise:.1e} standard deviations",
                    where=self.source,
                    hint="set dropout above 0 to accept them, or use another model",
                )

    def _noise(self) -> float:
        return distance(*(torch.cat(self.outputs(self.sequences)) for _ in range(2)))

    # Arrangements

    def check_shared(self) -> None:
        """Refuse a model whose configuration says that ranks cannot share its sequences."""
        text, dims = self.inner.config.get_text_config(), self.world.dims
        fields = {**vars(text), "num_attention_heads": getattr(text, "num_attention_heads", None)}
        if (problem := sequence_checks.unshared(fields, dims.tensor, dims.sequence)) is not None:
            raise HpcRlhfError(problem[0], where=self.source, hint=problem[1])

    def _arrangements(self) -> list[tuple[str, bool]]:
        """The ways in which sequences may go through the model, each with True if logits are computed in chunks; the
        fastest first."""
        ways = [PACKED, PADDED, SINGLE] if packed_attention.is_enabled(self.inner) else [PADDED, SINGLE]
        heads = [True, False] if getattr(self.model, "chunked", False) else [False]
        every = [(way, chunked) for chunked in heads for way in ways]
        if self.world.sequence_group is None:
            return every
        return [each for each in every if each == (PACKED, isinstance(self.model, LanguageModel))]

    def arrange(self) -> None:
        """Use the first arrangement that agrees, and say so if it is not the first one."""
        alone, arrangements = self._alone(), self._arrangements()
        for way, chunked in arrangements:
            self._set(way, chunked)
            if not self.world.max(not self._agrees(alone, way)):
                self._report(way, chunked, arrangements[0])
                return
        if self.world.sequence_group is not None:
            what = f"ranks cannot share the sequences of {self.kind} models, which do not attend within packed rows"
            raise HpcRlhfError(what, where=self.source, hint=sequence_checks.HINT)
        raise HpcRlhfError(
            f"{self.kind} models cannot be trained here: what they compute for a token depends on those after it, "
            "or on earlier passes",
            where=self.source,
            hint="use a causal language model",
        )

    def _set(self, way: str, chunked: bool) -> None:
        if way != PACKED:
            packed_attention.disable(self.inner)
        elif not packed_attention.is_enabled(self.inner):
            packed_attention.enable_again(self.inner)
        body = structure.body(self.inner)
        for part in (self.inner, body):
            setattr(part, ONE_BY_ONE, way == SINGLE)
        setattr(body, SEQUENCE_GROUP, self.world.sequence_group if way == PACKED else None)
        if isinstance(self.model, LanguageModel):
            self.model.chunked = chunked

    def _alone(self) -> Tensor:
        """The outputs of one sequence alone, as transformers computes them."""
        before = packed_attention.is_enabled(self.inner), getattr(self.model, "chunked", False)
        self._set(PADDED, chunked=False)
        (alone,) = self.outputs([self.sequences[ALONE][:-LEFT_OUT]])
        self._set(PACKED if before[0] else PADDED, before[1])
        return alone

    def _agrees(self, alone: Tensor, way: str) -> bool:
        try:
            with packed_attention.recording() as attending:
                forth = self.outputs(self.sequences)
        except packed_attention.NotPackable:
            return False
        back = self.outputs(self.sequences[::-1])[::-1]
        whole_logits = isinstance(self.model, LanguageModel) and not self.model.chunked  # from padded rows
        if way == PACKED and not whole_logits and not self._all_attend(attending):
            return False
        order = distance(torch.cat(back), torch.cat(forth))
        beside = distance(forth[ALONE][: len(alone)], alone, torch.cat(forth))
        return max(order, beside) <= self.tolerance

    def _all_attend(self, attending: set[Any]) -> bool:
        """True if each layer has passed the sequences' lengths on to its attention."""
        layers = structure.layers(structure.body(self.inner))
        return layers is None or all(any(part in attending for part in layer.modules()) for layer in layers[1])

    def _report(self, way: str, chunked: bool, fastest: tuple[str, bool]) -> None:
        if way == SINGLE and self.sharded:
            raise HpcRlhfError(
                f"{self.kind} models take sequences only one by one, which zero: 3 cannot do",
                where=self.source,
                hint="set zero: 2",
            )
        if self.world.is_main and (way, chunked) != fastest:
            slow = "" if chunked == fastest[1] else ", with all logits in memory"
            print(
                f"hpc-rlhf: {self.kind}: sequences go through the model {way}{slow}, because passes that are faster "
                "give other numbers",
                file=sys.stderr,
                flush=True,
            )


def distance(one: Tensor, other: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference, in standard deviations of ``scale``, by default of ``other``; infinite if not finite."""
    # Log-probabilities are float32: less than their resolution is no difference.
    beyond = ((one - other).abs() - 4 * torch.finfo(torch.float32).eps * other.abs()).clamp(min=0)
    spread = (other if scale is None else scale).std().clamp(min=1e-30)
    largest = float((beyond / spread).max())
    return largest if largest < float("inf") else float("inf")
