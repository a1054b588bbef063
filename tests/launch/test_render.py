"""What rendered scripts contain, and do when bash runs them with stubs for Slurm's commands."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf import safe_path
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import node
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates, render
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from tests.launch.specs import make_spec

SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames "*) printf 'n1\\nn2\\n' ;;
  "requeue "*) echo "$*" >"$STUB_OUT/requeue" ;;
  "update "*) shift; echo "$*" >>"$STUB_OUT/updates" ;;
  "--oneliner show job 4711") echo "$STUB_JOB" ;;
  "--oneliner show node n1") echo "NodeName=n1 Arch=x NodeAddr=127.0.0.9 NodeHostName=n1" ;;
  *) exit 9 ;;
esac
"""
# Writes its arguments, one a line, and what the ranks would find in their environment. vLLM's agents are no ranks.
SRUN = """#!/bin/bash
if [[ "$*" == *vllm.agent* ]]; then
  { printf '%s\\n' "$@"; env; } >"$STUB_OUT/agents"
  exit
fi
printf '%s\\n' "$@" >"$STUB_OUT/args"
env >"$STUB_OUT/env"
[ -z "$STUB_TOUCH" ] || touch "$STUB_TOUCH"
exit "${STUB_EXIT:-0}"
"""
SQUEUE = """#!/bin/bash
[ "$*" = "--me --noheader --states=PENDING --format=%i %E" ] && printf '%s' "$STUB_QUEUE"
"""
# Each of these would leave a file behind if a shell acted on it.
HOSTILE = ["$(touch x)", "`touch x`", "; touch x", "a'; touch x; '", 'a"; touch x; "', "&& touch x #", "ü ñ 模"]


def run_script(spec: JobSpec, stage: str, tmp_path: Path, **environ: str) -> tuple[int, Path, str]:
    """Run a rendered script under bash in an empty folder, which must stay empty."""
    run = RunDir(Path(spec.run_dir))
    run.stage(stage).logs.mkdir(parents=True, exist_ok=True)
    render(make_plan(spec), run.scripts)
    stubs, out, cwd = tmp_path / "stubs", tmp_path / "out", tmp_path / "cwd"
    for folder in (stubs, out, cwd):
        folder.mkdir(exist_ok=True)
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "squeue": SQUEUE}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "STUB_OUT": str(out)}
    path = f"{stubs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(run.sbatch(stage))],
        cwd=cwd,
        env={"PATH": path, "HOME": str(tmp_path), **slurm, **environ},
        capture_output=True,
        text=True,
    )
    assert list(cwd.iterdir()) == []
    return done.returncode, out, done.stderr


def options(spec: JobSpec, stage: str = "sft") -> list[str]:
    plan = make_plan(spec)
    job = next(job for job in plan.jobs if job.stage == stage)
    script = Templates().script(plan, job, "true")
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_every_slurm_setting_becomes_an_option() -> None:
    slurm: dict[str, Any] = {
        "partition": "gpu", "account": "nlp", "qos": "high", "time": "1-00:00:00", "nodes": 2, "gpus_per_node": 4,
        "cpus_per_gpu": 12, "mem": "900G", "constraint": "a100&nvlink", "exclude": "n[1-3]", "nodelist": "n9",
        "reservation": "r", "exclusive": True, "licenses": "x:1", "mail_type": "END", "mail_user": "me@x.org",
        "comment": "it's mine", "signal_seconds": 240, "extra": {"switches": "1", "spread-job": True, "nice": False},
    }  # fmt: skip
    assert options(make_spec("/scratch/my runs", slurm)) == [
        "--job-name=demo.sft",
        '--comment="it\'s mine"',
        "--partition=gpu",
        "--account=nlp",
        "--qos=high",
        "--reservation=r",
        "--time=1-00:00:00",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=12",
        "--mem=900G",
        '--constraint="a100&nvlink"',
        '--exclude="n[1-3]"',
        "--nodelist=n9",
        "--licenses=x:1",
        "--mail-type=END",
        "--mail-user=me@x.org",
        "--exclusive",
        "--switches=1",
        "--spread-job",
        "--signal=USR2@240",
        "--requeue",
        "--open-mode=append",
        '--chdir="/scratch/my runs"',
        '--output="/scratch/my runs/stages/sft/logs/%j_batch.log"',
    ]


