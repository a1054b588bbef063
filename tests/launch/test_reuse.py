"""--reuse: which stages of another run are taken, and how."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import reuse
from hpc_rlhf.launch.changes import has_begun
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec, load_spec
from tests.launch.fakes import SPEC, Here

ALL = ["sft", "reward", "ppo", "dpo", "eval"]
JOB = """
name: demo
run_dir: {run}
slurm: {{gpus_per_node: 2}}
data: {{sources: [{{path: {data}, format: prompt-chosen-rejected}}], held_out: 0.1}}
models: {{actor: {model}, reward: {model}}}
stages: {{sft: {{}}, reward: {{}}, ppo: {{}}, dpo: {{}}, eval: {{}}}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The job file of a finished run with every stage, whose data and model are older than it."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}\n' * 20)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for path in (tmp_path / "data.jsonl", tmp_path / "model/config.json"):
        os.utime(path, (time.time() - 60,) * 2)
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(run=tmp_path / "old", data=tmp_path / "data.jsonl", model=tmp_path / "model"))
    spec = load_spec(file)
    run = RunDir(tmp_path / "old")
    for stage in spec.stage_names:
        (run.stage(stage).model / "part").mkdir(parents=True)
        (run.stage(stage).model / "part/weights").write_text(f"the weights of {stage}")
        run.stage(stage).metrics.write_text("{}\n")
        manifest.write(run.stage(stage).model, {"stage": stage, "step": 1, "seconds": 1.0, "metrics": {}})
    run.job_yaml.write_text(dump_spec(spec))
    run.plan_json.write_text(make_plan(spec).to_json())
    return file


def changed(job: Path, *sets: str) -> JobSpec:
    return load_spec(job, [f"run_dir={job.parent / 'new'}", *sets])


def found(job: Path, *sets: str) -> dict[str, str]:
    """Why each stage is not reused; empty for those that are."""
    (stages,) = reuse.find({"": changed(job, *sets)}, [RunDir(job.parent / "old")], {}).values()
    return {each.stage: each.why for each in stages}


@pytest.mark.parametrize(
    ("sets", "again"),
    [
        ([], []),
        (["name=other", "slurm.partition=night", "trackers.wandb={project: p}"], []),
        (["stages.ppo.kl_coef=0.3"], ["ppo", "eval"]),
        (["stages.ppo.critic_lr=1e-7"], ["ppo", "eval"]),
        (["stages.dpo.beta=0.3"], ["dpo", "eval"]),
        (["stages.reward.lr=1e-6"], ["reward", "ppo", "eval"]),
        (["stages.eval.prompts=7"], ["eval"]),
        (["stages.sft.lr=1e-6"], ["sft", "ppo", "dpo", "eval"]),
        (["models.reward=facebook/opt-125m"], ["reward", "ppo", "eval"]),
        (["stages.sft.slurm.nodes=2", "stages.sft.micro_batch=2"], []),
        (["stages.sft.slurm.nodes=2"], ["sft", "ppo", "dpo", "eval"]),
    ],
    ids=str,
)
def test_stages_with_the_same_inputs_are_reused(job: Path, sets: list[str], again: list[str]) -> None:
    assert [stage for stage, why in found(job, *sets).items() if why] == again


@pytest.mark.parametrize("sets", [["seed=5"], ["data.max_prompt_tokens=99"], ["data.split.dpo=9"]], ids=str)
def test_a_run_of_which_nothing_can_be_reused_is_refused(job: Path, sets: list[str]) -> None:
    with pytest.raises(HpcRlhfError, match="no stage can be reused") as error:
        found(job, *sets)
    assert f"{sets[0].partition('=')[0]}: " in error.value.message


def test_a_stage_that_shares_the_prompts_affects_all(job: Path) -> None:
    with pytest.raises(HpcRlhfError, match=r"trained: .*'dpo'.* -> "):
        found(job, "stages.dpo=null")


def test_reasons_name_what_differs(job: Path) -> None:
    assert found(job, "stages.ppo.kl_coef=0.3")["ppo"] == "stages.ppo.kl_coef: 0.1 -> 0.3"
    (job.parent / "old/stages/sft/model/manifest.json").unlink()
    reasons = found(job)
    assert reasons == {**dict.fromkeys(ALL, ""), "sft": "it is not finished there"}


