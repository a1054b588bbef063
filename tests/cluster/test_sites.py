"""Sites unlike ours: a banner before every answer of sbatch, and a plugin that overwrites comments and forbids
requeueing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpc_rlhf.launch.doctor import cluster as cluster_checks
from hpc_rlhf.launch.doctor import limits
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.spec.load import load_spec
from tests.cluster import Cluster, wait_until
from tests.cluster.test_heal import ALONE, AT, SPEC, StandIn
from tests.launch.specs import make_spec

BANNER = """
function slurm_cli_setup_defaults(options, early_pass) return slurm.SUCCESS end
function slurm_cli_pre_submit(options, pack_offset)
  print("*** Welcome to the cluster, job 4711 ***")
  print("17 users are logged in")
  return slurm.SUCCESS
end
function slurm_cli_post_submit(offset, job_id, step_id) return slurm.SUCCESS end
return slurm.SUCCESS
"""
OVERWRITES = """
function slurm_job_submit(job_desc, part_list, submit_uid)
  job_desc.comment = "project=7"
  job_desc.requeue = 0
  local tres = (job_desc.tres_per_node or "") .. (job_desc.gres or "")
  if job_desc.partition == "last" and not string.find(tres, "gpu") then
    slurm.log_user("this partition is for jobs with GPUs")
    return slurm.ERROR
  end
  return slurm.SUCCESS
end
function slurm_job_modify(job_desc, job_rec, part_list, modify_uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""
SETTINGS = (
    ("MailProg=", "JobSubmitPlugins=lua\nCliFilterPlugins=lua\nEnforcePartLimits=ALL\nMailProg="),
    ("MpiDefault=none", "MpiDefault=pmix_v99"),  # srun knows of no such plugin
    ("PartitionName=first ", "PartitionName=first MaxTime=10 DefMemPerCPU=10 "),
    ("AccountingStorageType=", "AccountingStorageEnforce=limits\nAccountingStorageType="),
)


@pytest.fixture(scope="module")
def odd_site(cluster: Cluster) -> Iterator[Cluster]:
    cluster.clear()
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster.changed(*SETTINGS, job_submit_lua=OVERWRITES, cli_filter_lua=BANNER),
    ):
        patch.setenv("SLURM_CONF", str(cluster.conf))
        yield cluster
        cluster.clear()


def names(cluster: Cluster) -> list[str]:
    return sorted(cluster.run("squeue", "--noheader", "--format=%j").stdout.split())


