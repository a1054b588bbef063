"""Find a stage's newest log, read it, and follow it across requeues."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.ledger import Ledger
from hpc_rlhf.observe.fates import Fates
from hpc_rlhf.rundir import RunDir

POLL = 0.5
_BLOCK = 1 << 16


class LogReader:
    """The log of one rank in a stage's newest job: what the batch script said, then the rank's output and errors.

    A requeued job goes on in the same files; a job submitted anew has its own, and the newest are read.
    """

    def __init__(self, run: RunDir, stage: str, rank: int = 0) -> None:
        """Raises HpcRlhfError: the run has no such stage."""
        if stage not in _stages(run):
            raise HpcRlhfError(f"the run has no stage {stage}", where=str(run.path))
        self._run, self._stage, self._rank = run, stage, rank
        self._read: dict[Path, tuple[int, codecs.IncrementalDecoder]] = {}
        self._shown: Path | None = None

    def files(self) -> list[Path]:
        """The files of the newest job that exist, in the order in which they are shown."""
        jobs: dict[str, list[Path]] = {}
        for name in ("batch.log", f"{self._rank}_log.out", f"{self._rank}_log.err"):
            for path in self._run.stage(self._stage).logs.glob(f"*_{name}"):
                jobs.setdefault(path.name.removesuffix(f"_{name}"), []).append(path)
        return max(jobs.values(), key=lambda paths: max(map(_written, paths)), default=[])

    def read(self) -> Iterator[tuple[Path | None, str]]:
        """Pieces of the log as (file, text); the file is None where the text goes on in the same one.

        Raises:
            HpcRlhfError: there is no log yet.
        """
        if not self.files():
            raise HpcRlhfError(
                f"stage {self._stage} has no log of rank {self._rank} yet",
                where=str(self._run.stage(self._stage).logs),
                hint="hpc-rlhf status says what it waits for; logs -f waits for the log",
                exit_code=RUN_FAILED,
            )
        yield from self._news()

    def follow(self) -> Iterator[tuple[Path | None, str]]:
        """The same, going on until the stage ends and is not going to be tried again."""
        fates = Fates(self._run)
        while True:
            settled = fates.is_settled(self._stage)  # asked first, so that the last words are still read
            yield from self._news()
            if settled:
                return
            time.sleep(POLL)

    def _news(self) -> Iterator[tuple[Path | None, str]]:
        for path in self.files():
            offset, decoder = self._read.get(path) or (0, codecs.getincrementaldecoder("utf-8")("replace"))
            with path.open("rb") as file:
                file.seek(offset)
                while block := file.read(_BLOCK):
                    self._read[path] = (file.tell(), decoder)
                    yield (path if path != self._shown else None), decoder.decode(block)
                    self._shown = path


def latest_stage(run: RunDir) -> str:
    """The stage that wrote a log last.

    Raises:
        HpcRlhfError: none has written one.
    """
    logs = _logs(run)
    if not logs:
        raise HpcRlhfError(
            "no stage has a log yet",
            where=str(run.path),
            hint="hpc-rlhf status says what it waits for",
            exit_code=RUN_FAILED,
        )
    return max(logs, key=_written).parents[1].name


def has_log_to_come(run: RunDir, fates: Fates) -> bool:
    """Whether no stage has a log yet, but one that was sent off may still write one."""
    if _logs(run):
        return False
    sent = {event.get("stage") for event in Ledger(run.ledger).events()} & _stages(run)
    return any(not fates.is_settled(str(stage)) for stage in sent)


def _stages(run: RunDir) -> set[str]:
    return {path.name for path in (run.path / "stages").glob("*")}


def _logs(run: RunDir) -> list[Path]:
    return list((run.path / "stages").glob("*/logs/*_*log*"))


def _written(path: Path) -> float:
    return path.stat().st_mtime
