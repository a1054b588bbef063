"""A search chooses good values, and goes on after whatever stopped it."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import STOPPED_EARLY, HpcRlhfError
from hpc_rlhf.launch import waves
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.jobs import RunJobs
from hpc_rlhf.launch.sampler import suggest
from hpc_rlhf.launch.search import SearchStuck, run_trials
from hpc_rlhf.run import manifest, trials
from hpc_rlhf.run.events import Failed, Submitted
from hpc_rlhf.run.layout import RunDir, SweepDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.trials import Trial
from hpc_rlhf.slurm.jobs import QueuedJob
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.search import Search
from hpc_rlhf.spec.sweep import Sweep, load_any
from tests.launch.fakes import FAKES, Here

SPEC = """\
name: t
run_dir: run
slurm: {gpus_per_node: 1, heal: {enabled: false}}
data: {sources: [{demo: 100}]}
models: {actor: facebook/opt-125m}
stages: {sft: {}, reward: {}, ppo: {}}
sweep:
  search: {method: tpe, trials: 12, metric: ppo.reward}
  stages.ppo.kl_coef: {low: 0.001, high: 1.0, log: true}
  stages.ppo.schedule: [constant, linear, cosine]
  stages.ppo.whiten_rewards: [true, false]
"""


def planted(values: Mapping[str, Any]) -> float:
    """At most 0, which one kl_coef, one schedule and one way of scaling get."""
    wrong = (values["stages.ppo.schedule"] != "cosine") + values["stages.ppo.whiten_rewards"]
    return -abs(math.log10(values["stages.ppo.kl_coef"]) + 1.2) / 3 - 0.3 * wrong


def load(folder: Path, *sets: str) -> Sweep:
    (folder / "job.yaml").write_text(SPEC)
    sweep = load_any(folder / "job.yaml", sets)
    assert isinstance(sweep, Sweep)
    return sweep


def found(search: Search | None) -> float:
    """The best result of all trials, one after the other."""
    assert search is not None
    done: list[Trial] = []
    while len(done) < search.spec.trials:
        values = suggest(search, done)
        done.append(Trial(len(done), str(values), values, search.spec.metric, "done", planted(values)))
    return max(trial.value or 0.0 for trial in done)


def test_tpe_finds_an_optimum_that_random_search_misses(tmp_path: Path) -> None:
    hits = {
        method: sum(
            found(load(tmp_path, f"seed={seed}", f"sweep.search.method={method}").search) > -0.08 for seed in range(10)
        )
        for method in ("random", "tpe")
    }
    assert hits["random"] <= 4
    assert hits["tpe"] >= 7


def train(trial: Trial, spec: JobSpec, lent: Mapping[str, RunDir]) -> None:
    """Finish all stages at once."""
    for stage in spec.stage_names:
        folder = RunDir(Path(spec.run_dir)).stage(stage).model
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text("w")
        manifest.write(folder, {"step": 1})


def measure(run: RunDir, spec: JobSpec) -> float:
    ppo = spec.stages.ppo
    return planted({f"stages.ppo.{name}": value for name, value in ppo})


def names(sweep: Sweep) -> list[str]:
    return [trial.name for trial in trials.read(SweepDir(sweep.run_dir).trials)]


def die_at(write: int) -> None:
    """Let this process be killed at one of its writes, counted from 1: before it, or within it."""
    left = write

    def deadly(call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return call(*args, **options)

        return wrapped

    def torn(fd: int, data: bytes) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            whole(fd, data[: len(data) // 2])
            os._exit(9)
        return whole(fd, data)

    whole = os.write
    os.write = deadly(torn)
    for owner, name in ((Path, "replace"), (Path, "mkdir"), (Path, "write_text"), (os, "link"), (os, "fsync")):
        setattr(owner, name, deadly(getattr(owner, name)))


def test_search_killed_at_any_write_repeats_and_loses_no_trial(tmp_path: Path) -> None:
    def search(name: str) -> Sweep:
        space = "stages.sft.lr: {low: 1e-5, high: 1e-3, log: true}"
        search = f"sweep={{search: {{method: tpe, trials: 3, metric: sft.perplexity}}, {space}}}"
        return load(tmp_path, search, "stages={sft: {}}", f"run_dir={tmp_path / name}")

    def perplexity(run: RunDir, spec: JobSpec) -> float:
        return abs(math.log10(spec.stages.sft.lr) + 4)

    def result(sweep: Sweep) -> list[Trial]:
        folder = SweepDir(sweep.run_dir)
        written = trials.read(folder.trials)
        assert {path.name for path in folder.path.iterdir() if path.is_dir()} == {trial.name for trial in written}
        return written

    run_trials(search("whole"), perplexity, train, lambda text: None)
    expected = result(search("whole"))
    for write in itertools.count(1):
        killed = search(f"killed-{write}")
        pid = os.fork()
        if pid == 0:
            die_at(write)
            run_trials(killed, perplexity, train, lambda text: None)
            os._exit(0)
        survived = os.waitpid(pid, 0)[1] == 0
        run_trials(killed, perplexity, train, lambda text: None)
        assert result(killed) == expected
        if survived:
            break
    assert write > 40


def test_trial_that_fails_counts_as_bad(tmp_path: Path) -> None:
    def fragile(trial: Trial, spec: JobSpec, lent: Mapping[str, RunDir]) -> None:
        if spec.stages.ppo.schedule == "cosine":
            raise HpcRlhfError("the loss is nan\nat step 3")
        train(trial, spec, lent)

    whys = []
    for seed in range(5):
        sweep = load(tmp_path, f"seed={seed}", f"run_dir={tmp_path / str(seed)}")
        whys += [trial.why for trial in run_trials(sweep, measure, fragile, lambda text: None)[3:]]
    assert set(whys) == {"", "the loss is nan"}
    assert whys.count("") > 0.8 * len(whys)  # at random, two thirds of the trials are done


def test_trials_that_stop_early_are_written_down_and_learned_from(tmp_path: Path) -> None:
    def halved(trial: Trial, spec: JobSpec, lent: Mapping[str, RunDir]) -> None:
        if spec.stages.ppo.schedule == "cosine":
            train(trial, spec, lent)
            return
        run = RunDir(Path(spec.run_dir))
        run.stage("ppo").path.mkdir(parents=True)
        line = {"step": 4, "total_steps": 8, "kind": "eval", "reward": measure(run, spec)}
        run.stage("ppo").metrics.write_text(json.dumps(line) + "\n")
        Ledger(run.ledger).append(Failed("ppo", message="worse", exit_code=STOPPED_EARLY))
        raise HpcRlhfError("worse", exit_code=STOPPED_EARLY)

    sweep = load(tmp_path, "sweep.search.halving=ppo.reward", "stages.ppo.eval_every=4")
    done = run_trials(sweep, measure, halved, lambda text: None)
    for trial in done:
        good = trial.values["stages.ppo.schedule"] == "cosine"
        reached = planted(trial.values)
        expected = ("done", reached, None, None) if good else ("stopped", None, 4, reached)
        assert (trial.state, trial.value, trial.step, trial.at_step) == expected
    assert sum(trial.state == "done" for trial in done[6:]) >= 3
    assert run_trials(sweep, measure, halved, lambda text: None) == done, "they are not tried again"


def test_search_ends_when_all_fails_until_the_user_continues_it(tmp_path: Path) -> None:
    sweep = load(tmp_path)

    def fail(trial: Trial, spec: JobSpec, lent: Mapping[str, RunDir]) -> None:
        raise HpcRlhfError("no such file")

    with pytest.raises(SearchStuck, match="the last 5 trials failed; the last one: no such file"):
        run_trials(sweep, measure, fail, lambda text: None)
    failed = names(sweep)
    done = run_trials(sweep, measure, train, lambda text: None)
    assert {trial.state for trial in done} == {"done"}
    assert len(set(names(sweep))) == 12
    assert names(sweep)[:5] == failed


def test_wave_whose_jobs_end_during_its_submission_is_followed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentinel would have nothing to wait for. One of those jobs fails; those of the second wave keep working."""
    sweep = load(tmp_path, "slurm.heal.enabled=true", "sweep_limit=3")
    sentinels = []
    fails: list[Path] = []

    def submit(spec: JobSpec, *others: object) -> list[Outcome]:
        run = Path(spec.run_dir)
        fails[:] = fails or [run]
        Ledger(run / "ledger.jsonl").append(Submitted("sft", token=run.name, job_id="1"))
        return [Outcome("sft", "submitted", "1")]

    def find_jobs(run: RunDir) -> RunJobs:
        """It works when first looked at, and if it is of the second wave."""
        looked_at[run.path] += 1
        trial = next(trial for trial in trials.read(SweepDir(sweep.run_dir).trials) if trial.name == run.path.name)
        if not run.ledger.exists() or (trial.number < 3 and looked_at[run.path] > 1):
            return RunJobs(run)
        if trial.number < 3 and run.path not in fails:
            train(trial, sweep.search.member(trial.values).spec, {})
        return RunJobs(run, live={"sft": QueuedJob("1", "t.sft", "RUNNING", "", "")})

    looked_at: Counter[Path] = Counter()
    monkeypatch.setattr(waves, "require_slurm", lambda: None)
    monkeypatch.setattr(waves, "submit", submit)
    monkeypatch.setattr(waves, "find_jobs", find_jobs)
    monkeypatch.setattr(waves.commands, "queue", dict)
    monkeypatch.setattr(waves.commands, "submit", lambda script, options: sentinels.append(options))
    waves.submit_search(sweep, None, measure)
    states = [trial.state for trial in trials.read(SweepDir(sweep.run_dir).trials)]
    assert states == ["failed", "done", "done", "open", "open", "open"]
    assert sentinels == [["--dependency=afterany:1:1:1"]]


