"""Chooses the values of a search's next trial: a function of the search's seed and its trials so far."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.trials import Trial
from hpc_rlhf.spec.member import name_of
from hpc_rlhf.spec.search import Search
from hpc_rlhf.spec.space import MAX_RUNS, Choices, RangeSpec, combination, index_of, size

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_RANDOM_FIRST = 4  # one in this number of trials of tpe is random, and they come first
_ATTEMPTS = 100


def suggest(search: Search, trials: Sequence[Trial]) -> dict[str, Any]:
    """The values of the next trial, unlike those of all others, as JSON has them.

    Args:
        trials: all others; the results of those that are not open count.

    Raises:
        HpcRlhfError: Optuna is not installed, or the space has no further values.
    """
    taken = {trial.name for trial in trials}
    for values in _candidates(search, trials):
        plain: dict[str, Any] = json.loads(json.dumps(values))
        if name_of(plain) not in taken:
            return plain
    raise HpcRlhfError("the search has no further values to try", where="sweep", hint="set fewer trials")


def _candidates(search: Search, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    if search.spec.method != "grid":
        for attempt in range(_ATTEMPTS):
            yield _ask(search, trials, _hash(search.seed, len(trials), attempt))
    count = math.prod(map(size, search.space.values()))
    if count < math.inf:
        order = random.Random(_hash(search.seed)).sample(range(int(count)), min(int(count), 2 * MAX_RUNS))
        yield from (combination(search.space, number) for number in order)


def _ask(search: Search, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """What Optuna suggests after these trials."""
    try:
        import optuna
    except ImportError as error:
        hint = "install it: pip install 'hpc-rlhf[search]'"
        raise HpcRlhfError("needs Optuna, which is not installed", where="sweep.search", hint=hint) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if search.spec.method == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.spec.trials // _RANDOM_FIRST)
    study = optuna.create_study(sampler=sampler, direction="minimize" if search.metric.lower_is_better else "maximize")
    distributions = {path: _distribution(axis) for path, axis in search.space.items()}
    # One that failed, such as by a learning rate that is too high, counts as worse than all that are done.
    states = {"open": "RUNNING", "done": "COMPLETE", "failed": "PRUNED", "stopped": "PRUNED"}
    same = search.halving is None or search.halving.lower_is_better == search.metric.lower_is_better
    for trial in trials:
        params = {path: _coordinate(axis, trial.values[path]) for path, axis in search.space.items()}
        state = optuna.trial.TrialState[states[trial.state]]
        reached = {} if trial.step is None else {trial.step: (trial.at_step or 0.0) * (1 if same else -1)}
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=trial.value, params=params, distributions=distributions, intermediate_values=reached
            )
        )
    point = study.ask(distributions).params
    return {
        path: axis.rounded(point[path]) if isinstance(axis, RangeSpec) else axis[point[path]]
        for path, axis in search.space.items()
    }


def _distribution(axis: Choices | RangeSpec) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, RangeSpec):
        return CategoricalDistribution(range(len(axis)))
    if axis.is_whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def _coordinate(axis: Choices | RangeSpec, value: Any) -> Any:
    """A value as Optuna has it: a choice by its place, because any value can be one."""
    return value if isinstance(axis, RangeSpec) else index_of(axis, value)


def _hash(*parts: int) -> int:
    """A seed of 32 bits from these numbers."""
    return int(sha256(repr(parts).encode()).hexdigest()[:8], 16)