def test_gres_replaces_gpus_and_cpu_jobs_request_none() -> None:
    with_gres = options(make_spec("/scratch/demo", {"gres": "gpu:a100:2"}))
    assert "--gres=gpu:a100:2" in with_gres
    assert not any("--gpus" in option for option in with_gres)
    without = options(make_spec("/scratch/demo", {"gpus_per_node": 0, "ranks_per_node": 3}))
    assert "--ntasks-per-node=3" in without
    assert not any("gpu" in option or "gres" in option for option in without)


def test_without_sentinels_the_jobs_send_the_mails() -> None:
    fields = make_spec("/scratch/demo", {"heal": {"enabled": False}}).model_dump(exclude_unset=True)
    spec = JobSpec.model_validate({**fields, "notify": {"mail": "me@x.org"}})
    assert "--mail-type=FAIL" in options(spec, "sft")
    assert "--mail-type=END,FAIL" in options(spec, "ppo")


def test_the_script_sets_the_rendezvous_and_exits_with_sruns_code(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "my run's", {"nodes": 2, "cpus_per_gpu": 3})
    code, out, _ = run_script(spec, "sft", tmp_path, STUB_EXIT="7", SLURM_RESTART_COUNT="2")
    assert code == 7
    stage = RunDir(Path(spec.run_dir)).stage("sft")
    assert stage.hostfile.read_text() == "n1 slots=2\nn2 slots=2\n"
    environ = dict(line.split("=", 1) for line in (out / "env").read_text().splitlines() if "=" in line)
    assert environ["MASTER_ADDR"] == "127.0.0.9"
    assert 20000 <= int(environ["MASTER_PORT"]) < 30000
    assert (environ["SRUN_CPUS_PER_TASK"], environ["OMP_NUM_THREADS"]) == ("3", "3")
    assert environ["SUBMITIT_EXECUTOR"] == "slurm"
    args = (out / "args").read_text().splitlines()
    assert f"--output={stage.logs}/%j_%t_log.out" in args
    assert {"--kill-on-bad-exit=1", "--wait=60", "--open-mode=append"} <= set(args)
    assert args[-5:] == [*safe_path.THIS_PYTHON, "hpc_rlhf.rank", str(stage.logs)]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_another_launcher_is_one_task_per_node_with_all_of_its_resources(tmp_path: Path, launcher: str) -> None:
    slurm = {"nodes": 2, "cpus_per_gpu": 3, "launcher": launcher}
    spec = make_spec(tmp_path / "my run's", slurm)
    code, out, _ = run_script(spec, "sft", tmp_path, STUB_EXIT="7")
    assert code == 7
    args = (out / "args").read_text().splitlines()
    assert {"--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(args)
    assert args[-5:] == ["-m", "hpc_rlhf.launch.node", spec.run_dir, "sft", launcher]
    environ = dict(line.split("=", 1) for line in (out / "env").read_text().splitlines() if "=" in line)
    assert (environ["SRUN_CPUS_PER_TASK"], environ["OMP_NUM_THREADS"]) == ("6", "3")
    assert "--ntasks-per-node=2" in options(spec)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_vllms_own_nodes_are_the_last_and_have_a_step_of_their_own(tmp_path: Path, launcher: str) -> None:
    slurm = {"nodes": 1, "gpus_per_node": 4, "cpus_per_gpu": 3, "launcher": launcher}
    rollout = {"engine": "vllm", "tensor_parallel": 2, "placement": {"separate": {"nodes": 1}}}
    spec = make_spec(tmp_path / "my run's", slurm, reward={}, ppo={"rollout": rollout})
    assert "--nodes=2" in options(spec, "ppo")
    assert run_script(spec, "ppo", tmp_path, SLURM_TRES_PER_TASK="cpu=3")[0] == 0
    out, run = tmp_path / "out", RunDir(Path(spec.run_dir))
    while not (out / "agents").exists() or "SRUN_CPUS" not in (out / "agents").read_text():
        time.sleep(0.1)
    agents = (out / "agents").read_text().splitlines()
    assert {"--nodes=1", "--relative=1", "--ntasks=2", "--ntasks-per-node=2", "SRUN_CPUS_PER_TASK=6"} <= set(agents)
    assert not any(line.startswith("SLURM_TRES_PER_TASK") for line in agents)
    assert {"hpc_rlhf.train.rollout.vllm.agent", str(run.stage("ppo").engine)} <= set(agents)
    ranks = 4 if launcher == "srun" else 1
    args = (out / "args").read_text().splitlines()
    assert {"--nodes=1", "--relative=0", f"--ntasks={ranks}"} <= set(args)
    assert run.stage("ppo").hostfile.read_text() == "n1 slots=4\n"
    assert "MASTER_ADDR=127.0.0.9" in (out / "env").read_text().splitlines(), "other nodes reach it"
    assert "--nodes=1" in options(spec, "reward")


def test_a_launcher_takes_its_rank_from_the_hostfile_and_gpus_from_slurm(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stage("sft").path.mkdir(parents=True)
    run.stage("sft").hostfile.write_text("n1 slots=2\nn2 slots=2\n")
    env = {"SLURMD_NODENAME": "n2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20000"}
    torchrun = node.command(run, "sft", "torchrun", env)
    where = {"--nnodes=2", "--nproc-per-node=2", "--node-rank=1"}
    assert where | {"--master-addr=10.0.0.1", "--master-port=20000"} <= set(torchrun)
    for visible, gpus in {"": [0, 1], "6,7": ["6", "7"], "6,7,8": [0, 1]}.items():
        deepspeed = node.command(run, "sft", "deepspeed", {**env, "CUDA_VISIBLE_DEVICES": visible})
        world = next(word.partition("=")[2] for word in deepspeed if word.startswith("--world_info="))
        assert json.loads(base64.urlsafe_b64decode(world)) == {"n1": [0, 1], "n2": gpus}
        assert "--node_rank=1" in deepspeed
    for words in (torchrun, deepspeed):
        assert words[-7:] == safe_path.module("hpc_rlhf.task", str(tmp_path), "sft")


def test_the_port_cannot_be_guessed(tmp_path: Path) -> None:
    spec, ports = make_spec(tmp_path / "run"), set()
    for _ in range(3):
        _, out, _ = run_script(spec, "sft", tmp_path, SLURM_JOB_ID="5000", SLURM_RESTART_COUNT="0")
        ports.update(line for line in (out / "env").read_text().splitlines() if "MASTER_PORT" in line)
    assert len(ports) > 1
    assert all(20000 <= int(port.partition("=")[2]) < 30000 for port in ports)


def test_a_port_in_use_is_skipped(tmp_path: Path) -> None:
    taken = 20000 + 5007 * 101 % 10000  # no job of the tests' own cluster comes that far
    (tmp_path / "not random").write_text(f"unset RANDOM; RANDOM={taken - 20000}")
    with socket.create_server(("", taken)):
        _, out, _ = run_script(make_spec(tmp_path / "run"), "sft", tmp_path, BASH_ENV=str(tmp_path / "not random"))
    assert f"MASTER_PORT={taken + 1}" in (out / "env").read_text().splitlines()


def test_ranks_of_one_node_meet_at_its_loopback_address(tmp_path: Path) -> None:
    _, out, _ = run_script(make_spec(tmp_path / "run"), "sft", tmp_path)
    assert "MASTER_ADDR=127.0.0.1" in (out / "env").read_text().splitlines()


def test_variables_of_other_jobs_do_not_reach_srun(tmp_path: Path) -> None:
    leaked = {"SBATCH_PARTITION": "x", "SLURM_CPU_BIND_TYPE": "x", "SLURM_STEP_ID": "3"}
    _, out, _ = run_script(make_spec(tmp_path / "run"), "sft", tmp_path, **leaked)
    names = {line.partition("=")[0] for line in (out / "env").read_text().splitlines()}
    assert names.isdisjoint(leaked)
    assert {"SLURM_JOB_ID", "SLURM_JOB_NODELIST"} <= names


def test_each_attempt_is_marked_in_the_logs(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "my run")
    logs = RunDir(Path(spec.run_dir)).stage("sft").logs
    logs.mkdir(parents=True)
    for name in ("4711_0_log.err", "4711_1_log.err", "471_0_log.err"):
        (logs / name).write_text("cut off")
    run_script(spec, "sft", tmp_path, SLURM_RESTART_COUNT="2")
    for name in ("4711_0_log.err", "4711_1_log.err"):
        assert (logs / name).read_text() == "cut off\nhpc-rlhf: attempt 2 of job 4711 on n[1-2]\n"
    assert (logs / "471_0_log.err").read_text() == "cut off"
    assert len(list(logs.glob("*_log.*"))) == 3


def test_setup_may_use_unset_variables_and_its_failure_ends_the_job(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", {"setup": ["export SEEN=a$NOT_SET", "false || true"]})
    code, out, _ = run_script(spec, "sft", tmp_path)
    assert code == 0
    assert "SEEN=a\n" in (out / "env").read_text()
    spec = make_spec(tmp_path / "other", {"setup": ["export A=1", "ls /no/such/folder", "export B=2"]})
    (out / "args").unlink()
    code, out, stderr = run_script(spec, "sft", tmp_path)
    assert code == 2
    assert "setup failed at: ls /no/such/folder" in stderr
    spec = make_spec(tmp_path / "other", {"setup": ["export HF_TOKEN=hf_abc; HF_TOKEN='hf abc' ls /no/such/folder"]})
    _, _, stderr = run_script(spec, "sft", tmp_path)
    assert "setup failed at: HF_TOKEN=***" in stderr
    assert "abc" not in stderr
    assert not (out / "args").exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str, tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path / f"run {text}",
        {
            "comment": text,
            "container": {"runtime": "apptainer", "image": f"/img/{text}.sif", "mounts": [f"/data/{text}"]},
        },
    )
    code, out, stderr = run_script(spec, "sft", tmp_path)
    assert (code, stderr) == (0, "")
    args = (out / "args").read_text().splitlines()
    assert args[args.index("apptainer") :] == [
        *("apptainer", "exec", "--nv", "--bind", spec.run_dir, "--bind", f"/data/{text}", f"/img/{text}.sif"),
        *("python3", *safe_path.ANY_PYTHON, "hpc_rlhf.rank", f"{spec.run_dir}/stages/sft/logs"),
    ]


def test_pyxis_mounts_the_run_directory(tmp_path: Path) -> None:
    container = {"runtime": "pyxis", "image": "nvcr.io#x", "mounts": ["/data:/data:ro"]}
    spec = make_spec(tmp_path / "run", {"container": container})
    _, out, _ = run_script(spec, "sft", tmp_path)
    args = (out / "args").read_text().splitlines()
    assert "--container-image=nvcr.io#x" in args
    assert f"--container-mounts={spec.run_dir}:{spec.run_dir},/data:/data:ro" in args
    assert "python3" in args


def test_the_script_requeues_a_stage_on_request_from_its_container(tmp_path: Path) -> None:
    container = {"runtime": "apptainer", "image": "/img/x.sif"}
    spec = make_spec(tmp_path / "my run", {"container": container})
    request = RunDir(Path(spec.run_dir)).stage("sft").requeue_request
    request.parent.mkdir(parents=True)
    request.touch()  # left by an attempt that was killed before its script saw it
    code, out, _ = run_script(spec, "sft", tmp_path, STUB_EXIT="1")
    assert code == 1
    assert not (out / "requeue").exists()
    code, out, _ = run_script(spec, "sft", tmp_path, STUB_EXIT="75", STUB_TOUCH=str(request))
    assert code == 75
    assert (out / "requeue").read_text() == "requeue 4711\n"
    assert not request.exists()


@pytest.mark.parametrize(
    ("code", "state", "preempted", "restarts", "requeued"),
    [
        ("143", "RUNNING", "2026-01-02T12:00:00", "0", True),
        ("1", "RUNNING", "2026-01-02T12:00:00", "0", False),  # a failure stays one
        ("143", "RUNNING", "None", "0", False),  # srun stopped the others when one rank failed
        ("143", "RUNNING", "2026-01-02T11:59:59", "0", False),  # an earlier attempt was preempted
        ("143", "CANCELLED", "2026-01-02T12:00:00", "0", False),
        ("143", "RUNNING", "2026-01-02T12:00:00", "3", False),  # all that max_requeues allows
    ],
)
def test_the_script_requeues_a_job_whose_ranks_a_preemption_killed(
    code: str, state: str, preempted: str, restarts: str, requeued: bool, tmp_path: Path
) -> None:
    shown = f"JobId=4711 JobState={state} StartTime=2026-01-02T12:00:00 PreemptTime={preempted} "
    spec = make_spec(tmp_path / "run", {"max_requeues": 3})
    environ = {"STUB_EXIT": code, "STUB_JOB": shown, "SLURM_RESTART_COUNT": restarts}
    exit_code, out, stderr = run_script(spec, "sft", tmp_path, **environ)
    assert exit_code == int(code)
    assert (out / "requeue").exists() is requeued
    assert ("requeued" in stderr) is requeued


QUEUE = """5 afterok:4711(unfulfilled),afterok:12(unfulfilled)
6 afterok:12(unfulfilled),afterok:4711(failed),afterany:47112(unfulfilled)
7 afterok:4711(unfulfilled)
8 afternotok:4711(unfulfilled)
9 afterok:47112(unfulfilled)
10 (null)
"""
FREED = ["5 afterok:12", "6 afterok:12,afterany:47112", "7 "]


@pytest.mark.parametrize(
    ("code", "done", "preempted", "restarts", "freed", "ends"),
    [
        ("0", True, "None", "1", True, True),  # it requeued itself earlier, and may still be marked as preempted
        ("0", True, "2026-01-02T12:00:00", "0", True, True),  # it is preempted now
        ("0", True, "None", "0", False, False),
        ("0", False, "None", "1", False, False),  # a launcher that was killed
        ("2", False, "None", "1", False, True),  # a user's mistake
        ("1", False, "None", "1", False, False),  # healing may try again
    ],
)
def test_the_script_of_a_job_that_slurm_may_call_preempted_frees_its_dependents(
    code: str, done: bool, preempted: str, restarts: str, freed: bool, ends: bool, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "run")
    if done:
        model = RunDir(Path(spec.run_dir)).stage("sft").model
        model.mkdir(parents=True)
        manifest.write(model, {"step": 1})
    shown = f"JobId=4711 JobState=RUNNING StartTime=2026-01-02T12:00:00 PreemptTime={preempted} "
    environ = {"STUB_EXIT": code, "STUB_JOB": shown, "STUB_QUEUE": QUEUE, "SLURM_RESTART_COUNT": restarts}
    exit_code, out, stderr = run_script(spec, "sft", tmp_path, **environ)
    assert exit_code == int(code)
    updates = (out / "updates").read_text().splitlines() if (out / "updates").exists() else []
    expected = [f"JobId={' Dependency='.join(each.split(' '))}" for each in FREED] if freed else []
    assert updates == expected + ["JobId=4711 Requeue=0"] * ends
    assert stderr == ("" if code == "0" else f"hpc-rlhf: ended with exit code {code}\n")


def test_a_users_template_replaces_the_one_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/hostfile.j2").write_text("@NODE@ slots={{ slurm.tasks_per_node }} # mine\n")
    files = {path.name: path for path in render(make_plan(make_spec("/scratch/demo")), tmp_path / "out", tmp_path)}
    assert files["sft.hostfile.in"].read_text() == "@NODE@ slots=2 # mine\n"
    assert files["sft.sbatch"].read_text().startswith("#!/bin/bash\n")
    assert len(files) == 15


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("\n{{ no_such }}", "ds_config.json.j2:2: .*'no_such' is undefined"),
        ("\n{{ 1 // 0 }}", "ds_config.json.j2:2: .*by zero"),
        ("{{ 1 + 'x' }}", "ds_config.json.j2:1: .*unsupported operand"),
        ("{% for n in range(10 ** 9) %}{% endfor %}", "ds_config.json.j2:1: .*Range too big"),
        ("{% include 'none.j2' %}", "none.j2"),
        ("{% if %}", "ds_config.json.j2:1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{not json", "ds_config.json.j2: the DeepSpeed config of sft is not JSON"),
    ],
)
def test_broken_template_is_one_clear_error(template: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/ds_config.json.j2").write_text(template)
    with pytest.raises(HpcRlhfError, match=expected):
        render(make_plan(make_spec("/scratch/demo")), tmp_path / "out", tmp_path)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "template",
    [
        '{{ (run.path / "NEW").write_text("x") }}',
        '{{ run.path.joinpath("NEW").touch() }}',
        '{{ [run.path / "NEW"] | map(attribute="touch") | first }}',
        '{{ run.stage("sft").logs.mkdir(parents=true) }}',
        '{{ (run.path / "/etc/passwd").read_text() }}',
        '{{ slurm.parse_file("/etc/passwd") }}',
        '{{ slurm.parse_raw("x", content_type="application/pickle", allow_pickle=true) }}',
    ],
)
def test_a_template_reads_and_writes_no_files(template: str, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/sentinel.sbatch.j2").write_text(template.replace("NEW", str(tmp_path / "new")))
    spec = make_spec(tmp_path / "run")
    with pytest.raises(HpcRlhfError, match="unsafe"):
        render(make_plan(spec), tmp_path / "out", tmp_path)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "run").exists()


