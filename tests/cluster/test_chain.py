"""The whole chain on a real Slurm: it produces a model that answers, survives preemption and time limits, is
submitted only once, and refuses to train on an incomplete input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpc_rlhf.run import manifest
from tests.cluster import Cluster, config, wait_until
from tests.cluster.chain import Chain
from tests.cluster.cluster import CHECKOUT, SUCCEEDED, SYSTEM_PATH
from tests.cluster.processes import Process, find

STAGES = ("sft", "reward", "ppo")
CHAIN = CHECKOUT / "tests/cluster/jobs/chain.yaml"
# Secrets of a login shell, which jobs get in their environment.
SECRETS = {"HF_TOKEN": "hf_0s3cr3t0ofthehub", "WANDB_API_KEY": "0s3cr3t0ofthetracker"}
NewChain = Callable[..., Chain]
SHORT_SFT = ("stages.reward=null", "stages.ppo=null", "stages.sft.max_steps=3")
# Makes Python itself start slowly in a job's first attempt.
SLOW_START = """
import os, time
if "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    open("{started}-" + os.environ["SLURM_PROCID"], "w").close()
    time.sleep(60)
"""

# Makes the watchdog impatient once a file appears beside this one.
IMPATIENT = """
import os, pathlib, sys, threading, time

def make_impatient():
    while not pathlib.Path(__file__).with_name("impatient").exists():
        time.sleep(0.1)
    watch = sys.modules["hpc_rlhf.train.runtime.watchdog"]
    watch.MIN_HANG, watch.HANG_FACTOR = 4.0, 2.0

if "SLURM_PROCID" in os.environ:
    threading.Thread(target=make_impatient, daemon=True).start()
"""

# Slows down the steps of a job's first attempt, on a fast machine too.
SLOW_STEPS = """
import os, sys, threading, time

def slow_down():
    while not hasattr(sys.modules.get("hpc_rlhf.train.checkpoint.checkpointer"), "Checkpointer"):
        time.sleep(0.01)
    checkpointer = sys.modules["hpc_rlhf.train.checkpoint.checkpointer"].Checkpointer
    safe_point = checkpointer.safe_point
    checkpointer.safe_point = lambda *args: (time.sleep(0.5), safe_point(*args))[1]

