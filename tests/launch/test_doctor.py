"""The doctor finds planted faults and their fixes: on this machine, in a real Slurm and on its nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.estimate.stage_memory import stage_memory
from hpc_rlhf.launch.doctor import cluster as cluster_checks
from hpc_rlhf.launch.doctor import fit, machine, probe, site, storage, visit, vllm
from hpc_rlhf.launch.doctor.finding import Finding
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from tests.cluster import Cluster
from tests.launch.specs import make_spec
from tests.small_disk import mounted

SHIM = Path(__file__).parents[1] / "storm/shim.c"
NO_CUDA = {
    "torch": "2.13.0+cpu", "cuda": None, "gpus": [], "bf16": True, "nccl": None,
    "deepspeed": "0.19.8", "accelerator": "cpu", "ops": {},
}  # fmt: skip


def only(findings: Sequence[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


# Here ---------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A full file system that everyone may write to."""
    with mounted(tmp_path / "disk", "64k") as place:
        (place / "run").mkdir()
        (place / "run").chmod(0o777)
        with suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield place


@pytest.mark.train
def test_five_faults_of_a_machine_are_found_with_their_fixes(tmp_path: Path, full_disk: Path) -> None:
    """A wrong package, no compiler, offline without a cache, a full disk, a folder open to everyone."""
    clash = tmp_path / "packages/click-7.0.dist-info"
    clash.mkdir(parents=True)
    (clash / "METADATA").write_text("Metadata-Version: 2.1\nName: click\nVersion: 7.0\n")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: sick\nrun_dir: {full_disk}/run\nslurm: {{gpus_per_node: 0, ranks_per_node: 1}}\n"
        "data: {sources: [{demo: 100}]}\nmodels: {actor: acme/tiny-1b}\nstages: {sft: {}}\n"
    )
    env = {
        **os.environ,
        "PATH": str(tmp_path / "nothing"),  # neither a compiler nor Slurm
        "PYTHONPATH": str(clash.parent),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "DS_PIN_MEMORY_BACKEND": "native",  # an op of DeepSpeed that must be built
    }
    command = [sys.executable, "-m", "hpc_rlhf.cli", "doctor", str(job), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    findings = [Finding(**fields) for fields in answer["findings"]]
    assert answer["errors"] == len([finding for finding in findings if finding.level == "error"])
    faults: dict[str, tuple[str, str]] = {
        "packages": ("click is 7.0, but hpc-rlhf requires >=8.1", 'pip install "click>=8.1"'),
        "compiler": ("pin_memory must be built here, but g++ and ninja are missing", "module load gcc"),
        "hub": ("model acme/tiny-1b is not in", "hpc-rlhf prefetch"),
        "mode": ("it is world-writable", "chmod o-w"),
        "disk": ("0.0 GB free", "remove old runs"),
    }
    for check, (message, fix) in faults.items():
        of_check = [each for each in findings if each.check == check and each.level == "error"]
        assert any(message in each.message and fix in each.fix for each in of_check), (check, of_check)


def test_a_stage_that_does_not_fit_its_gpus_is_found(tmp_path: Path) -> None:
    def levels(gpu: str) -> list[tuple[str, str]]:
        findings = list(fit.check(make_spec(tmp_path, {"gpu": gpu}, sft={})))
        assert all(each.check == "memory" and (each.level == "ok") == (not each.fix) for each in findings)
        return [(each.where, each.level) for each in findings]

    assert levels("a100-80g") == [("sft", "ok")]
    assert levels("1G") == [("sft", "error")]
    held = stage_memory(make_spec(tmp_path, sft={}), "sft").held
    assert levels(str(held + 1)) == [("sft", "warning")]
    assert not list(fit.check(make_spec(tmp_path, sft={})))  # the spec names no GPU


def test_checks_leave_no_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new/run")
    with storage.scratch(run) as folder:
        assert storage.check_writes(folder, run).level == "ok"
        assert storage.check_space(folder, 10).level == "ok"
        assert storage.check_space(folder, 10**18).level == "error"
    assert list(tmp_path.iterdir()) == []


def test_what_a_stage_has_written_is_not_needed_again(tmp_path: Path) -> None:
    spec, run = make_spec(tmp_path / "run", sft={}, reward={}), RunDir(tmp_path / "run")
    whole = storage.bytes_needed(spec, run, ["sft"])
    assert whole is not None
    checkpoint = run.stage("sft").checkpoints / "step-00000001"
    checkpoint.mkdir(parents=True)
    with (checkpoint / "weights").open("wb") as file:
        file.truncate(10**8)
    assert storage.bytes_needed(spec, run, ["sft"]) == whole - 10**8
    both = storage.bytes_needed(spec, run, ["sft", "reward"])
    assert (storage.bytes_needed(spec, run, ["reward"]) or 0) + whole - 10**8 == both


def test_a_parent_folder_that_everyone_may_write_to(tmp_path: Path) -> None:
    open_to_all = tmp_path / "scratch"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    finding = storage.check_trust(RunDir(open_to_all / "run"), shared=False)
    assert (finding.level, f"chmod o-w {open_to_all}" in finding.fix) == ("error", True)
    open_to_all.chmod(0o1777)
    assert storage.check_trust(RunDir(open_to_all / "run"), shared=False).level == "ok"


def test_gpus_that_torch_does_not_find() -> None:
    cpu_build = machine.check(NO_CUDA, 2, {"bf16"}, True)
    assert "would train on CPUs" in only(cpu_build, "torch").message
    no_driver = machine.check({**NO_CUDA, "cuda": "12.8"}, 2, {"bf16"}, True)
    assert "finds 0 of the 2 requested GPUs" in only(no_driver, "torch").message
    old = machine.check({**NO_CUDA, "cuda": "12.8", "gpus": ["V100"] * 2, "bf16": False}, 2, {"bf16"}, True)
    assert only(old, "precision").fix.startswith("set precision: fp16")
    assert only(machine.check(NO_CUDA, None, (), False), "torch").level == "ok"


@pytest.mark.parametrize(("precision", "supported"), [("bf16", False), ("bf16", True), ("fp32", False)])
def test_a_processor_on_which_bf16_is_slow(precision: str, supported: bool) -> None:
    findings = machine.check({**NO_CUDA, "bf16": supported}, 0, {precision}, False)
    slow = [finding.fix for finding in findings if finding.check == "precision"]
    assert slow == ["set precision: fp32 for the stages"] * (precision == "bf16" and not supported)


def test_a_sandbox_that_is_missing_or_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = [{"code": "tests", "image": str(tmp_path)}, {"format": "a"}]
    spec = make_spec(tmp_path / "run", sft={}, grpo={"rewards": [*rewards, {**rewards[0], "name": "again"}]})
    monkeypatch.setattr(machine, "examine", lambda *_: [])

    def on_node(*stages: str) -> Finding:
        return only(probe.examine(spec, stages, tmp_path, []), "sandbox")

    monkeypatch.setenv("PATH", "/nowhere")
    missing = on_node("sft", "grpo")
    assert (missing.level, "module load apptainer" in missing.fix) == ("error", True)
    assert missing.message.startswith("the reward code needs Apptainer, which is not on PATH")
    assert not [finding for finding in probe.examine(spec, ["sft"], tmp_path, []) if finding.check == "sandbox"]
    # An Apptainer that isolates nothing.
    (tmp_path / "apptainer").write_text('#!/bin/sh\nwhile [ "$1" != python3 ]; do shift; done\nexec "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    opened = on_node("grpo")
    assert opened.message == "the reward code has a sandbox that does not isolate: it shares the net namespace"
    assert "user namespaces" in opened.fix


def test_a_python_without_a_vllm_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    rollout = {"engine": "vllm", "python": str(python)}
    grpo = {"rewards": [{"exact": "answer"}], "rollout": rollout}
    spec = make_spec(tmp_path / "run", sft={}, grpo=grpo, eval={"rollout": rollout})
    monkeypatch.setattr(machine, "examine", lambda *_: [])

    def on_node(script: str, *stages: str) -> Finding:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return only(probe.examine(spec, stages, tmp_path, []), "vllm")

    broken = on_node("echo 'ImportError: libcudart.so.13' >&2; exit 1", "grpo", "eval")
    assert broken.message == f"vLLM does not load in {python}: ImportError: libcudart.so.13"
    assert "make install-vllm" in broken.fix
    assert on_node("echo 0.32.0 0", "eval").message == f"vLLM 0.32.0 in {python} finds 0 of the 2 GPUs"
    assert on_node("echo 0.32.0 2", "grpo").level == "ok"
    python.unlink()
    missing = only(probe.examine(spec, ["grpo"], tmp_path, []), "vllm")
    assert missing.message == f"{python} does not start: No such file or directory"
    files = vllm.check_files(spec)
    assert [(each.level, each.where) for each in files] == [("error", "grpo"), ("error", "eval")]
    assert not [finding for finding in probe.examine(spec, ["sft"], tmp_path, []) if finding.check == "vllm"]


def test_the_deepspeed_ops_that_a_spec_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DS_PIN_MEMORY_BACKEND", raising=False)
    offloaded = make_spec(tmp_path, sft={"zero": 3, "offload_optimizer": True})
    job = make_plan(offloaded).jobs[0]
    ours = [json.loads(text) for text in Templates().ds_configs(job).values()]
    assert machine.ops_needed(ours) == []
    nvme: dict[str, Any] = {"zero_optimization": {"offload_param": {"device": "nvme"}}}
    quantized = {"zero_optimization": {"zero_quantized_weights": True}}
    assert machine.ops_needed([nvme, quantized]) == ["async_io", "quantizer"]


# In Slurm -----------------------------------------------------------------------------------------


@pytest.fixture
def in_slurm(idle_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", str(idle_cluster.conf))
    return idle_cluster


def stages(spec: JobSpec, templates: Templates | None = None) -> list[Finding]:
    return cluster_checks.check_stages(make_plan(spec), templates or Templates())


def test_a_sound_cluster_and_settings_that_it_would_reject(in_slurm: Cluster, tmp_path: Path) -> None:
    sound = [*cluster_checks.check_settings(), *stages(make_spec(tmp_path / "run", {"partition": "low"}))]
    assert {finding.level for finding in sound} == {"ok"}, sound
    assert only(sound, "preemption").message == "low: REQUEUE, with 60 s of grace time to save"

    wrong = stages(make_spec(tmp_path, {"partition": "gppu"}))
    assert only(wrong, "partition").message == "the cluster has no partition gppu"
    assert "gpu, " in only(wrong, "partition").fix
    assert only(wrong, "partition").where == "sft, reward, ppo"
    assert only(stages(make_spec(tmp_path, {"partition": "low-now"})), "preemption").level == "warning"
    many = only(stages(make_spec(tmp_path, {"partition": "first", "nodes": 3})), "nodes")
    assert many.message == "first has 2 nodes with 2 GPUs, the stage requests 3"
    apart = {"rollout": {"engine": "vllm", "placement": {"separate": {"nodes": 2}}}}
    with_vllm = stages(make_spec(tmp_path, {"partition": "first"}, reward={}, ppo=apart))
    assert [(each.where, each.message) for each in with_vllm if each.level == "error"] == [("ppo", many.message)]
    memory = only(stages(make_spec(tmp_path, {"mem": "999G"})), "submission")
    assert (memory.level, "sbatch would reject the job" in memory.message) == ("error", True)


@pytest.mark.parametrize(("settings", "offered"), [("enable_expedited_requeue", True), ("idle_on_node_suspend", False)])
def test_expedited_requeue_is_offered_where_the_controller_allows_it(
    monkeypatch: pytest.MonkeyPatch, settings: str, offered: bool
) -> None:
    monkeypatch.setattr(site, "configuration", lambda: {"SLURM_VERSION": "25.11.7", "SlurmctldParameters": settings})
    monkeypatch.setattr(site, "check_clock", lambda: Finding("clock", "ok", ""))
    found = [each for each in cluster_checks.check_settings() if "slurm.expedite: true" in each.message]
    assert len(found) == offered


def test_a_cluster_without_requeue_and_accounting(in_slurm: Cluster, tmp_path: Path) -> None:
    settings = (
        ("AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageType=accounting_storage/none"),
        ("AccountingStoreFlags=job_comment\n", ""),
        ("ReturnToService=2", "ReturnToService=2\nJobRequeue=0\nMinJobAge=10"),
        ("PartitionName=first ", "PartitionName=first MaxTime=60 "),
    )
    (tmp_path / "templates").mkdir()
    ours = (Path(__file__).parents[2] / "templates/_options.j2").read_text()
    (tmp_path / "templates/_options.j2").write_text(re.sub("#SBATCH --requeue.*", "", ours))
    with in_slurm.changed(*settings):
        findings = cluster_checks.check_settings()
        assert "Slurm soon forgets" in only(findings, "accounting").message
        assert "slurmdbd" in only(findings, "accounting").fix
        assert "MinJobAge to 300" in only(findings, "job age").fix
        asking = only(stages(make_spec(tmp_path / "run")), "requeue")
        assert (asking.level, "JobRequeue=1" in asking.fix) == ("warning", True)
        silent = only(stages(make_spec(tmp_path / "run"), Templates(tmp_path)), "requeue")
        assert (silent.level, "#SBATCH --requeue" in silent.fix) == ("error", True)
        assert silent.message.endswith("the sentinel of an interrupted stage submits it again, under another job id")
        unhealed = make_spec(tmp_path / "run", {"heal": {"enabled": False}})
        ended = only(stages(unhealed, Templates(tmp_path)), "requeue")
        assert ended.message.endswith("the first interruption would end the chain")
        long = only(stages(make_spec(tmp_path / "run", {"partition": "first"})), "time limit")
        assert long.fix.startswith("set slurm.time to at most 01:00:00")


# On its nodes -------------------------------------------------------------------------------------


def test_a_node_without_the_shared_folder_and_one_with_a_wrong_clock(in_slurm: Cluster, short_tmp: Path) -> None:
    """node4 has another folder at the path of the run directory, and node3's Python another time."""
    shared, storm = short_tmp / "shared", short_tmp / "storm"
    shared.mkdir()
    storm.mkdir()
    (storm / "clock").write_text("600")
    library = short_tmp / "shim.so"
    compiler = shutil.which("cc")
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    hidden = f"mount -t tmpfs none {shared} && exec slurmd -D -N node4"
    in_slurm.kill_node("node4")
    in_slurm._spawn("node4", "unshare", "--mount", "bash", "-c", hidden)
    try:
        setup = [f"export LD_PRELOAD={library} STORM={storm} OMP_NUM_THREADS=1"]
        spec = make_spec(shared / "run", {"nodes": 2, "nodelist": "node[3-4]", "setup": setup}, sft={})
        messages: list[str] = []
        with storage.scratch(RunDir(shared / "run")) as folder:
            findings = visit.visit(spec, make_plan(spec), Templates(), folder, [], messages.append)
    finally:
        in_slurm.kill_node("node4")
        in_slurm.start_node("node4")
    assert any("Ctrl-C cancels it" in words for words in messages)
    on = {finding.check: finding for finding in findings}
    assert on["shared"].where == "node4"
    assert "the run directory is not shared" in on["shared"].message
    assert "file system that login and compute nodes share" in on["shared"].fix
    assert on["clock"].where == "node3"
    assert on["clock"].message == pytest.approx("600 s ahead of the controller's") or "ahead of" in on["clock"].message
    assert "chrony" in on["clock"].fix
    assert on["clock"].level == "error"
    assert on["packages"].level == "ok"
    assert "would train on CPUs" in on["torch"].message
    assert list(shared.iterdir()) == []


def test_clocks_in_sync_and_out_of_sync(in_slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(site.clock_skew()) < 1
    real = time.time
    monkeypatch.setattr(site.time, "time", lambda: real() - 30)
    skew = site.check_clock()
    assert (skew.level, skew.message.endswith("behind the controller's")) == ("warning", True)