@pytest.mark.parametrize(("file", "again"), [("data.jsonl", ALL), ("model/config.json", ALL)])
def test_files_that_were_modified_since_are_noticed(job: Path, file: str, again: list[str]) -> None:
    later = time.time() + 60
    os.utime(job.parent / file, (later, later))
    with pytest.raises(HpcRlhfError, match="was modified since"):
        found(job)


def take(job: Path, *stages: str) -> RunDir:
    spec = changed(job)
    with claim(spec, "test") as run:
        prepare(spec, run, reused={stage: RunDir(job.parent / "old") for stage in stages})
    return run


def test_a_stage_that_is_taken_is_whole_and_independent(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = take(job, "sft")
    theirs = RunDir(job.parent / "old").stage("sft")
    assert (run.stage("sft").model / "part/weights").samefile(theirs.model / "part/weights")
    assert run.stage("sft").metrics.read_text() == "{}\n"
    assert not run.stage("sft").metrics.samefile(theirs.metrics)

    def refuse(*args: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    take(job, "sft", "reward")
    weights = run.stage("reward").model / "part/weights"
    assert not weights.samefile(RunDir(job.parent / "old").stage("reward").model / "part/weights")
    assert all(manifest.defect(run.stage(stage).model) is None for stage in ("sft", "reward"))
    assert main(["status", str(run.path)]) == 0
    assert main(["report", str(run.path)]) == 0


def test_a_copy_that_was_interrupted_is_made_again(job: Path) -> None:
    run = RunDir(job.parent / "new")
    partial = run.stage("sft").reused_model
    partial.mkdir(parents=True)
    (partial / "weights").write_text("half of them")
    assert not has_begun(run.stage("sft"))
    take(job, "sft")
    assert manifest.is_done(run.stage("sft"))
    assert not partial.exists()


def test_a_damaged_stage_is_not_taken(job: Path) -> None:
    weights = job.parent / "old/stages/reward/model/part/weights"
    weights.write_text(weights.read_text()[::-1])
    with pytest.raises(HpcRlhfError, match="reward cannot be reused: part/weights differs from its SHA-256"):
        take(job, "sft", "reward")
    run = RunDir(job.parent / "new")
    assert manifest.is_done(run.stage("sft"))
    assert {path.name for path in run.stage("reward").path.iterdir()} == {"logs"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_files_are_copied(job: Path) -> None:
    for path in (job.parent / "old").rglob("*"):
        os.chown(path, 65534, 65534)
    weights = take(job, "sft").stage("sft").model / "part/weights"
    assert weights.stat().st_uid == os.geteuid()
    assert weights.stat().st_nlink == 1


def test_dry_run_shows_what_would_be_reused(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ["--set", f"run_dir={job.parent / 'new'}"]
    words = ["submit", str(job), *new, "--reuse", str(job.parent / "old"), "--dry-run"]
    assert main([*words, "--set", "stages.ppo.kl_coef=0.3"]) == 0
    printed = capsys.readouterr()
    assert f"reward: reused from {job.parent / 'old'}" in printed.err
    assert "ppo: not reused: stages.ppo.kl_coef: 0.1 -> 0.3" in printed.err
    assert f"sft: reused from {job.parent / 'old'}" in printed.out
    assert "dependency=afterok:<ppo>'" in printed.out
    assert not (job.parent / "new").exists()


def test_runs_of_a_sweep_take_what_they_can(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--set", f"run_dir={job.parent / 'new'}", "--set", "sweep={seed: [1234, 5], stages.ppo.kl_coef: [1, 2]}"]
    assert main(["submit", str(job), *sweep, "--reuse", str(job.parent / "old"), "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seed=1234+kl_coef=1", "sft", "from", "old"] in rows
    assert ["seed=1234+kl_coef=2", "sft", "from", "seed=1234+kl_coef=1"] in rows
    assert ["seed=5+kl_coef=1", "sft", "a", "job"] in rows


@pytest.mark.train
def test_run_trains_only_what_a_change_affects(tmp_path: Path) -> None:
    here = Here.new(tmp_path)
    (tmp_path / "job.yaml").write_text(SPEC.replace("run_dir: run", "run_dir: old"))
    assert here.finish("run", "job.yaml")[0] == 0
    again = ["run", "job.yaml", "--set", "run_dir=run", "--set", "stages.ppo.kl_coef=0.3", "--reuse", "old"]
    code, _, err = here.finish(*again)
    assert code == 0, err
    assert here.events("reused", "started") == [("reused", "sft"), ("reused", "reward"), ("started", "ppo")]
    assert here.finish(*again)[0] == 0
    assert len(here.events("reused", "started")) == 3