if "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    threading.Thread(target=slow_down, daemon=True).start()
"""
# Pretends, in the first attempt, that the script started so long ago that 60 of the job's 600 seconds are left.
LATE = "[ -n \"$SLURM_RESTART_COUNT\" ] || export HPC_RLHF_SCRIPT_BEGAN=$(awk '{print $1 - 540}' /proc/uptime)"


@pytest.fixture
def new_chain(idle_cluster: Cluster, tmp_path: Path) -> NewChain:
    """Makes a test's chain; its jobs are removed from the cluster after the test."""
    return lambda *sets, spec=CHAIN: Chain(idle_cluster, spec, tmp_path / "run", sets)


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The demo on a cluster, with four ranks on two nodes and fewer steps, run to its end."""
    limits = [f"stages.{stage}.max_steps={steps}" for stage, steps in zip(STAGES, (20, 10, 3), strict=True)]
    setup = 'slurm.setup=["export OMP_NUM_THREADS=1"]'
    run = tmp_path_factory.mktemp("chain") / "run"
    one_rank = "stages.eval.slurm={nodes: 1, gpus_per_node: 1}"
    # Tests damage it afterwards, and it must not repair itself then.
    sets = ("slurm.nodes=2", "slurm.heal.enabled=false", setup, one_rank, *limits)
    chain = Chain(cluster, CHECKOUT / "jobs/tiny.yaml", run, sets)
    chain.submit(env={**cluster.env, **SECRETS})
    for stage in (*STAGES, "eval"):
        chain.wait_done(stage)
    cluster.wait_state(chain.job_id("eval"), "COMPLETED")
    return chain


def test_sft_and_reward_run_in_parallel_and_ppo_after_both(finished: Chain) -> None:
    def spans() -> dict[str, tuple[str, str]]:
        jobs = ",".join(finished.job_id(stage) for stage in STAGES)
        rows = finished.cluster.run("sacct", "-n", "-X", "-P", "-j", jobs, "-o", "JobName,Start,End,State")
        split = [row.split("|") for row in rows.stdout.splitlines()]
        return {name.split(".")[-1]: (start, end) for name, start, end, state in split if state == "COMPLETED"}

    wait_until(lambda: set(spans()) == set(STAGES), 120, "sacct has all three stages as COMPLETED")
    times = spans()
    assert times["sft"][0] < times["reward"][1]
    assert times["reward"][0] < times["sft"][1]
    assert times["ppo"][0] >= max(times["sft"][1], times["reward"][1])


@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks_over_two_nodes(finished: Chain, stage: str) -> None:
    lines = finished.run.stage(stage).hostfile.read_text().splitlines()
    hosts = [line.split() for line in lines if line and not line.startswith("#")]
    assert [slots for _, slots in hosts] == ["slots=2", "slots=2"]
    assert len({host for host, _ in hosts}) == 2
    assert finished.events("started", stage)[-1].ranks == 4


def test_secrets_of_the_environment_are_neither_in_the_run_nor_in_slurms_records(finished: Chain) -> None:
    files = [path for path in finished.run.path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pkl" for path in files)
    assert not [path for path in files if any(s.encode() in path.read_bytes() for s in SECRETS.values())]
    jobs = ",".join(finished.job_id(stage) for stage in STAGES)
    records = finished.cluster.run("sacct", "-P", "-j", jobs, "-o", "ALL").stdout
    records += finished.cluster.run("scontrol", "show", "job").stdout
    assert finished.job_id("ppo") in records
    assert not any(secret in records for secret in SECRETS.values())


def test_the_final_model_loads_and_generates(finished: Chain) -> None:
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = tokenizer('What is the capital of France?', return_tensors='pt')\n"
        "made = model.generate(**tokens, max_new_tokens=8, min_new_tokens=8)\n"
        "print(made.shape[1] - tokens.input_ids.shape[1])"
    )
    command = [sys.executable, "-c", code, str(finished.run.stage("ppo").model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["8"], done.stderr


def test_a_finished_run_is_not_submitted_again(finished: Chain) -> None:
    assert {stage: facts["state"] for stage, facts in finished.status().items()} == dict.fromkeys(
        (*STAGES, "eval"), "done"
    )
    before = finished.run.ledger.read_text()
    done = finished.submit()
    assert "already done" in done.stdout
    assert "the run is finished; nothing was submitted" in done.stderr
    assert done.stderr.splitlines()[-2:] == [f"  hpc-rlhf {verb} {finished.path}" for verb in ("report", "chat")]
    assert finished.run.ledger.read_text() == before


def test_the_logs_show_progress_and_nothing_of_other_libraries(finished: Chain) -> None:
    for stage, words in (
        ("sft", ("sft: step 20/20, loss ",)),
        ("reward", ("reward: step 10/10, loss ", "reward: finished, after ")),
        ("ppo", ("loading data and models", "ppo: step 1/3, reward ", "s left")),
        ("eval", ("eval: model 1/", "sft_perplexity ")),
    ):
        log = finished.cli("logs", finished.path, stage, "--follow").stdout
        assert all(each in log for each in words), log
        assert not any(noise in log for noise in ("submitit", "LOAD REPORT", "[INFO]")), log


def preempt_in(chain: Chain, stage: str) -> None:
    """Preempt a stage after some steps, and wait until it is done."""
    chain.wait_step(stage, 5)
    preempt_all(chain.cluster)
    assert chain.events("requeued", stage)[-1].reason == "preempted"
    chain.wait_done(stage)
    assert_resumed(chain, stage)


def test_a_preempted_stage_resumes_where_its_job_would_be_cancelled(new_chain: NewChain) -> None:
    chain = new_chain("slurm.partition=low-cancel", "stages.reward=null", "stages.ppo=null")
    chain.submit()
    preempt_in(chain, "sft")


def test_a_preempted_chain_resumes_and_finishes(new_chain: NewChain) -> None:
    """During SFT and during PPO, where preemption requeues a job."""
    chain = new_chain("slurm.partition=low")
    chain.submit()
    for stage in ("sft", "ppo"):
        preempt_in(chain, stage)
    chain.wait_done("reward")
    # PPO began with both of its inputs complete.
    ends = [chain.events("finished", stage)[-1].time for stage in ("sft", "reward")]
    assert chain.events("started", "ppo")[0].time > max(ends)


def test_a_stage_preempted_before_its_ranks_handle_signals_is_requeued(new_chain: NewChain, tmp_path: Path) -> None:
    """The signal arrives while Python starts, as on a slow file system: it kills the ranks, but not the
    chain."""
    slow = tmp_path / "slow/sitecustomize.py"
    slow.parent.mkdir()
    slow.write_text(SLOW_START.format(started=tmp_path / "started"))
    chain = new_chain("slurm.partition=low", *SHORT_SFT, f'slurm.setup=["export PYTHONPATH={slow.parent}"]')
    chain.submit()
    wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 2, 120, "both ranks have started")
    preempt_all(chain.cluster)
    chain.wait_done("sft")
    job = chain.job_id("sft")
    chain.cluster.wait_state(job, SUCCEEDED, timeout=60)
    assert chain.cluster.field(job, "Restarts") == "1"
    assert "preempted before the ranks were up" in (chain.run.stage("sft").logs / f"{job}_batch.log").read_text()


def test_a_stage_preempted_before_it_has_ranks_is_requeued(new_chain: NewChain) -> None:
    """No rank gets the signal; where preemption cancels, the job would be killed after its grace time."""
    preempted = "scontrol show job $SLURM_JOB_ID | grep -q PreemptTime=2"
    wait = f"until [[ -n ${{SLURM_RESTART_COUNT:-}} ]] || {preempted}; do sleep 0.1; done"
    chain = new_chain("slurm.partition=low-cancel", *SHORT_SFT, f"slurm.setup={json.dumps([wait])}")
    chain.submit()
    job = chain.job_id("sft")
    chain.cluster.wait_state(job, "RUNNING", timeout=60)
    preempt_all(chain.cluster)
    chain.wait_done("sft")
    chain.cluster.wait_state(job, SUCCEEDED, timeout=60)
    assert [event.reason for event in chain.events("requeued", "sft")] == ["preempted"]


def slow_steps(tmp_path: Path, *setup: str) -> tuple[str, ...]:
    """Settings for an SFT alone whose first attempt would take two minutes."""
    site = tmp_path / "site/sitecustomize.py"
    site.parent.mkdir()
    site.write_text(SLOW_STEPS)
    setup = ("export OMP_NUM_THREADS=1", f"export PYTHONPATH={site.parent}", *setup)
    return ("stages.reward=null", "stages.ppo=null", "stages.sft.max_steps=200", f"slurm.setup={json.dumps(setup)}")


def test_a_stage_at_its_time_limit_resumes(new_chain: NewChain, tmp_path: Path) -> None:
    chain = new_chain(*slow_steps(tmp_path))
    chain.submit()
    job = chain.job_id("sft")
    chain.wait_step("sft", 5)
    # The limit falls into the middle of the stage, however long the ranks took to start.
    chain.cluster.run("scontrol", "update", f"job={job}", "TimeLimit=1")
    assert chain.wait_event("requeued", "sft").reason == "time limit"
    chain.cluster.run("scontrol", "update", f"job={job}", "TimeLimit=10")
    chain.wait_done("sft")
    assert_resumed(chain, "sft")


def test_a_stage_without_a_signal_stops_in_time(new_chain: NewChain, tmp_path: Path) -> None:
    """Slurm's signal would come minutes too late."""
    chain = new_chain(*slow_steps(tmp_path, LATE))
    chain.submit()
    assert chain.wait_event("requeued", "sft").reason == "time limit"
    chain.wait_done("sft")
    assert_resumed(chain, "sft")


