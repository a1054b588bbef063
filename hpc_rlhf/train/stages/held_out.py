"""Evaluations on held-out data while a stage trains, and the best weights by one of their metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.halving import stop_if_worse
from hpc_rlhf.spec.stages import kind_of
from hpc_rlhf.spec.training import TrainingSpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models.ema import Ema
from hpc_rlhf.train.models.kept import KeptWeights


class HeldOut:
    """A stage's evaluations, each in a place where it leaves no trace in training: between a safe point and the seeds
    of the next step.

    A stop discards an evaluation, and the next attempt, which resumes at that safe point, repeats it. A stop in the
    step after it does so too, with the same result.

    Args:
        model: whose weights are evaluated.
        total: steps of the stage.
        samples: held-out samples.
        measure: the metrics of the model's current weights on held-out data, if there are any. Collective.
        ema: the model's moving average.

    Raises:
        HpcRlhfError: the spec asks for evaluations, but there are no held-out data.
    """

    def __init__(
        self, context: StageContext, model: nn.Module, total: int, samples: int,
        measure: Callable[[], Mapping[str, float | None]], ema: Ema | None = None,
    ) -> None:  # fmt: skip
        spec = context.stage_spec
        assert isinstance(spec, TrainingSpec)
        if spec.eval_every is not None and not samples:
            raise HpcRlhfError(
                "none of the data are held out for the evaluations",
                where=f"stages.{context.stage}.eval_every",
                hint="raise data.held_out, or leave eval_every out",
            )
        self.context, self.total, self.samples, self.measure = context, total, samples, measure
        self.kind, self.metric = kind_of(context.stage), spec.keep_best
        self.every = spec.eval_interval(total)
        self.best = KeptWeights(model, context.world, ema) if spec.keep_best is not None else None

    def after(self, step: int) -> None:
        """Evaluate the weights after ``step`` steps, if that is due before the end. Collective.

        Raises:
            HpcRlhfError: this is a trial of a search, which ends because it is worse than others.
        """
        if self.every and 0 < step < self.total and step % self.every == 0:
            values, context = self.evaluate(step), self.context
            halve = partial(stop_if_worse, context.run, context.stage, step // self.every, step, self.total, values)
            context.world.on_main(halve)

    def evaluate(self, step: int) -> dict[str, float | None]:
        """Evaluate the weights after ``step`` steps, and keep them if they are the best. Collective.

        Returns:
            Their metrics; null without held-out data.
        """
        values: dict[str, float | None] = dict.fromkeys(self.kind.held_out)
        if self.samples:
            measured = self.measure()
            values |= measured
            if self.best is not None and step > 0 and self._is_better(measured, self.best.facts):
                self.best.keep({"step": step, "metrics": values})
        self.context.metrics.log(step, self.total, "eval", {**values, **self._best_step()})
        self.context.checkpoints.deadline.restart_timer()  # a stop need not wait for an evaluation
        return values

    def finish(self) -> dict[str, float | None]:
        """Evaluate the last weights; returns the metrics of those to hand on. Collective."""
        last = self.evaluate(self.total)
        if self.best is None or self.best.facts is None:
            return last
        return {**self.best.facts["metrics"], **self._best_step()}

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """Within it, the model has the weights to hand on. A stop abandons the work inside; the last weights are back
        in place before they are saved. Collective."""
        chosen = self._best_step().get("best_step", self.total)
        best_weights = nullcontext() if chosen == self.total or self.best is None else self.best.in_model()
        with self.context.stop.cancellable(), best_weights:
            yield

    def save(self, snapshot: Snapshot) -> None:
        if self.best is not None:
            self.best.save(snapshot, "best")

    def load(self, folder: Path) -> None:
        if self.best is not None:
            self.best.load(folder / "best")

    def _best_step(self) -> dict[str, float]:
        return {} if self.best is None or self.best.facts is None else {"best_step": self.best.facts["step"]}

    def _is_better(self, measured: Mapping[str, float | None], facts: dict[str, Any] | None) -> bool:
        assert self.metric is not None
        value = measured[self.metric]
        if value is None or not math.isfinite(value):
            return False
        if facts is None:
            return True
        best: float = facts["metrics"][self.metric]
        return value < best if self.metric in self.kind.lower_is_better else value > best
