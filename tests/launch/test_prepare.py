"""Preparing a run directory: private, complete, and faithful to the spec it was trained with."""

from __future__ import annotations

import json
import os
import stat
from itertools import count
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.changes import differences, evaluation_changed
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.batch import derive_batch
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec, read_spec
from tests.launch.fakes import SPEC


def spec_with(tmp_path: Path, *sets: str) -> JobSpec:
    (tmp_path / "job.yaml").write_text(SPEC)
    return load_spec(tmp_path / "job.yaml", (f"run_dir={tmp_path / 'run'}", *sets))


def prepared(spec: JobSpec, live: bool = False) -> Path:
    with claim(spec, "a test") as run:
        prepare(spec, run, live=live)
    return run.path


def test_a_new_directory_is_complete_and_private(tmp_path: Path) -> None:
    spec = spec_with(tmp_path)
    run = prepared(spec)
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert read_spec(run / "job.yaml") == spec
    assert [job["stage"] for job in json.loads((run / "plan.json").read_text())["jobs"]] == ["sft", "reward", "ppo"]
    assert json.loads((run / "scripts/ppo.ds_config.json").read_text())["train_micro_batch_size_per_gpu"] == 4
    assert sorted(path.name for path in run.iterdir()) == [".secret", "job.yaml", "plan.json", "scripts", "stages"]


def test_the_spec_may_change_before_training(tmp_path: Path) -> None:
    run = prepared(spec_with(tmp_path))
    (run / "stages/sft/logs/1_0_log.err").write_text("it failed at once")
    prepared(spec_with(tmp_path, "stages.sft.lr=1e-3"))
    assert read_spec(run / "job.yaml").stages.sft.lr == 1e-3  # type: ignore[union-attr]


def test_a_trained_run_keeps_its_spec(tmp_path: Path) -> None:
    run = prepared(spec_with(tmp_path))
    (run / "stages/sft/metrics.jsonl").touch()
    before = (run / "job.yaml").read_text()
    changed = spec_with(tmp_path, "stages.sft.lr=1e-3", "data.sources.0.demo=200", "slurm.nodes=2")
    with pytest.raises(HpcRlhfError) as caught:
        prepared(changed)
    message = str(caught.value)
    assert f"--reuse {run}" in message
    assert "cancel" not in message
    assert "  stages.sft.lr: 9.65e-06 -> 0.001\n" in message
    assert "  data.sources.0.demo: 100 -> 200\n" in message
    assert "  stages.ppo.slurm.nodes: 1 -> 2\n" in message
    assert (run / "job.yaml").read_text() == before
    prepared(spec_with(tmp_path))


def test_a_trained_run_may_move_to_another_partition(tmp_path: Path) -> None:
    run = prepared(spec_with(tmp_path))
    (run / "stages/sft/checkpoints").mkdir()
    prepared(spec_with(tmp_path, "slurm.partition=night", "stages.ppo.slurm.time=2-00"))
    assert "--partition=night" in (run / "scripts/sft.sbatch").read_text()


def test_a_trained_run_may_resume_on_other_ranks_with_the_same_steps(tmp_path: Path) -> None:
    run = prepared(spec_with(tmp_path, "stages.sft.micro_batch=4", "slurm.nodes=2"))
    (run / "stages/sft/checkpoints").mkdir()
    whole = derive_batch(read_spec(run / "job.yaml").stage("sft"), "sft").global_
    with pytest.raises(HpcRlhfError, match=rf"the same steps over other ranks, set .*stages.sft.global_batch: {whole}"):
        prepared(spec_with(tmp_path, "stages.sft.micro_batch=4"))
    same = [
        f"stages.{s}.global_batch={derive_batch(read_spec(run / 'job.yaml').stage(s), s).global_}"
        for s in ("sft", "reward", "ppo")
    ]
    prepared(spec_with(tmp_path, "stages.sft.micro_batch=2", *same))
    assert derive_batch(read_spec(run / "job.yaml").stage("sft"), "sft").global_ == whole


def test_nothing_may_change_while_jobs_are_live(tmp_path: Path) -> None:
    run = prepared(spec_with(tmp_path))
    prepared(spec_with(tmp_path), live=True)
    with pytest.raises(HpcRlhfError, match=r"(?s)slurm.partition: unset -> night.*hpc-rlhf cancel"):
        prepared(spec_with(tmp_path, "slurm.partition=night"), live=True)
    assert "night" not in (run / "job.yaml").read_text()