def test_a_run_has_one_set_of_jobs_and_sentinels_where_a_plugin_overwrites_comments(
    odd_site: Cluster, tmp_path: Path
) -> None:
    later = (*ALONE, "name=odd", "slurm.extra.begin=now+1hour")
    chain = StandIn(odd_site, SPEC, tmp_path / "run", later)
    real = odd_site.run("sh", "-c", "command -v sbatch").stdout.strip()
    wrapper = tmp_path / "bin/sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/bash\n{real} "$@" >{tmp_path}/answer; kill -9 $PPID\n')
    wrapper.chmod(0o755)
    killed = {**odd_site.env, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    assert chain.submit(check=False, env=killed).returncode == -9
    for verb in (chain.submit, chain.submit, lambda: chain.cli("heal", chain.path)):
        verb()
        assert names(odd_site) == ["odd.sft", "odd.sft.sentinel"]
    assert chain.job_id("sft") == (tmp_path / "answer").read_text().split()[-1]
    assert odd_site.field(chain.job_id("sft"), "Comment") == "project=7"
    chain.cli("cancel", chain.path)
    assert names(odd_site) == []


def test_a_stage_that_may_not_be_requeued_continues_in_new_jobs(odd_site: Cluster, tmp_path: Path) -> None:
    """On the same nodes: its time limits are not failures."""
    chain = StandIn(odd_site, SPEC, tmp_path / "run", (*ALONE, "name=unrequeued", "slurm.partition=first"))
    chain.store("sft 6 wait")
    chain.submit(env=chain.env)
    for count, (step, after) in enumerate(zip(AT, ("sft 10 wait", ""), strict=True), 1):
        chain.await_fault(step)
        odd_site.run("scancel", "--signal=USR2", chain.job_id("sft"))  # what Slurm sends before the time limit

        def is_judged(attempts: int = count) -> bool:
            return len(chain.events("ended", "sft")) == attempts

        chain.await_that(is_judged, "its sentinel has judged it")
        chain.store(after)
    chain.await_end()
    assert chain.endings() == [("time limit", step) for step in AT for _ in ("requeued", "ended")]
    assert [event.without for event in chain.events("retried", "sft")] == [(), ()]
    assert len(chain.events("submitted", "sft")) == 3
    assert chain.steps("sft") == list(range(1, 13))


@contextmanager
def most_jobs(cluster: Cluster, number: int) -> Iterator[None]:
    """Limit how many jobs a user may have."""

    def allow(most: int) -> None:
        cluster.run("sacctmgr", "--immediate", "modify", "qos", "normal", "set", f"MaxSubmitJobsPerUser={most}")
        show = ("scontrol", "show", "assoc_mgr", "flags=qos", "qos=normal")
        shown = f"MaxSubmitJobsPU={'N' if most < 0 else most}("
        wait_until(lambda: shown in cluster.run(*show).stdout, 120, "the controller knows the limit")

    allow(number)
    try:
        yield
    finally:
        allow(-1)


def test_stages_for_which_a_limit_leaves_no_room_are_submitted_when_others_have_ended(
    odd_site: Cluster, tmp_path: Path
) -> None:
    chain = StandIn(odd_site, SPEC, tmp_path / "run", ("name=few", "slurm.partition=gpu"))
    with most_jobs(odd_site, 2):
        found = limits.check(make_plan(make_spec(tmp_path / "other")))
        assert [(each.check, each.level) for each in found] == [("jobs", "ok")]
        assert "6 jobs, 3 of them sentinels; QOS normal (MaxSubmitJobsPerUser) allows 2" in found[0].message
        chain.store("sft 6 wait")
        chain.submit(env=chain.env)
        assert names(odd_site) == ["few.sft", "few.sft.sentinel"]
        assert chain.status()["ppo"]["state"] == "not started"
        chain.store("")
        for stage in ("sft", "reward", "ppo"):
            chain.await_end(stage)
    assert {stage: len(chain.events("submitted", stage)) for stage in ("sft", "reward", "ppo")} == {
        "sft": 1, "reward": 1, "ppo": 1,
    }  # fmt: skip


def test_a_limit_of_one_job_is_an_error(odd_site: Cluster, tmp_path: Path) -> None:
    chain = StandIn(odd_site, SPEC, tmp_path / "run", ("name=one", "slurm.extra.begin=now+1hour"))
    with most_jobs(odd_site, 1):
        done = chain.submit(check=False)
        (found,) = limits.check(make_plan(make_spec(tmp_path / "other")))
    assert (done.returncode, found.level) == (2, "error")
    assert "the sentinel was refused" in done.stderr
    assert names(odd_site) == []


@pytest.mark.parametrize(
    ("sets", "refusal"),
    [
        (("slurm.partition=last",), "this partition is for jobs with GPUs"),
        (("slurm.partition=last", "slurm.heal.gres=gpu:1"), ""),
        (("slurm.partition=last", "slurm.heal.partition=first"), ""),
        (
            ("slurm.partition=last", "slurm.heal.partition=first", "slurm.heal.time=20"),
            "Requested time limit is invalid",
        ),
    ],
)
def test_a_sentinel_requests_what_its_site_requires(
    odd_site: Cluster, tmp_path: Path, sets: tuple[str, ...], refusal: str
) -> None:
    """And doctor finds out before."""
    sets = (*ALONE, "name=gpus", "slurm.partition=last", "slurm.gpus_per_node=1", "slurm.time=60", *sets)
    plan = make_plan(load_spec(SPEC, [f"run_dir={tmp_path}/run", *sets]))
    (found,) = [each for each in cluster_checks.check_stages(plan, Templates()) if each.check == "sentinel"]
    assert found.level == ("error" if refusal else "ok"), found
    assert refusal in found.message
    if refusal:
        done = StandIn(odd_site, SPEC, tmp_path / "run", sets).submit(check=False)
        assert done.returncode == 2
        assert refusal in done.stderr
        assert "such as gres: gpu:1, time: 10" in done.stderr
        assert names(odd_site) == []


def test_doctor_warns_of_little_memory_by_default(odd_site: Cluster, tmp_path: Path) -> None:
    def warnings(**slurm: object) -> list[str]:
        spec = make_spec(tmp_path / "run", {"partition": "first", "time": "10", "cpus_per_gpu": 3, **slurm}, sft={})
        found = cluster_checks.check_stages(make_plan(spec), Templates())
        return [each.message for each in found if each.check == "memory"]

    assert warnings() == [
        "first gives a job 60 MB per node by default; its 2 ranks need at least 2048 MB",
        "first gives the sentinel 10 MB by default; it needs 200 MB",
    ]
    assert warnings(mem="8G", heal={"mem": "200M"}) == []
    assert warnings(partition="gpu") == []
