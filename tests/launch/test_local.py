"""Running without Slurm: order, environment, stops, failures. The stages are fakes that need no torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hpc_rlhf.launch.local.environment import environment, visible_gpus
from hpc_rlhf.launch.local.runner import StopRequests
from tests.hook import Hook
from tests.launch.fakes import Here, is_alive, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here.new(tmp_path)


def test_stages_run_in_order_and_only_once(here: Here) -> None:
    code, out, err = here.finish("run", "job.yaml")
    assert code == 0, err
    assert here.events("started") == [("started", "sft"), ("started", "reward"), ("started", "ppo")]
    assert "0.970" in out
    assert "hpc-rlhf chat run" in out
    assert "sft: step 20/20" in err

    code, out, err = here.finish("run", "job.yaml")
    assert code == 0
    assert err.splitlines() == [f"{stage}: already finished" for stage in ("sft", "reward", "ppo")]
    assert len(here.events("started")) == 3


def test_ranks_get_their_own_variables_and_none_of_a_surrounding_job(here: Here) -> None:
    around = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "RANK": "5", "SUBMITIT_EXECUTOR": "slurm"}
    code, _, err = here.finish("run", "job.yaml", "--set", "slurm.nodes=2", **around)
    assert code == 0, err
    seen = [here.seen("sft", rank) for rank in range(4)]
    assert [env["SUBMITIT_LOCAL_LOCALID"] for env in seen] == ["0", "1", "2", "3"]
    assert {env["SUBMITIT_LOCAL_NTASKS"] for env in seen} == {"4"}
    assert {env["SUBMITIT_EXECUTOR"] for env in seen} == {"local"}
    assert {env["MASTER_ADDR"] for env in seen} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in seen}) == 1
    assert not [name for env in seen for name in env if name.startswith("SLURM_") or name == "RANK"]
    logs = {path.name.partition("_")[2] for path in (here.run / "stages/sft/logs").glob("*_log.*")}
    assert logs == {f"{rank}_log.{stream}" for rank in range(4) for stream in ("out", "err")}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_request_lets_the_ranks_save_and_prints_how_to_resume(here: Here, number: int, code: int) -> None:
    process = here.start("run", "job.yaml", "--set", "seed=5", FAKE_SFT="until_signal")
    ranks = here.await_ranks()
    os.killpg(process.pid, number)  # what a terminal does at Ctrl-C
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "saving; press Ctrl-C again to stop at once" in err
    assert "sft is saved at step 7" in err
    assert "resume with: hpc-rlhf run job.yaml --set seed=5" in err
    assert "error" not in err
    assert here.events("interrupted") == [("interrupted", "sft")]
    assert not any(map(is_alive, ranks))
    assert "0 of 3 stages done; sft was interrupted" in (here.run / "report.html").read_text()

    code, _, err = here.finish("run", "job.yaml", "--set", "seed=5")
    assert code == 0, err
    assert here.events("started")[1:] == [("started", "sft"), ("started", "reward"), ("started", "ppo")]


def test_a_second_stop_request_kills_unresponsive_ranks(here: Here) -> None:
    process = here.start("run", "job.yaml", FAKE_SFT="ignore_signals")
    ranks = here.await_ranks()
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    wait_for(lambda: "press Ctrl-C again" in process.stderr.readline())
    assert all(map(is_alive, ranks))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "sft was stopped without saving; it had no checkpoint yet" in err
    wait_for(lambda: not any(map(is_alive, ranks)))


def test_ranks_save_and_exit_when_the_launcher_is_killed(here: Here) -> None:
    process = here.start("run", "job.yaml", FAKE_SFT="until_signal")
    ranks = here.await_ranks()
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_alive, ranks)))
    assert here.events("interrupted") == [("interrupted", "sft")]
    code, _, err = here.finish("run", "job.yaml")  # and the lock it left is no hindrance
    assert code == 0, err


def test_a_killed_rank_is_reported_and_stops_the_others(here: Here) -> None:
    code, _, err = here.finish("run", "job.yaml", FAKE_SFT="one_killed")
    assert code == 1
    assert "error: sft: rank 1 was ended by SIGKILL; the machine may have run out of memory" in err
    assert "the last output of rank 1" in err
    assert not any(map(is_alive, here.await_ranks()))
    assert here.events("started") == [("started", "sft")]
    assert here.events("failed") == [("failed", "sft")]


def test_a_late_event_of_another_attempt_is_ignored(here: Here) -> None:
    code, _, err = here.finish("run", "job.yaml", FAKE_SFT="killed_beside_another")
    assert code == 1
    assert "rank 1 was ended by SIGKILL" in err


def test_a_failure_is_retried_unless_it_repeats(here: Here) -> None:
    heal = ("--set", "slurm.heal.enabled=true")
    code, _, err = here.finish("run", "job.yaml", *heal, FAKE_SFT="killed_once", FAKE_REWARD="connection_lost")
    assert code == 1
    assert "sft: killed: rank 1 was ended by SIGKILL" in err
    assert "reward: failed: OSError: disk full; retrying" in err
    assert "error: reward: OSError: disk full" in err
    turns = here.events("started", "ended", "retried")
    tried = ["started", "ended", "retried", "started"]
    assert turns == [*((turn, "sft") for turn in tried), *((turn, "reward") for turn in (*tried, "ended"))]


def test_a_user_error_found_by_a_stage_is_shown_as_is(here: Here) -> None:
    notify = ("--set", "notify.webhook.url=${HOOK}")
    with Hook().listening() as hook:
        code, _, err = here.finish("run", "job.yaml", *notify, FAKE_REWARD="user_error", HOOK=hook.url)
    ((_, body),) = hook.posted
    assert (body["event"], body["stage"]) == ("stopped", "reward")
    assert body["message"] == "data.json: no such file"
    assert code == 2
    assert "error: reward: data.json: no such file\n" in err
    assert here.events("started") == [("started", "sft"), ("started", "reward")]
    assert "Traceback" not in err
    report = (here.run / "report.html").read_text()
    assert "1 of 3 stages done; reward has failed: user error: data.json: no such file." in report


def test_a_user_error_that_no_rank_could_report_is_not_retried(here: Here) -> None:
    code, _, err = here.finish("run", "job.yaml", "--set", "slurm.heal.enabled=true", FAKE_SFT="silent_mistake")
    assert code == 2
    assert "ended with exit code 2\n  the last output" in err
    assert here.events("started", "retried") == [("started", "sft")]


def test_the_first_failure_is_reported_and_not_its_consequences(here: Here) -> None:
    code, _, err = here.finish("run", "job.yaml", FAKE_SFT="connection_lost")
    assert code == 1
    assert "error: sft: OSError: disk full\n" in err


def test_a_second_run_of_the_same_directory_is_refused(here: Here) -> None:
    first = here.start("run", "job.yaml", FAKE_SFT="until_signal")
    here.await_ranks()
    code, _, err = here.finish("run", "job.yaml")
    assert code == 1
    assert f"`hpc-rlhf run` (process {first.pid} on " in err
    first.terminate()
    first.communicate(timeout=30)
    assert here.events("started") == [("started", "sft")]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequests().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.count == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.count, stop.number) == (1, signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_cores_are_split_over_ranks_unless_the_user_set_them() -> None:
    assert environment({"OMP_NUM_THREADS": "3"}, 2)["OMP_NUM_THREADS"] == "3"
    cores = len(os.sched_getaffinity(0))
    assert environment({}, 1)["OMP_NUM_THREADS"] == str(cores)
    assert environment({}, 10 * cores)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("chosen", "count"), [("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("GPU-8f2, MIG-1a", 2)])
def test_gpus_are_counted_as_the_ranks_would_see_them(chosen: str, count: int) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": chosen}) == count


def test_too_few_gpus_are_not_used(here: Here) -> None:
    _, _, err = here.finish("run", "job.yaml", CUDA_VISIBLE_DEVICES="4")
    assert "sft: 2 ranks, but 1 visible GPU; running on the CPU" in err
    assert here.seen("sft", 1)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_machine_without_gpus_is_reported(here: Here) -> None:
    _, _, err = here.finish("run", "job.yaml", CUDA_VISIBLE_DEVICES="")
    assert err.count("sft: this machine has no visible NVIDIA GPU; running on the CPU") == 1
    _, _, err = here.finish(
        "run", "job.yaml", "--set", "slurm={gpus_per_node: 0, ranks_per_node: 2}", "--set", "run_dir=cpu"
    )
    assert "GPU" not in err


def test_enough_gpus_are_all_visible(here: Here) -> None:
    here.finish("run", "job.yaml", CUDA_VISIBLE_DEVICES="4,6")
    assert here.seen("sft", 1)["CUDA_VISIBLE_DEVICES"] == "4,6"
