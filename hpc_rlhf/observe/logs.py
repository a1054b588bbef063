"""Finds a stage's newest log, reads it, and follows it across requeues until the stage is over."""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.observe.gather import launcher_at_work
from hpc_rlhf.run import sentinel
from hpc_rlhf.run.attempt_logs import own_part, read_tail, without_style
from hpc_rlhf.run.events import Cancelled, Ended, Failed, Finished, Interrupted, Started, Submitted
from hpc_rlhf.run.history import OUTCOMES, RETRYABLE, StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands

POLL = 0.5
SLURM_EVERY = 5.0  # seconds between two queries to Slurm about one stage
_BLOCK = 1 << 16
_TASK = re.compile(r"\btasks? (\d+)")  # srun's name of a rank
_PREFIX = 80  # characters of a message that identify its log


class StageWatch:
    """Watches for the end of a run's stages, to be asked repeatedly."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._next: dict[str, float] = {}

    def is_over(self, stage: str) -> bool:
        """Whether a stage ended and only the user would try it again.

        After a failure it is not over while a sentinel waits, or a launcher that may retry is running.
        """
        history = StageHistory.read(self._run, stage)
        state = history.state
        if state is None:
            return False
        failed = isinstance(state, RETRYABLE)
        if isinstance(state, OUTCOMES) and not failed:
            return True
        if time.monotonic() < self._next.get(stage, 0.0):
            return False
        self._next[stage] = time.monotonic() + SLURM_EVERY
        if self._is_alive(stage, history.job_id, failed):
            return False
        return StageHistory.read(self._run, stage).state == state  # else it was retried while Slurm was asked

    def _is_alive(self, stage: str, job_id: str | None, failed: bool) -> bool:
        """Whether anything works on a stage, or will. If that cannot be known, a failure is the end."""
        if launcher_at_work(self._run):
            return True
        if job_id is None or not commands.available():
            return not failed
        try:
            queue = commands.queue()
        except HpcRlhfError:
            return True  # the controller will be back
        job = queue.get(job_id)
        if job is not None and job.live and job.is_of(stage):
            return True
        # A sentinel of any stage repairs the whole run.
        tokens = [event.token for event in Ledger(self._run.ledger).events() if isinstance(event, Submitted)]
        return bool(sentinel.living(queue, self._run, tokens))


class LogReader:
    """The log of one rank in a stage's newest job: the batch script's, then the rank's output and errors.

    A requeued job continues in the same files; a newly submitted job has its own, and the newest are read.
    """

    def __init__(self, run: RunDir, stage: str, rank: int = 0) -> None:
        """Raises HpcRlhfError: the run has no such stage."""
        stages = _stages(run)
        if stage not in stages:
            hint = f"its stages are {', '.join(sorted(stages))}"
            raise HpcRlhfError(f"the run has no stage {stage}", where=str(run.path), hint=hint)
        self._run, self._stage, self._rank = run, stage, rank
        self._names = ("batch.log", f"{rank}_log.out", f"{rank}_log.err")
        self._positions: dict[Path, tuple[int, codecs.IncrementalDecoder]] = {}
        self._shown: Path | None = None

    def files(self, job_id: str = "*") -> list[Path]:
        """The existing files of one job, by default the newest, in the order shown."""
        jobs: dict[str, list[Path]] = {}
        for name in self._names:
            for path in self._run.stage(self._stage).logs.glob(f"{job_id}_{name}"):
                jobs.setdefault(path.name.removesuffix(f"_{name}"), []).append(path)
        return max(jobs.values(), key=lambda paths: max(map(_mtime, paths)), default=[])

    def read(self) -> Iterator[tuple[Path | None, str]]:
        """Parts of the log as (file, text); the file is None if the text continues in the same one.

        Raises:
            HpcRlhfError: there is no log yet.
        """
        if not self.files():
            raise HpcRlhfError(
                f"stage {self._stage} has no log of rank {self._rank} yet",
                where=str(self._run.stage(self._stage).logs),
                hint="hpc-rlhf status shows what it waits for; logs -f waits for the log",
                exit_code=RUN_FAILED,
            )
        yield from self._new_parts()

    def follow(self) -> Iterator[tuple[Path | None, str]]:
        """The same, until the stage ends and is not going to be retried."""
        watch = StageWatch(self._run)
        while True:
            over = watch.is_over(self._stage)  # asked first, so that the last lines are still read
            yield from self._new_parts()
            if over:
                return
            time.sleep(POLL)

    def _new_parts(self) -> Iterator[tuple[Path | None, str]]:
        for path in self.files():
            offset, decoder = self._positions.get(path) or (0, codecs.getincrementaldecoder("utf-8")("replace"))
            with path.open("rb") as file:
                file.seek(offset)
                while block := file.read(_BLOCK):
                    self._positions[path] = (file.tell(), decoder)
                    yield (path if path != self._shown else None), decoder.decode(block)
                    self._shown = path


def read_attempt(run: RunDir, stage: str, rank: int, number: int) -> list[tuple[Path, str]]:
    """One attempt's log, by file: of files that a requeued job shares with other attempts, its own part.

    Args:
        number: the attempt's, from 1, as `status` counts them.

    Raises:
        HpcRlhfError: the stage had no such attempt, or none of its logs exist.
    """
    reader = LogReader(run, stage, rank)
    started = StageHistory.read(run, stage).all(Started)
    if number > len(started):
        had = f"{len(started)} attempt{'s' * (len(started) != 1)}"
        raise HpcRlhfError(f"stage {stage} had {had} so far, not {number}", where=str(run.path))
    event = started[number - 1]
    # Without Slurm an attempt has a job of its own, named by its launcher's process.
    job = event.job_id or event.attempt.split("-")[1]
    restart = event.restart if event.job_id else None
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in reader.files(job)}
    parts = [(path, part) for path, text in texts.items() if (part := own_part(text, restart)).strip()]
    if not parts:
        where = str(run.stage(stage).logs)
        raise HpcRlhfError(f"attempt {number} at {stage} has no log of rank {rank}", where, exit_code=RUN_FAILED)
    return parts


@dataclass(frozen=True)
class Trouble:
    """The relevant part of the logs of a failed stage.

    Attributes:
        reason: such as out of memory; empty until it has been judged.
        message: the most informative line.
        rank: the rank whose log has it; 0 if unknown.
        node: where it began; empty if unknown.
        step: the last step done, or None.
    """

    reason: str
    message: str
    rank: int
    node: str
    step: int | None


def trouble(run: RunDir, stage: str) -> Trouble | None:
    """Why a stage's latest attempt failed; None if it did not."""
    history = StageHistory.read(run, stage)
    state, attempt = history.state, history.attempt
    if not isinstance(state, OUTCOMES) or isinstance(state, (Finished, Interrupted, Cancelled)):
        return None
    ended = attempt.last(Ended)
    if ended is not None:
        rank = _rank_with(run, stage, ended.message)
        return Trouble(ended.reason, ended.message, rank, ended.node, ended.step)
    cause = attempt.first_cause or state
    message = getattr(cause, "message", "")
    node = cause.host if isinstance(cause, Failed) else ""
    return Trouble("", message, _rank_with(run, stage, message), node, None)


