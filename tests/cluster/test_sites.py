"""Sites unlike ours: a banner before every answer of sbatch, and a plugin that overwrites comments and forbids
requeueing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.cluster.test_heal import ALONE, AT, SPEC, StandIn

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
  return slurm.SUCCESS
end
function slurm_job_modify(job_desc, job_rec, part_list, modify_uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""
PLUGINS = ("MailProg=", "JobSubmitPlugins=lua\nCliFilterPlugins=lua\nMailProg=")


@pytest.fixture(scope="module")
def odd_site(cluster: Cluster) -> Iterator[Cluster]:
    cluster.clear()
    with cluster.changed(PLUGINS, job_submit_lua=OVERWRITES, cli_filter_lua=BANNER):
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
        chain.await_that(lambda count=count: len(chain.events("ended", "sft")) == count, "its sentinel has judged it")
        chain.store(after)
    chain.await_end()
    assert chain.endings() == [("time limit", step) for step in AT for _ in ("requeued", "ended")]
    assert [event.without for event in chain.events("retried", "sft")] == [(), ()]
    assert len(chain.events("submitted", "sft")) == 3
    assert chain.steps("sft") == list(range(1, 13))
