"""Continue a search: write down how its trials ended, and choose the next ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError, SpecError
from hpc_rlhf.launch.auto import resolve
from hpc_rlhf.launch.changes import describe, differences, has_trained
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.launch.sampler import suggest
from hpc_rlhf.launch.sweep import lay_out, make_sweep_folder
from hpc_rlhf.run import halving, manifest, trials
from hpc_rlhf.run.layout import RunDir, SweepDir
from hpc_rlhf.run.trials import Trial
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.member import Member, name_of
from hpc_rlhf.spec.search import Search
from hpc_rlhf.spec.stage_inputs import fingerprint
from hpc_rlhf.spec.sweep import Sweep

_NOT_ALLOWED = "the spec does not allow these values together"
_MOST_FAILURES = 5  # trials that may fail one after the other

# The value of the search's metric in a run that is done; None if it has none.
Measure = Callable[[RunDir, JobSpec], float | None]
# Runs the stages of a trial, given the runs that train some of them for it.
Train = Callable[[Trial, JobSpec, Mapping[str, RunDir]], None]


class SearchStuck(HpcRlhfError):
    """One trial after the other fails, which the user has to look at."""


@contextmanager
def continuing(sweep: Sweep, measure: Measure, doing: str, patience: float = 0.0) -> Iterator[Trials]:
    """The trials of a search, for this process alone; ``doing`` and ``patience`` are as in ``hold``.

    Raises:
        HpcRlhfError: another process continues it, this user may not, or its folder has other trials.
    """
    folder = SweepDir(sweep.run_dir)
    make_sweep_folder(folder)
    with hold(folder.lock, doing, patience):
        yield Trials(sweep, measure)


class Trials:
    """The trials of a search, for the process that holds its lock.

    Attributes:
        folder: the search's.
        all: every trial, in order.
        members: the runs of the trials, by number; without those whose values the spec does not allow together.
    """

    def __init__(self, sweep: Sweep, measure: Measure) -> None:
        assert sweep.search is not None
        self._sweep, self._search, self._measure = sweep, sweep.search, measure
        self.folder = SweepDir(sweep.run_dir)
        self.all = trials.read(self.folder.trials)
        self.members: dict[int, Member] = {}
        for trial in self.all:
            _refuse_other(self._search, trial, self.folder)
            if member := self._member(trial):
                self.members[trial.number] = member
                _refuse_changes(self._search, self.run(trial), member.spec)
            elif trial.state == "open":
                self.fail(trial, _NOT_ALLOWED)

    @property
    def open(self) -> list[Trial]:
        """The trials that have not ended."""
        return [trial for trial in self.all if trial.state == "open"]

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended."""
        return not self.open and len(self.all) >= self._search.spec.trials

    def run(self, trial: Trial) -> RunDir:
        return self.folder.run(trial.name)

    def lay_out(self) -> dict[str, Mapping[str, RunDir]]:
        """Write the search's folder. Returns, for each run by name, the runs that train stages for it."""
        return lay_out(replace(self._sweep, limit=None, members=tuple(self.members.values())))

    def record_results(self) -> list[Trial]:
        """Write down how trials have ended, as their runs show. Returns those that stopped early."""
        stopped = []
        for trial in self.all:
            member = self.members.get(trial.number)
            if trial.state != "done" and member and is_done(self.run(trial), member.spec):
                self.finish(trial)
            elif trial.state == "open" and self._stop_early(trial):
                stopped.append(trial)
        return stopped

    def reopen(self) -> None:
        """Let the trials that failed continue; the user asks for that."""
        for trial in self.all:
            if trial.state == "failed" and trial.number in self.members:
                self._write(replace(trial, state="open", why=""))

    def add(self, count: int) -> None:
        """Choose the values of up to ``count`` further trials.

        Raises:
            SearchStuck: the latest trials have failed, all of them.
        """
        latest = [trial for trial in self.all if trial.state != "open"][-_MOST_FAILURES:]
        if len(latest) == _MOST_FAILURES and all(trial.state == "failed" for trial in latest):
            raise SearchStuck(
                f"the last {_MOST_FAILURES} trials failed; the last one: {latest[-1].why}",
                where=str(self.run(latest[-1]).path),
                hint="see hpc-rlhf status and logs of that run; once the cause is gone, submit or run the search again",
                exit_code=RUN_FAILED,
            )
        while count and len(self.all) < self._search.spec.trials:
            values = suggest(self._search, self.all)
            trial = Trial(len(self.all), name_of(values), values, self._search.spec.metric)
            self._write(trial)
            member = self._member(trial)
            if member is None:
                self.fail(trial, _NOT_ALLOWED)
                continue
            self.members[trial.number] = member
            count -= 1

    def finish(self, trial: Trial) -> None:
        """Write down the result of a trial that is done."""
        value = self._measure(self.run(trial), self.members[trial.number].spec)
        if value is None or not math.isfinite(value):
            self.fail(trial, f"it has no {self._search.spec.metric}")
        else:
            self._write(replace(trial, state="done", value=value, why=""))

    def end(self, trial: Trial, why: str) -> None:
        """Write down that a trial has ended early if it has, and otherwise that it failed."""
        if not self._stop_early(trial):
            self.fail(trial, why)

    def fail(self, trial: Trial, why: str) -> None:
        """Write down that a trial failed."""
        self._write(replace(trial, state="failed", why=why.partition("\n")[0]))

    def _stop_early(self, trial: Trial) -> bool:
        """Write down that a trial has ended early, because it is worse than others, if it has."""
        run, by = self.run(trial), self._search.halving
        why = None if by is None else halving.why_stopped(run, by.stage)
        if by is None or why is None:
            return False
        (step, _), value = next(reversed(halving.measured(run, by).items()), ((None, None), None))
        self._write(replace(trial, state="stopped", why=why, step=step, at_step=value))
        return True

    def _write(self, trial: Trial) -> None:
        trials.append(self.folder.trials, trial)
        self.all[trial.number :] = [trial, *self.all[trial.number + 1 :]]

    def _member(self, trial: Trial) -> Member | None:
        try:
            member = self._search.member(trial.values)
            return replace(member, spec=resolve(member.spec)[0])
        except SpecError:
            return None


