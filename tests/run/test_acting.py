"""Other users' runs: every verb that acts refuses them before it writes or executes anything; those that read work."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from hpc_rlhf.cli import VERBS, main
from hpc_rlhf.launch.doctor import machine
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Submitted, Submitting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.co_user import NOBODY, as_root, exit_code_as_co_user
from tests.launch.specs import make_spec

pytestmark = as_root


@pytest.fixture
def run(public: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Another user's run, in which everybody may write, and Slurm commands that note each call that changes a job."""
    run = RunDir(public / "run")
    setup = {"setup": [f"touch {public}/executed"], "partition": "gpu"}
    with claim(make_spec(run.path, setup, sft={}, reward={}, ppo={}, eval={}), "test"):
        prepare(make_spec(run.path, setup, sft={}, reward={}, ppo={}, eval={}), run)
    run.stage("sft").model.mkdir()
    manifest.write(run.stage("sft").model, {"stage": "sft", "step": 1, "seconds": 1.0, "metrics": {}})
    # A submission whose job id was never recorded, which the next command would adopt.
    Ledger(run.ledger).append(Submitting("reward", token="lost"))
    Ledger(run.ledger).append(Submitted("ppo", token="known", job_id="8"))
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o777 if path.is_dir() else 0o666)
    programs = public / "bin"
    programs.mkdir()
    for name in ("sbatch", "scancel", "srun", "scontrol", "squeue", "sacct"):
        (programs / name).write_text(f'#!/bin/sh\n[ {name} = squeue ] || echo {name} "$@" >> {public}/called\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return run


def contents(run: RunDir) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in run.path.rglob("*")}


@pytest.mark.parametrize(
    "words",
    [
        ("submit", "JOB"),
        ("run", "JOB"),
        ("eval", "RUN", "--set", "stages.eval.prompts=2"),
        ("heal", "RUN"),
        ("heal", "RUN", "--sentinel"),
        ("cancel", "RUN"),
        ("relocate", "RUN"),
        ("report", "RUN"),
        ("serve", "RUN", "--slurm"),
        ("doctor", "JOB", "--on-cluster"),
    ],
    ids=" ".join,
)
def test_no_verb_acts_on_it(
    run: RunDir, public: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    job = public / "mine.yaml"
    shutil.copyfile(run.job_yaml, job)
    finished = ("sft", "reward", "ppo") if words[0] == "eval" else ("sft",)
    monkeypatch.setattr(machine, "examine", lambda *facts: [])  # it would load torch
    monkeypatch.setattr(manifest, "is_done", lambda stage: stage.path.name in finished)
    before = contents(run)
    code = main([word.replace("RUN", str(run.path)).replace("JOB", str(job)) for word in words])
    printed = capsys.readouterr()
    assert code == (1 if words[0] == "doctor" else 2)
    assert re.search(r"belongs to (nobody|uid 65534)", " ".join((printed.out + printed.err).split()))
    assert "Traceback" not in printed.err
    assert contents(run) == before
    assert not (public / "executed").exists()
    calls = public / "called"
    called = calls.read_text() if calls.exists() else ""
    assert not re.search(r"^(sbatch (?!--test-only)|scancel|srun|scontrol (requeue|update|release))", called, re.M), (
        called
    )


@pytest.mark.parametrize("words", [("status", "RUN"), ("plan", "RUN/job.yaml"), ("report", "RUN", "--out", "OUT")])
def test_verbs_that_read_show_it(run: RunDir, public: Path, words: tuple[str, ...]) -> None:
    before = contents(run)
    replaced = [word.replace("RUN", str(run.path)).replace("OUT", str(public / "report.html")) for word in words]
    assert main(replaced) == 0
    assert contents(run) == before


def test_a_sweep_folder_of_another_user_is_not_written(run: RunDir, public: Path) -> None:
    sweep = public / "sweep"
    sweep.mkdir()
    os.chown(sweep, NOBODY, NOBODY)
    file = public / "sweep.yaml"
    file.write_text(f"extends: run/job.yaml\nrun_dir: {sweep}\nsweep: {{seed: [1, 2]}}\n")
    assert main(["submit", str(file)]) == 2
    assert not any(sweep.iterdir())


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "heal", "report"])
def test_a_private_run_is_refused_in_a_sentence(
    run: RunDir, public: Path, verb: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run.path.chmod(0o700)
    os.chown(run.path, 0, 0)
    assert as_nobody(verb, str(run.path)) == 2
    assert "you have no permission to read it" in capfd.readouterr().err


def test_a_shared_run_is_read_by_its_group_only(public: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = RunDir(public / "shared")
    spec = make_spec(run.path).model_copy(update={"share": "group"})
    with claim(spec, "test"):
        prepare(spec, run)
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, -1, NOBODY)
    for verb, code in (("status", 0), ("cancel", 2), ("report", 2)):
        assert as_nobody(verb, str(run.path)) == code
    error = capfd.readouterr().err
    assert error.count("this run belongs to root, and only root can change it or its jobs") == 2
    os.chown(run.path, -1, 0)
    assert as_nobody("status", str(run.path)) == 2


def test_list_counts_what_it_may_not_read(run: RunDir, public: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run.path, public / "private")
    (public / "private").chmod(0o700)
    shutil.copytree(run.path, public / "damaged")
    (public / "damaged/plan.json").write_text("{")
    assert as_nobody("list", str(public), "--json") == 0
    printed = capfd.readouterr()
    assert [line["path"] for line in json.loads(printed.out)] == [str(run.path)]
    assert "left out 2 folders that cannot be read" in printed.err


def as_nobody(*words: str) -> int:
    """The exit code of a command of ours in a process of a user without rights."""
    for verb in VERBS:
        importlib.import_module(f"hpc_rlhf.cli.{verb}")  # that user may not be able to
    return exit_code_as_co_user(lambda: main(words))