def test_grid_tries_every_combination_once(tmp_path: Path) -> None:
    space = "stages.ppo.ppo_epochs: {low: 1, high: 5, step: 2}, stages.ppo.gamma: {low: 0.7, high: 1.0, step: 0.1}"
    sweep = load(tmp_path, f"sweep={{search: {{method: grid, trials: 12, metric: ppo.reward}}, {space}}}")
    done = run_trials(sweep, lambda run, spec: spec.stages.ppo.gamma, train, lambda text: None)
    tried = {(trial.values["stages.ppo.ppo_epochs"], trial.values["stages.ppo.gamma"]) for trial in done}
    assert tried == {(epochs, gamma) for epochs in (1, 3, 5) for gamma in (0.7, 0.8, 0.9, 1.0)}
    assert [trial.value for trial in done] == [trial.values["stages.ppo.gamma"] for trial in done]


def test_small_space_is_searched_without_repetition(tmp_path: Path) -> None:
    sweep = load(tmp_path, "sweep={search: {method: tpe, trials: 5, metric: ppo.reward}, stages.ppo.ppo_epochs: "
                 "{low: 1, high: 5}}")  # fmt: skip
    run_trials(sweep, lambda run, spec: spec.stages.ppo.ppo_epochs, train, lambda text: None)
    assert sorted(names(sweep)) == [f"ppo_epochs={epochs}" for epochs in range(1, 6)]