def test_a_stage_that_hangs_is_killed_and_retried(new_chain: NewChain, tmp_path: Path) -> None:
    """One rank hangs in the first attempt."""
    site = tmp_path / "site/sitecustomize.py"
    site.parent.mkdir()
    site.write_text(IMPATIENT)
    setup = json.dumps(["export OMP_NUM_THREADS=1", f"export PYTHONPATH={site.parent}"])
    alone = ("stages.reward=null", "stages.ppo=null", "stages.sft.checkpoint_every=5", "stages.sft.max_steps=200")
    chain = new_chain(*alone, f"slurm.setup={setup}")
    chain.submit()
    chain.wait_step("sft", 10)
    os.kill(a_rank(chain.job_id("sft")), signal.SIGSTOP)
    impatient = site.with_name("impatient")
    impatient.touch()
    chain.wait_event("hang", "sft")
    impatient.unlink()
    assert chain.wait_event("ended", "sft").reason == "hang"
    chain.wait_done("sft")
    assert [event.step >= 5 for event in chain.events("resumed", "sft")] == [True]
    assert chain.steps("sft") == list(range(1, 201))
    log = chain.run.stage("sft").logs / f"{chain.job_id('sft')}_0_log.err"
    assert "a rank hangs; the stacks of this rank are" in log.read_text()