def test_a_shared_run_can_be_read_by_its_group_and_written_by_nobody_else(tmp_path: Path) -> None:
    def modes() -> dict[str, int]:
        return {str(path.relative_to(run)): stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*"))}

    run = prepared(spec_with(tmp_path))
    (run / "stages/sft/checkpoints").mkdir(mode=0o700)
    (run / "stages/sft/serve.token").touch(mode=0o600)
    prepared(spec_with(tmp_path, "share=group"))
    shared = modes()
    secret = {name for name, mode in shared.items() if not mode & 0o040}
    assert secret == {".secret", "stages/sft/serve.token"}
    assert shared["."] == 0o750
    assert not [name for name, mode in shared.items() if mode & 0o022]
    assert all(shared[name] & 0o050 == 0o050 for name in shared if (run / name).is_dir())
    assert "\numask 027\n" in (run / "scripts/sft.sbatch").read_text()
    prepared(spec_with(tmp_path))
    assert modes()["."] == 0o700
    assert "\numask 077\n" in (run / "scripts/sft.sbatch").read_text()
    before = os.umask(0o077)
    with claim(spec_with(tmp_path, "share=group"), "a test"):
        assert os.umask(0o027) == 0o027
    assert os.umask(before) == 0o077


@pytest.mark.parametrize("live", [True, False])
def test_what_can_change_is_kept_apart_from_what_cannot(tmp_path: Path, live: bool) -> None:
    run = prepared(spec_with(tmp_path))
    (run / "stages/sft/metrics.jsonl").touch()
    with pytest.raises(HpcRlhfError) as caught:
        prepared(spec_with(tmp_path, "stages.ppo.kl_coef=0.3", "slurm.partition=night"), live=live)
    fixed, _, changeable = caught.value.message.partition("these could")
    assert "  stages.ppo.kl_coef: 0.1 -> 0.3" in fixed
    assert "  stages.sft.slurm.partition: unset -> night" in changeable
    assert ("once its jobs are cancelled" in changeable) == live
    assert f"--reuse {run}" in str(caught.value.hint)
    assert "hpc-rlhf cancel" not in str(caught.value)  # the jobs are good, and it would not help


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(HpcRlhfError, match=r"not a run directory: it holds thesis\.tex"):
        prepared(spec_with(tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_failed_claim_does_not_block_the_next(tmp_path: Path) -> None:
    spec = spec_with(tmp_path)
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "hostfile.j2").write_text("{{ nonsense }}")
    with pytest.raises(HpcRlhfError, match="template"), claim(spec, "a test") as run:
        prepare(spec, run, beside=tmp_path)
    assert not run.job_yaml.exists()
    prepared(spec)


def test_a_launcher_that_was_killed_at_any_of_its_writes_does_not_block_the_next(tmp_path: Path) -> None:
    replace, writes = Path.replace, count()

    def die_at(place: int) -> int:
        """Prepare in a process that ends before it puts this file in its place."""
        if (child := os.fork()) == 0:
            Path.replace = lambda path, target: os._exit(9) if next(writes) == place else replace(path, target)  # type: ignore[method-assign]
            prepared(spec_with(tmp_path / str(place)))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for place in count():
        (tmp_path / str(place)).mkdir()
        if die_at(place) == 0:
            break
        prepared(spec_with(tmp_path / str(place)))
    assert place > 3


def test_a_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(HpcRlhfError, match="cannot write the run directory: it is not a folder"):
        prepared(spec_with(tmp_path))


def test_top_level_settings_count_only_where_a_stage_uses_them(tmp_path: Path) -> None:
    own = [f"stages.{stage}.slurm.partition=gpu" for stage in ("sft", "reward", "ppo")]
    assert not differences(spec_with(tmp_path, *own), spec_with(tmp_path, "slurm.partition=gpu"))


def test_a_changed_evaluation_is_computed_again(tmp_path: Path) -> None:
    run = RunDir(prepared(spec_with(tmp_path)))
    run.stage("sft").metrics.touch()
    prepared(spec_with(tmp_path, "stages.eval={}"))
    run.stage("eval").metrics.touch()
    spec = spec_with(tmp_path, "stages.eval={slurm: {partition: other}}")
    assert not evaluation_changed(run, spec)
    prepared(spec)
    assert run.stage("eval").metrics.exists()
    spec = spec_with(tmp_path, "stages.eval={prompts: 7}")
    assert evaluation_changed(run, spec)
    prepared(spec)
    assert not run.stage("eval").metrics.exists()
    assert run.stage("sft").metrics.exists()
    assert read_spec(run.job_yaml).stages.eval == spec.stages.eval
    run.stage("eval").metrics.touch()
    prepared(spec_with(tmp_path))  # asked for no longer, and kept
    assert run.stage("eval").metrics.exists()