def run_trials(sweep: Sweep, measure: Measure, train: Train, say: Callable[[str], None]) -> list[Trial]:
    """Run the trials of a search one after the other; one that fails does not end it.

    Args:
        train: runs the stages of a trial; raises HpcRlhfError if one fails.
        say: shows a message to the user.

    Raises:
        HpcRlhfError: as ``continuing`` and ``Trials.add`` do.
    """
    assert sweep.search is not None
    with continuing(sweep, measure, "hpc-rlhf run") as trials:
        trials.reopen()
        trials.record_results()
        while not trials.is_over:
            if not trials.open:
                trials.add(1)
            lent = trials.lay_out()
            for trial in trials.open:
                say(f"trial {trial.number + 1} of {sweep.search.spec.trials}: {trial.name}")
                try:
                    train(trial, trials.members[trial.number].spec, lent[trial.name])
                except HpcRlhfError as error:
                    say(f"this trial ended: {error}")
                    trials.end(trial, error.message)
                else:
                    trials.finish(trial)
        return trials.all


def is_done(run: RunDir, spec: JobSpec) -> bool:
    """Whether all stages of a run are done."""
    return all(manifest.is_done(run.stage(stage)) for stage in spec.stage_names)


def _refuse_other(search: Search, trial: Trial, folder: SweepDir) -> None:
    """Raise HpcRlhfError if a trial is of another search."""
    if trial.metric == search.spec.metric and search.has(trial.values):
        return
    what = f"was for {trial.metric}" if trial.metric != search.spec.metric else "is outside the values of the sweep"
    raise HpcRlhfError(
        f"the folder has trials of another search: the trial {trial.name} {what}",
        where=str(folder.path),
        hint="for another search set run_dir to a new folder; in this one, trials can be added, and values to a sweep",
    )


def _refuse_changes(search: Search, run: RunDir, spec: JobSpec) -> None:
    """Raise HpcRlhfError if a trial was trained with other settings than later ones would have."""
    if not (run.job_yaml.exists() and has_trained(run)):
        return
    begun, stage = read_spec(run.job_yaml), search.metric.stage
    if fingerprint(begun, stage) == fingerprint(spec, stage):
        return
    changes = "\n".join(f"  {describe(change)}" for change in differences(begun, spec))
    raise HpcRlhfError(
        f"the spec has changed since the trial {run.path.name}, so later ones would not compare with it:\n{changes}",
        where=str(run.path.parent),
        hint="leave it as it is, or set run_dir to a new folder",
    )