def test_combinations_that_the_spec_refuses_are_skipped(tmp_path: Path) -> None:
    space = "stages.ppo.micro_batch: {low: 2, high: 4}, stages.ppo.kl_coef: [0.1, 0.2]"
    sets = (f"sweep={{search: {{method: grid, trials: 6, metric: ppo.reward}}, {space}}}", "stages.ppo.global_batch=8")
    done = run_trials(load(tmp_path, *sets), measure_nothing, train, lambda text: None)
    refused = [trial for trial in done if trial.values["stages.ppo.micro_batch"] == 3]
    assert len(done) == 6
    assert {trial.why for trial in refused} == {"the spec does not allow these values together"}


def measure_nothing(run: RunDir, spec: JobSpec) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sweep.search.metric=ppo.reward", ""),
        ("sweep.search.metric=ppo.reward;sweep.search.trials=3", ""),
        ("stages.eval={};sweep.search.metric=eval.win_rate", "was for ppo.reward"),
        (
            "sweep={search: {method: tpe, trials: 3, metric: ppo.reward}, stages.ppo.gamma: [0.9, 1.0, 0.8]}",
            "is outside",
        ),
    ],
)
def test_folder_keeps_to_one_search(tmp_path: Path, change: str, message: str) -> None:
    run_trials(load(tmp_path, "sweep.search.trials=2"), measure, train, lambda text: None)
    sweep = load(tmp_path, "sweep.search.trials=2", *change.split(";"))
    if not message:
        run_trials(sweep, measure, train, lambda text: None)
        assert len(names(sweep)) == sweep.search.spec.trials
        return
    with pytest.raises(HpcRlhfError, match=f"has trials of another search: the trial .* {message}"):
        run_trials(sweep, measure, train, lambda text: None)


@pytest.mark.slow
def test_run_and_status_and_compare_show_the_trials(tmp_path: Path) -> None:
    here = Here.new(tmp_path)
    spec = SPEC.replace("trials: 12", "trials: 4").replace("  stages.ppo.whiten_rewards: [true, false]\n", "")
    (tmp_path / "job.yaml").write_text(spec.replace("low: 0.001", "low: 0.5"))
    code, _, err = here.finish("run", "job.yaml", FAKE_PPO="planted", PYTHONPATH=str(FAKES))
    assert code == 0, err
    shown = json.loads(here.finish("status", "job.yaml", "--json")[1])
    ended = shown["trials"]
    assert [trial["state"] for trial in ended].count("done") >= 2
    for trial in ended:
        too_high = trial["values"]["stages.ppo.kl_coef"] > 0.9
        assert trial["state"] == ("failed" if too_high else "done")
        assert trial["run"]["name"].startswith("t.kl_coef-")
    best = min((trial for trial in ended if trial["value"]), key=lambda trial: trial["values"]["stages.ppo.kl_coef"])
    assert shown["best"] == best["name"]
    assert json.loads(here.finish("compare", "run", "--json")[1])["runs"][0]["name"] == best["name"]
    assert f"of {best['name']}" in here.finish("status", "run")[1]
    assert [len(list(run.glob("seen-sft-*"))) for run in sorted(here.run.glob("kl_coef*"))].count(1) == 1
    assert here.finish("run", "job.yaml", "--reuse", "run")[0] == 2
    code, _, err = here.finish("run", "job.yaml", "--set", "stages.ppo.gamma=0.9", "--set", "sweep.search.trials=5")
    assert code == 2
    assert "stages.ppo.gamma: 1.0 -> 0.9" in err
