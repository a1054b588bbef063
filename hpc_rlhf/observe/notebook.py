"""A run in a notebook: its state, spec and models, and its metrics and evaluation as pandas data frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe import results
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.gather import RunPlan
from hpc_rlhf.observe.metrics import held_out_rows, read_text, step_rows
from hpc_rlhf.observe.models import finished_model
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import POLICIES

if TYPE_CHECKING:
    from pandas import DataFrame


def open_run(run: str | Path) -> Run:
    """Open a run to read it.

    Args:
        run: a run directory, its job file, or its name in ``hpc-rlhf list``.

    Raises:
        HpcRlhfError: there is no such run, or it is a sweep of several runs.
    """
    return Run(find_run(str(run)).path)


@dataclass(frozen=True)
class Run:
    """A run, as ``open_run`` returns it. Each property and method reads its files again, and changes nothing.

    Attributes:
        path: the run directory.
    """

    path: Path

    @property
    def spec(self) -> dict[str, Any]:
        """The spec with all defaults, as in job.yaml."""
        return read_spec(RunDir(self.path).job_yaml).model_dump(mode="json")

    @property
    def states(self) -> dict[str, str]:
        """The state of each stage, as ``hpc-rlhf status`` shows it."""
        return {status.stage: status.state for status in read_status(RunDir(self.path))}

    def model(self, name: str | None = None) -> Path:
        """The folder of a finished model.

        Args:
            name: sft, ppo, ema, …; by default the latest finished.

        Raises:
            HpcRlhfError: it is not finished, or not part of the run.
        """
        if name is not None and name not in POLICIES:
            raise HpcRlhfError(f"there is no model {name!r}", hint=f"choose one of {', '.join(POLICIES)}")
        return finished_model(RunDir(self.path), name)[1]

    def metrics(self, stage: str, held_out: bool = False) -> DataFrame:
        """The metrics of a stage.

        Args:
            held_out: the measurements on held-out data instead of those of every step.

        Returns:
            A row for each step so far, by step, with a column for each metric, and ``time`` in UTC; NaN for what was
            not measured or not finite.

        Raises:
            HpcRlhfError: the run has no such stage, or pandas is not installed.
        """
        pandas, run = _pandas(), RunDir(self.path)
        stages = [planned.stage for planned in RunPlan.read(run).stages]
        if stage not in stages:
            raise HpcRlhfError(f"has no stage {stage!r}; its stages are {', '.join(stages)}", where=str(self.path))
        text = read_text(run.stage(stage).metrics)
        rows = held_out_rows(text) if held_out else step_rows(text, stage)
        index = pandas.Index([row.step for row in rows], name="step", dtype="int64")
        frame = pandas.DataFrame([row.values for row in rows], index=index, dtype="float64")
        frame.insert(0, "time", pandas.to_datetime([round(1000 * row.time) for row in rows], unit="ms", utc=True))
        return frame

    def evaluation(self) -> DataFrame:
        """The results of the evaluation.

        Returns:
            A row for each model and metric, with columns ``model``, ``metric``, ``value``, ``low`` and ``high``; NaN
            for the bounds of a number without a confidence interval.

        Raises:
            HpcRlhfError: the run has no evaluation yet, or pandas is not installed.
        """
        pandas, models = _pandas(), results.read_report(RunDir(self.path))["models"]
        rows = [(model, *numbers) for model, metrics in models.items() for numbers in _numbers(metrics)]
        frame = pandas.DataFrame(rows, columns=["model", "metric", "value", "low", "high"])
        return frame.astype(dict.fromkeys(["value", "low", "high"], "float64"))


def _numbers(metrics: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, object, object, object]]:
    """The name, value and bounds of each metric of a model. Those of a source of prompts begin with its name."""
    for name, value in metrics.items():
        if not isinstance(value, dict):
            yield group + name, value, None, None
        elif "value" in value:
            yield group + name, value["value"], value["low"], value["high"]
        else:
            yield from _numbers(value, "" if name == "sources" else f"{group}{name}/")


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise HpcRlhfError("pandas is not installed", hint="pip install pandas") from None
    return pandas
