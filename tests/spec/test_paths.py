"""Paths are resolved once, when a spec is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.spec.load import load_spec
from tests.spec.texts import GOOD, problems_in, write


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("WORK", "/big/disk")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("runs/x", "{here}/runs/x"),
        ("${WORK}/x", "/big/disk/x"),
        ("${WORK:-/other}/${EMPTY:-y}", "/big/disk/y"),
        ("${NONE:-.}/x", "{here}/x"),
        ("~/x", "/home/me/x"),
        ("/a/../b with space/#j", "/b with space/#j"),
    ],
)
def test_run_dir(tmp_path: Path, written: str, resolved: str) -> None:
    spec = load_spec(write(tmp_path, GOOD.replace("runs/good", written)))
    assert spec.run_dir == resolved.format(here=tmp_path / "here")


def test_a_name_without_a_file_ending_is_a_hub_id_whatever_is_in_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    (tmp_path / "here/facebook/opt-125m").mkdir(parents=True)
    (tmp_path / "here/rows.jsonl").touch()
    spec = load_spec(path, ["data.sources.1={path: rows.jsonl, format: hh}"])
    assert spec.models.actor == "facebook/opt-125m"
    assert spec.data.sources[0].path == "Dahoas/rm-static"
    assert spec.data.sources[1].path == str(tmp_path / "here/rows.jsonl")


def test_container(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("slurm: {nodes: "
                                        "2}", "slurm: {container: {runtime: pyxis, image: "
                                              "nvcr.io#nvidia/pytorch:25.01-py3}}"))  # fmt: skip
    spec = load_spec(path, ["slurm.container={runtime: apptainer, image: x.sif, mounts: ['${WORK}:/data', sub]}"])
    assert spec.slurm.container is not None
    assert spec.slurm.container.image == str(tmp_path / "here/x.sif")
    assert spec.slurm.container.mounts == ("/big/disk:/data", str(tmp_path / "here/sub"))
    ppo = spec.stage("ppo").slurm.container
    assert ppo is not None
    assert ppo.image == "nvcr.io#nvidia/pytorch:25.01-py3"


def test_variables_are_expanded_only_in_paths(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD), ["slurm.setup=['export A=${WORK}']", "slurm.comment='${WORK}'"])
    assert (spec.slurm.setup, spec.slurm.comment) == (("export A=${WORK}",), "${WORK}")


@pytest.mark.parametrize("written", ["${}", "${A", "a$", "${A:-${WORK}}", "$(pwd)", "${1}", "${EMPTY}", "${A-b}"])
def test_invalid_variable_is_rejected(tmp_path: Path, written: str) -> None:
    (problem,) = problems_in(write(tmp_path, GOOD.replace("runs/good", f'"{written}"')))
    assert (problem.line, problem.path) == (2, "run_dir")


def test_expanded_values_are_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORK", "/x\n#SBATCH --wrap=evil")
    (problem,) = problems_in(write(tmp_path, GOOD.replace("runs/good", "${WORK}/x")))
    assert problem.what.endswith("must be one line without control characters")
