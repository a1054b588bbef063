"""The votes on a run's models while they were served, in ``RUN/feedback``, one per line.

A vote is one line, appended under a lock in one write and flushed to disk. A later line with the id of an earlier one
replaces it, so that a vote can be changed, and a request repeated. A line that a crash cut short is closed before the
next one, and skipped by readers.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.files import fsync_path, make_folder, replacing

# Bytes of the longest line, and of the largest file before the next one begins.
MAX_RECORD, MAX_FILE = 1 << 20, 64 << 20
# The answers of each kind of vote, and how many responses it is about.
ANSWERS = {"thumbs": ("up", "down"), "pair": ("left", "right", "tie", "both_bad")}
RESPONSES = {"thumbs": 1, "pair": 2}
_FILE = re.compile(r"votes-(\d{6})\.jsonl")


class Part(BaseModel):
    """A part of a vote."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RatedModel(Part):
    """A model that gave a response.

    Attributes:
        name: as the run calls it, such as ``sft``.
        manifest: SHA-256 of the ``manifest.json`` of its stage.
    """

    name: str
    manifest: str


class VoteSampling(Part):
    """How the responses were drawn, as in requests; None for what the client did not set.

    On the page, two responses of one model have different seeds: that of the right one is ``seed`` + 1.
    """

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


class VoteMessage(Part):
    """A turn of the conversation before the responses."""

    role: Literal["system", "user", "assistant"]
    content: str


class Vote(Part):
    """A vote.

    Attributes:
        id: chosen by the client at random.
        time: Unix seconds.
        kind: ``thumbs`` for one response, ``pair`` for two side by side.
        models: of the responses, in the order in which they were shown.
        messages: the conversation, which ends with the user's turn.
        vote: one of the ``ANSWERS`` of its kind.
        user: who voted; None unless the server records it.
    """

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$")]
    time: float
    kind: Literal["thumbs", "pair"]
    models: list[RatedModel]
    sampling: VoteSampling
    messages: Annotated[list[VoteMessage], Field(min_length=1)]
    responses: list[str]
    vote: Literal["up", "down", "left", "right", "tie", "both_bad"]
    comment: str = ""
    user: str | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> Vote:
        if self.vote not in ANSWERS[self.kind]:
            raise ValueError(f"a vote of the kind {self.kind} is one of {', '.join(ANSWERS[self.kind])}")
        if not len(self.models) == len(self.responses) == RESPONSES[self.kind]:
            raise ValueError(f"a vote of the kind {self.kind} has {RESPONSES[self.kind]} models and responses")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return self


def append(folder: Path, vote: Vote) -> None:
    """Store a vote. When this returns, it is on disk.

    Raises:
        HpcRlhfError: it is too large, or the file system does not store it; nothing of it remains then.
    """
    line = vote.model_dump_json(exclude_none=True).encode() + b"\n"
    if len(line) > MAX_RECORD:
        raise HpcRlhfError(f"the vote has {len(line):,} bytes with its conversation; at most {MAX_RECORD:,} are stored")
    try:
        with _locked(folder):
            path = next(reversed(_files(folder)), folder / _name(1))
            if path.exists() and path.stat().st_size + len(line) > MAX_FILE:
                path = folder / _name(int(path.stem[-6:]) + 1)
            _append(path, line)
    except OSError as error:
        raise HpcRlhfError(
            f"the vote cannot be stored: {error.strerror}", where=str(folder), exit_code=RUN_FAILED
        ) from error


def _append(path: Path, line: bytes) -> None:
    is_new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        whole = b"\n" * torn + line
        try:
            if os.write(fd, whole) < len(whole):
                raise OSError(None, "the disk is full")
            os.fsync(fd)
        except OSError:
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)
    if is_new:
        fsync_path(path.parent)


def read(folder: Path) -> Iterator[tuple[str, Vote | None]]:
    """The votes, each after the place of its latest line and in the order of those; none that is stored meanwhile.

    None stands for a line that is damaged.
    """
    with ExitStack() as opened:
        files = [(path, opened.enter_context(path.open("rb"))) for path in _files(folder)]
        latest: dict[str, str] = {}
        for path, file in files:
            for number, line in enumerate(file, 1):
                if (vote := _parse(line)) is not None:
                    latest[vote.id] = f"{path}:{number}"
        for path, file in files:
            file.seek(0)
            for number, line in enumerate(file, 1):
                vote, where = _parse(line), f"{path}:{number}"
                if vote is None or latest.get(vote.id) == where:
                    yield where, vote


def delete(folder: Path, chosen: Callable[[Vote], bool]) -> int:
    """Remove votes, with everything that they replaced, and return how many there were.

    Damaged lines in the same files are removed, too: they may be parts of such votes.

    Raises:
        OSError: the files cannot be replaced.
    """
    ids = {vote.id for _, vote in read(folder) if vote is not None and chosen(vote)}
    if not ids:
        return 0
    with _locked(folder):
        for path in _files(folder):
            with path.open("rb") as file:
                lines = file.readlines()
            votes = [_parse(line) for line in lines]
            if any(vote is not None and vote.id in ids for vote in votes):
                kept = [line for line, vote in zip(lines, votes, strict=True) if vote and vote.id not in ids]
                with replacing(path) as partial:
                    partial.touch(0o640)
                    partial.write_bytes(b"".join(kept))
                    fsync_path(partial)
        fsync_path(folder)
    return len(ids)


def _parse(line: bytes) -> Vote | None:
    try:
        return Vote.model_validate_json(line)
    except ValidationError:
        return None


def _files(folder: Path) -> list[Path]:
    """The files with votes, oldest first."""
    return sorted(path for path in folder.glob("votes-*.jsonl") if _FILE.fullmatch(path.name) and path.is_file())


def _name(number: int) -> str:
    return f"votes-{number:06}.jsonl"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes, also on other machines, from changing the votes."""
    make_folder(folder, 0o750)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