def _rank_with(run: RunDir, stage: str, message: str) -> int:
    task = _TASK.search(message)
    if task is not None:
        return int(task[1])
    words = " ".join(message.split())[:_PREFIX].rstrip("…")
    logs = run.stage(stage).logs.glob("*_log.err") if words else []
    saying = [path for path in logs if words in " ".join(without_style(read_tail(path)).split())]
    latest = max(saying, key=_mtime, default=None)
    return 0 if latest is None else int(latest.name.split("_")[-2])


def latest_stage(run: RunDir) -> str:
    """The stage with the newest log.

    Raises:
        HpcRlhfError: none has a log.
    """
    logs = _logs(run)
    if not logs:
        hint = "hpc-rlhf status shows what it waits for"
        raise HpcRlhfError("no stage has a log yet", where=str(run.path), hint=hint, exit_code=RUN_FAILED)
    return max(logs, key=_mtime).parents[1].name


def has_log_to_come(run: RunDir, watch: StageWatch) -> bool:
    """Whether no stage has a log yet, but a submitted one may still write one."""
    if _logs(run):
        return False
    submitted = {event.stage for event in Ledger(run.ledger).events()} & _stages(run)
    return any(not watch.is_over(stage) for stage in submitted)


def _stages(run: RunDir) -> set[str]:
    return {path.name for path in (run.path / "stages").glob("*")}


def _logs(run: RunDir) -> list[Path]:
    return list((run.path / "stages").glob("*/logs/*_*log*"))


def _mtime(path: Path) -> float:
    return path.stat().st_mtime