def test_a_template_may_name_other_paths(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/sentinel.sbatch.j2").write_text('{{ run.path.parent / "x" }} {{ run.job_yaml.name }}')
    render(make_plan(make_spec(tmp_path / "run")), tmp_path / "out", tmp_path)
    assert (tmp_path / "out/sft.sentinel.sbatch").read_text() == f"{tmp_path}/x job.yaml"


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8, expected 4"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 3, expected 2"),
        ({"train_batch_size": 8}, "train_batch_size is 8, expected 16"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps is missing, expected 2"),
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu is missing, expected 4"),
        ({"train_batch_size": 16, "gradient_accumulation_steps": None}, None),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": None}, None),
        ({}, None),
    ],
)
def test_a_template_whose_batch_differs_from_the_spec_is_refused(
    batch: dict[str, int | None], expected: str | None, tmp_path: Path
) -> None:
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, **batch}
    template = tmp_path / "templates/ds_config.json.j2"
    template.parent.mkdir()
    template.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    plan = make_plan(make_spec("/scratch/demo", sft={"micro_batch": 4, "global_batch": 16}))
    if expected is None:
        render(plan, tmp_path / "out", tmp_path)
        return
    with pytest.raises(HpcRlhfError, match=f"{template}: .*sft.*{expected}") as caught:
        render(plan, tmp_path / "out", tmp_path)
    assert caught.value.exit_code == 2


