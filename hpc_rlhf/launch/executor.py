"""A submitit executor that submits our rendered script with its dependencies and its token."""

from __future__ import annotations

import os
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.render import rank_command
from hpc_rlhf.slurm import commands
from hpc_rlhf.task import StageTask


class StageExecutor(SlurmExecutor):
    """Submits a stage with submitit's file names; the script, which is already in the run directory, and the entry
    point of a rank are ours."""

    def __init__(self, plan: Plan, job: PlannedJob, options: list[str]) -> None:
        logs = plan.run.stage(job.stage).logs
        super().__init__(logs)
        self.update_parameters(nodes=job.nodes, ntasks_per_node=job.slurm.tasks_per_node)
        self._plan, self._job, self._options = plan, job, options

    def send(self) -> str:
        """Submit the stage and return its job id.

        Raises:
            HpcRlhfError: sbatch rejected it; the message is sbatch's.
        """
        try:
            with redirect_stderr(StringIO()):  # submitit prints the exception's text there too
                return str(self.submit(StageTask(str(self._plan.run.path), self._job.stage)).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines()]
            raise HpcRlhfError(
                f"sbatch rejected the job: {'; '.join(lines)}",
                where=f"stages.{self._job.stage}",
                hint="change the stage's slurm settings and submit again",
            ) from error

    @property
    def _submitit_command_str(self) -> str:
        """Our entry point instead of submitit's."""
        return rank_command(self._plan, self._job)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """The script that was rendered into the run directory, with the same command."""
        return self._plan.run.sbatch(self._job.stage).read_text(encoding="utf-8")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        """sbatch, without the environment of a job that this process may be part of."""
        unset = [f"--unset={name}" for name in commands.foreign_variables(os.environ)]
        return ["env", *unset, "sbatch", "--parsable", *self._options, str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        return commands.submitted_id(string if isinstance(string, str) else string.decode(errors="replace"))