def test_a_stage_refuses_an_input_without_a_manifest(finished: Chain) -> None:
    """Slurm may start PPO after an SFT that was preempted and exited 0, so the manifest decides."""
    ppo, sft = finished.run.stage("ppo"), finished.run.stage("sft")
    ppo_manifest = ppo.model / manifest.NAME
    whole = (sft.model / manifest.NAME).read_text()
    made = ppo_manifest.read_text()
    ppo_manifest.unlink()
    with held(finished.cluster):
        finished.submit()
        (sft.model / manifest.NAME).write_text(whole[: len(whole) // 2])
    try:
        message = finished.wait_event("failed", "ppo").message
        assert "the model of stage sft is not complete" in message
        finished.cluster.wait_state(finished.job_id("ppo"), "FAILED")
        assert "not complete" in finished.status()["ppo"]["why"]
        assert not finished.is_done("ppo")
    finally:
        (sft.model / manifest.NAME).write_text(whole)
        ppo_manifest.write_text(made)


def test_submitting_twice_attaches(new_chain: NewChain) -> None:
    chain = new_chain()
    with held(chain.cluster):
        chain.submit()
        jobs = queued(chain)
        again = chain.submit()
        assert sorted(jobs) == ["chain.ppo", "chain.reward", "chain.sft"]
        assert queued(chain) == jobs
        assert again.stdout.count("already submitted") == 3
        chain.cli("cancel", chain.path)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_submit_killed_at_its_second_sbatch_leaves_no_orphan(
    new_chain: NewChain, tmp_path: Path, after: bool
) -> None:
    """Killed before sbatch was called, and after Slurm accepted the job but before submit recorded its id."""
    chain = new_chain()
    with held(chain.cluster):
        killed = chain.submit(check=False, env=killing_sbatch(chain.cluster, tmp_path, after))
        assert killed.returncode == -signal.SIGKILL
        assert len(queued(chain)) == (2 if after else 1)
        before = queued(chain)
        chain.submit()
        jobs = queued(chain)
        assert sorted(jobs) == ["chain.ppo", "chain.reward", "chain.sft"]
        assert {name: jobs[name] for name in before} == before
        parents = chain.cluster.field(jobs["chain.ppo"][0], "Dependency")
        for need in ("chain.sft", "chain.reward"):
            assert f"afterok:{jobs[need][0]}" in parents
        chain.cli("cancel", chain.path)


def test_a_live_chain_is_shown_and_cancelled(new_chain: NewChain) -> None:
    chain = new_chain("stages.reward.slurm.extra.begin=now+1hour")
    chain.submit()
    chain.wait_step("sft", 1)
    status = chain.status()
    assert status["sft"]["job_id"] == chain.job_id("sft")
    assert status["sft"]["step"] >= 1
    assert status["sft"]["state"] == "running"
    assert status["ppo"]["state"] == "waiting"
    assert chain.cli("logs", chain.path, "sft").stdout
    chain.cli("cancel", chain.path)
    wait_until(lambda: not queued(chain), 120, "no job of the chain is left")
    assert chain.events("cancelled", "ppo")
    assert {facts["state"] for facts in chain.status().values()} <= {"cancelled", "done"}


def preempt_all(cluster: Cluster) -> None:
    """Occupy every node for a moment."""
    options = ("--partition=high", f"--nodes={config.NODES}", f"--gpus-per-node={config.GPUS}")
    job = cluster.sbatch(*options, "--output=/dev/null", "--wrap=true")
    cluster.wait_state(job, "COMPLETED", timeout=120)


def assert_resumed(chain: Chain, stage: str) -> None:
    """The same job came back, resumed from its checkpoint, and did every step once."""
    starts = chain.events("started", stage)
    assert {start.job_id for start in starts} == {chain.job_id(stage)}
    assert [start.restart for start in starts] == list(range(len(starts)))
    requeued, resumed = chain.events("requeued", stage), chain.events("resumed", stage)
    assert len(starts) > 1
    assert [event.step for event in resumed] == [event.step for event in requeued]
    assert all(event.step >= 5 for event in resumed)
    facts = manifest.require(chain.run.stage(stage).model, stage)
    assert chain.steps(stage) == list(range(1, facts["step"] + 1))


def a_rank(job: str) -> int:
    """The process id of one of a job's ranks."""

    def is_rank(process: Process) -> bool:
        pairs, command = process.environ(), process.command()
        mine = {f"SLURM_JOB_ID={job}", "SLURM_PROCID=1"} <= pairs
        return mine and "-m hpc_rlhf" in command and not command.startswith("srun")

    return find(is_rank)[0].pid


def queued(chain: Chain) -> dict[str, list[str]]:
    """The ids of the stages' jobs in the queue, by name."""
    jobs: dict[str, list[str]] = {}
    for line in chain.cluster.run("squeue", "--noheader", "--format=%i %j").stdout.splitlines():
        job_id, name = line.split()
        if name.endswith(".sentinel"):
            continue
        jobs.setdefault(name, []).append(job_id)
    return jobs


@contextmanager
def held(cluster: Cluster) -> Iterator[None]:
    """Let no job start."""
    cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
    try:
        yield
    finally:
        cluster.run("scontrol", "update", "PartitionName=gpu", "State=UP")


def killing_sbatch(cluster: Cluster, folder: Path, after: bool) -> dict[str, str]:
    """An environment whose sbatch kills its caller in its second call for a stage, before or after doing its work."""
    calls, kill = folder / "calls", "kill -KILL $PPID"
    script = folder / "bin/sbatch"
    script.parent.mkdir()
    lines = (
        "#!/bin/bash",
        f"[[ $* == *sentinel* ]] || echo >>'{calls}'",
        f"second() {{ [[ $(wc -l <'{calls}') == 2 ]]; }}",
        "" if after else f"second && {{ {kill}; exit 1; }}",
        f'{shutil.which("sbatch", path=SYSTEM_PATH)} "$@"',
        f"second && {kill}" if after else "",
        "exit 0",
    )
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    return {**cluster.env, "PATH": f"{script.parent}:{os.environ['PATH']}"}