def test_a_program_of_setup_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    """Ranks, and what they start, may not."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/beside.py").touch()
    (tmp_path / "tools/x.py").write_text("import beside\n")
    spec = make_spec(tmp_path / "run", {"setup": [f"{sys.executable} {tmp_path}/tools/x.py"]})
    code, out, stderr = run_script(spec, "sft", tmp_path, PYTHONSAFEPATH="1")
    assert code == 0, stderr
    assert "PYTHONSAFEPATH=1\n" in (out / "env").read_text()
    plan, templates = make_plan(spec), Templates()
    job = plan.jobs[0]
    for script in (
        templates.sentinel(plan, job),
        templates.serve(plan, job, "true"),
        templates.doctor(plan, job, tmp_path, "true", 3),
    ):
        assert re.search(r"unset PYTHONSAFEPATH.*\n.*/tools/x.py\nexport PYTHONSAFEPATH=1\n", script)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_sentinel_heals_its_run_with_any_name_and_setup(hostile: str, tmp_path: Path) -> None:
    """Setup lines that fail on a small node do not prevent it."""
    heal = {
        "partition": "cpu",
        "mem": "1G",
        "setup": ["false", "export HEALING=1", "cd $UNSET/nowhere"],
        "extra": {"nice": 5},
    }
    slurm = {
        "partition": "gpu",
        "account": "nlp",
        "reservation": "r1",
        "exclude": "n7",
        "setup": ["exit 3"],
        "heal": heal,
    }
    spec = make_spec(tmp_path / f"run {hostile}".replace("/", ""), slurm)
    run = RunDir(Path(spec.run_dir))
    render(make_plan(spec), run.scripts)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$HEALING" "${{SBATCH_X-unset}}" "$@" >{tmp_path}/args\numask >>{tmp_path}/args\n'
    )
    python.chmod(0o755)
    script = run.sentinel("sft").read_text()
    for line in (
        "partition=cpu",
        "account=nlp",
        "reservation=r1",
        "exclude=n7",
        "mem=1G",
        "nice=5",
        "job-name=demo.sft.sentinel",
    ):
        assert f"\n#SBATCH --{line}\n" in script
    assert "exit 3" not in script
    (tmp_path / "cwd").mkdir()
    here = tmp_path / "script.sh"
    here.write_text(script.replace(sys.executable, str(python)))
    subprocess.run(
        ["bash", here], cwd=tmp_path / "cwd", env={**os.environ, "SBATCH_X": "1"}, check=True, stderr=subprocess.DEVNULL
    )
    arguments = (tmp_path / "args").read_text().splitlines()
    heal = [*safe_path.THIS_PYTHON, "hpc_rlhf.cli", "heal", "--sentinel", str(run.path)]
    assert arguments == ["1", "unset", *heal, "0077"]
    assert not list((tmp_path / "cwd").iterdir())
