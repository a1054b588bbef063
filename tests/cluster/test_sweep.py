"""A sweep of six runs on a real Slurm: shared stages are trained once, the limit of runs at a time holds, and
a preemption costs nothing. Their stages only simulate training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.run import manifest, trials
from hpc_rlhf.run.layout import RunDir, SweepDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.trials import Trial
from tests.cluster import Cluster, ClusterError, config, wait_until
from tests.cluster.cluster import CHECKOUT

STAND_IN = CHECKOUT / "tests/launch/stand_in"
LIMIT = 2
SPEC = """
extends: {checkout}/tests/cluster/jobs/stand-in.yaml
name: {name}
run_dir: {name}
slurm: {{partition: {partition}, gpus_per_node: 1, heal: {{backoff_seconds: 1}}}}
sweep: {{{sweep}}}
sweep_limit: {limit}
"""
PATIENCE = 240


@dataclass(frozen=True)
class SweepOfStandIns:
    """A sweep on the cluster, in a folder beside its spec."""

    cluster: Cluster
    spec: Path

    @classmethod
    def made(cls, cluster: Cluster, folder: Path, faults: str, **words: object) -> SweepOfStandIns:
        folder.mkdir()
        sweep = cls(cluster, folder / "sweep.yaml")
        sweep.spec.write_text(SPEC.format(checkout=CHECKOUT, **words))
        sweep.store(faults)
        sweep.call("submit", "--force")  # wherever the disk is smaller than what real stages would need
        return sweep

    @property
    def runs(self) -> list[RunDir]:
        return [RunDir(path) for path in sorted(self.spec.parent.glob("*/*")) if path.is_dir()]

    @property
    def owners(self) -> list[RunDir]:
        """The runs that train an SFT model."""
        return [run for run in self.runs if run.lender("sft") is None]

    def store(self, faults: str) -> None:
        """Prepare faults, as the stand-in reads them."""
        self.spec.with_name("fault").write_text(faults)

    def call(self, verb: str, *options: str) -> str:
        fault = str(self.spec.with_name("fault"))
        env = {**self.cluster.env, "PYTHONPATH": f"{STAND_IN}:{CHECKOUT}", "STAND_IN_FAULT": fault}
        command = [sys.executable, "-m", "hpc_rlhf.cli", verb, self.spec.name, *options]
        done = subprocess.run(command, env=env, cwd=self.spec.parent, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait(self, holds: Callable[[], object], what: str) -> None:
        try:
            wait_until(holds, PATIENCE, what)
        except ClusterError as error:
            queue = self.cluster.run("squeue", "--states=all", "--format=%i %j %T %r %E").stdout
            ledgers = "\n".join(f"{run.path.name}\n{run.ledger.read_text()}" for run in self.runs)
            raise ClusterError(f"{error}\n{queue}\n{ledgers}") from None

    def all_done(self) -> bool:
        return all(manifest.defect(run.stage("ppo").model) is None for run in self.runs)


def events(run: RunDir, event: str, stage: str | None = None) -> list[Any]:
    return [each for each in Ledger(run.ledger).events(stage) if each.name == event]


def most_at_once(runs: list[RunDir]) -> int:
    """The largest number of runs in progress at a time: between their first start and their last end."""
    spans = []
    for run in runs:
        begin = min(each.time for each in events(run, "started"))
        spans.append((begin, max(each.time for each in events(run, "finished"))))
    return max(sum(begin <= start < end for begin, end in spans) for start, _ in spans)


def test_six_runs_share_equal_stages_and_resume_after_a_preemption(idle_cluster: Cluster, tmp_path: Path) -> None:
    """The SFTs of both seeds are preempted, and a PPO is killed. Another sweep has an SFT that always
    fails."""
    values = "stages.ppo.kl_coef: [0.02, 0.05, 0.1], seed: [1, 2]"
    six = SweepOfStandIns.made(
        idle_cluster, tmp_path / "six", "sft 6 wait\n", name="six", partition="low", sweep=values, limit=LIMIT
    )
    assert (len(six.runs), len(six.owners)) == (6, 2)
    broken = SweepOfStandIns.made(
        idle_cluster, tmp_path / "two", "sft 6 raise no such tensor\n", name="two", partition="first",
        sweep="stages.ppo.kl_coef: [0.02, 0.1]", limit=1,
    )  # fmt: skip

    def at_the_fault(run: RunDir) -> bool:
        metrics = run.stage("sft").metrics
        return metrics.exists() and len(metrics.read_text().splitlines()) == 5

    six.wait(lambda: all(map(at_the_fault, six.owners)), "both SFTs are at their fifth step")
    six.store("sft 6 wait\nppo 6 die\n")
    for run in six.owners:
        (job,) = events(run, "submitted", "sft")
        node = idle_cluster.field(str(job.job_id), "NodeList")
        options = ("--partition=high", f"--nodelist={node}", f"--gpus-per-node={config.GPUS}")
        idle_cluster.sbatch(*options, "--output=/dev/null", "--wrap=true")
    six.wait(lambda: all(events(run, "requeued", "sft") for run in six.owners), "both SFTs were preempted")
    six.store("ppo 6 die\n")

    broken.wait(lambda: events(broken.owners[0], "stopped", "sft"), "the broken SFT is given up")
    broken.store("")
    broken.call("heal")
    broken.wait(broken.all_done, "both runs of the repaired sweep are done")
    assert [len(events(run, "finished", "sft")) for run in broken.runs] == [1, 0]
    assert most_at_once(broken.runs) == 1

    six.wait(six.all_done, "all six runs are done")
    counts = {stage: sum(len(events(run, "finished", stage)) for run in six.runs) for stage in ("sft", "reward", "ppo")}
    assert counts == {"sft": 2, "reward": 2, "ppo": 6}
    assert {each.reason for run in six.owners for each in events(run, "requeued", "sft")} == {"preempted"}
    assert any(events(run, "retried", "ppo") for run in six.runs)
    assert most_at_once(six.runs) == LIMIT
    assert [line["state"] for line in json.loads(six.call("status", "--json"))] == ["done"] * 6
    assert "already done" in six.call("submit")


def test_search_finds_a_planted_optimum_in_waves(idle_cluster: Cluster, tmp_path: Path) -> None:
    """A PPO is killed, which its own sentinel repairs. The search's sentinel is cancelled; then the user submits again.
    tests/launch/test_search.py compares methods over several seeds."""
    space = (
        "stages.ppo.kl_coef: {low: 0.001, high: 1.0, log: true}, stages.ppo.schedule: [constant, linear, cosine], "
        "stages.ppo.whiten_rewards: [true, false]"
    )
    search = SweepOfStandIns.made(
        idle_cluster, tmp_path / "search", "ppo 6 die\n", name="search", partition="low", limit=4,
        sweep=f"search: {{method: tpe, trials: 12, metric: ppo.reward}}, {space}",
    )  # fmt: skip

    def ended() -> list[Trial]:
        return [trial for trial in trials.read(SweepDir(tmp_path / "search/search").trials) if trial.state != "open"]

    def sentinels() -> list[str]:
        jobs = idle_cluster.run("squeue", "--noheader", "--format=%i %j").stdout.splitlines()
        return [job.split()[0] for job in jobs if job.endswith(".search.sentinel")]

    assert len(search.runs) == 4
    assert len(sentinels()) == 1
    search.wait(lambda: len(search.runs) == 8 and sentinels(), "the second wave begins")
    for job in sentinels():  # also one that is just submitting the wave
        idle_cluster.run("scancel", job)
    search.wait(lambda: not sentinels(), "they have ended")
    search.call("submit", "--force")
    search.wait(lambda: len(ended()) == 12 and not sentinels(), "all trials have ended, and the last sentinel")
    assert {trial.state for trial in ended()} == {"done"}
    assert len(search.owners) == 1
    assert [len(events(run, "finished", "ppo")) for run in search.runs] == [1] * 12
    assert max(trial.value or -1 for trial in ended()) > -0.08
    assert search.call("submit", "--force") == "", "nothing is left to submit"
    assert json.loads(search.call("status", "--json"))["best"] == max(ended(), key=lambda trial: trial.value or -1).name


def test_bad_trials_stop_early(idle_cluster: Cluster, tmp_path: Path) -> None:
    """One after the other, because a trial compares itself with those before. What waits for one that stopped is
    cancelled, and no sentinel retries it."""
    search = SweepOfStandIns.made(
        idle_cluster, tmp_path / "early", "", name="early", partition="low", limit=1,
        sweep="search: {method: grid, trials: 4, metric: sft.perplexity, halving: sft.perplexity}, "
        "stages.sft.eval_every: [4], stages.sft.lr: [1e-6, 1e-5, 1e-4, 1e-3]",
    )  # fmt: skip

    def all_() -> list[Trial]:
        return trials.read(SweepDir(tmp_path / "early/early").trials)

    search.wait(lambda: len(all_()) == 4 and all(trial.state != "open" for trial in all_()), "all trials have ended")
    search.wait(lambda: not idle_cluster.run("squeue", "--noheader").stdout, "no job waits for a stage that stopped")
    results = [2 + abs(math.log10(trial.values["stages.sft.lr"]) + 4) for trial in all_()]
    for place, trial in enumerate(all_()):
        better = sum(result < results[place] for result in results[:place])
        assert trial.state == ("stopped" if better >= (place + 2) // 2 else "done")
        assert trial.value == (results[place] if trial.state == "done" else None)
        run = RunDir(tmp_path / "early/early" / trial.name)
        assert len(events(run, "started", "sft")) == 1
        assert bool(events(run, "started", "ppo")) is (trial.state == "done")
        assert not events(run, "stopped")
    assert "stopped" in {trial.state for trial in all_()}
