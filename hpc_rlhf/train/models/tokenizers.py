"""The tokenizer of a run: the actor's own, or a BPE trained on the run's data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.spec import model_files, tokens
from hpc_rlhf.spec.job import FromScratch, ModelRef
from hpc_rlhf.train.models.loading import exit_code_of
from hpc_rlhf.train.runtime.world import World

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_bpe(texts: Iterator[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with separate tokens for padding and for the beginning and end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def load_tokenizer(ref: ModelRef, texts: Iterator[str], folder: Path, world: World) -> Any:
    """The actor's tokenizer. For an actor made from scratch, it is trained on the texts and kept in the folder.

    Collective. No mask is derived from the id of the padding token, so a tokenizer without one may pad with EOS.

    Raises:
        HpcRlhfError: there is no such tokenizer, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    if isinstance(ref, FromScratch):
        size = int(ref.from_scratch["vocab_size"])

        def make() -> None:
            if manifest.defect(folder) is not None:
                train_bpe(texts, size).save_pretrained(str(folder))
                manifest.write(folder, {"vocab_size": size})

        world.on_main(make)
    source = str(folder) if isinstance(ref, FromScratch) else ref
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise HpcRlhfError(
            f"no tokenizer could be loaded ({str(error).splitlines()[0]})",
            where=f"models.actor {source}",
            hint="give a hub id that this node can reach or has cached, or a folder with a tokenizer",
            exit_code=exit_code_of(error, source),
        ) from error
    if tokenizer.eos_token_id is None:
        raise HpcRlhfError("the tokenizer has no end-of-sequence token", where=f"models.actor {source}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(tokenizer: Any, actor: str | None, reward: str) -> None:
    """Refuse a reward model with another tokenizer than the actor's.

    Args:
        tokenizer: the actor's.
        actor, reward: folders or hub ids with the tokenizers, if the actor's is in any.

    Raises:
        HpcRlhfError: they differ, or the reward model has none.
    """
    from transformers import AutoTokenizer

    folders = [model_files.folder(source) if source else None for source in (actor, reward)]
    # The files as they are, because transformers may add a token of its own when it loads them (Qwen2's class does).
    ours, other = (tokens.read(where) if where else None for where in folders)
    if ours is None or other is None:
        try:
            loaded = AutoTokenizer.from_pretrained(reward, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise HpcRlhfError(
                f"it has no tokenizer that could be compared with the actor's ({str(error).splitlines()[0]})",
                where=reward,
                hint="put the tokenizer that it was trained with into its folder",
                exit_code=exit_code_of(error, reward),
            ) from error
        padding = None if tokenizer.pad_token == tokenizer.eos_token else tokenizer.pad_token
        ours = tokens.Tokens(tokenizer.get_vocab(), padding=padding)
        other = tokens.Tokens(loaded.get_vocab())
    difference = ours.difference(other)
    if difference is not None:
        raise HpcRlhfError(f"its tokenizer differs from the actor's: {difference}", where=reward, hint=tokens.HINT)
