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
        ("runs/x", "{folder}/runs/x"),
        ("${WORK}/x", "/big/disk/x"),
        ("${WORK:-/other}/${EMPTY:-y}", "/big/disk/y"),
        ("${NONE:-.}/x", "{folder}/x"),
        ("~/x", "/home/me/x"),
        ("/a/../b with space/#j", "/b with space/#j"),
    ],
)
def test_run_dir(tmp_path: Path, written: str, resolved: str) -> None:
    spec = load_spec(write(tmp_path, GOOD.replace("runs/good", written)))
    assert spec.run_dir == resolved.format(folder=tmp_path)


def test_all_relative_paths_start_at_the_file_that_they_are_in(tmp_path: Path) -> None:
    base, below = tmp_path / "base", tmp_path / "below"
    for folder in (base, below):
        (folder / "model").mkdir(parents=True)
        (folder / "rows.jsonl").touch()
    container = "  container: {runtime: apptainer, image: x.sif, mounts: [data]}"
    text = GOOD.replace("  partition: gpu", container).replace("Dahoas/rm-static", "rows.jsonl")
    (base / "base.yaml").write_text(f"{text}notify: {{webhook: {{url: secret}}}}\n")
    (below / "job.yaml").write_text("extends: ../base/base.yaml\nmodels: {actor: ./model}\n")
    spec = load_spec("../below/job.yaml")
    container_spec, webhook = spec.slurm.container, spec.notify.webhook
    assert container_spec is not None
    assert webhook is not None
    assert spec.run_dir == str(base / "runs/good")
    assert spec.models.actor == str(below / "model")
    assert spec.data.sources[0].path == str(base / "rows.jsonl")
    assert (container_spec.image, container_spec.mounts) == (str(base / "x.sif"), (str(base / "data"),))
    assert webhook.url == str(base / "secret")


def test_those_of_options_start_at_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "here/rows.jsonl").touch()
    spec = load_spec(write(tmp_path, GOOD), ["data.sources.0.path=./rows.jsonl", "run_dir=runs"])
    assert spec.data.sources[0].path == str(tmp_path / "here/rows.jsonl")
    assert spec.run_dir == str(tmp_path / "here/runs")


def test_a_run_of_an_earlier_version_is_not_trained_again_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "here/runs/good").mkdir(parents=True)
    (tmp_path / "here/runs/good/job.yaml").touch()
    (problem,) = problems_in(write(tmp_path, GOOD))
    assert problem.path == "run_dir"
    assert f"an earlier run is in {tmp_path}/here/runs/good" in problem.what
    (tmp_path / "runs/good").mkdir(parents=True)
    assert load_spec(write(tmp_path, GOOD)).run_dir == str(tmp_path / "runs/good")


def test_a_secret_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "https://example.org/secret")
    spec = load_spec(write(tmp_path, GOOD), ["notify.webhook.url='${HOOK}'"])
    assert spec.notify.webhook is not None
    assert spec.notify.webhook.url == "${HOOK}"


def test_a_name_without_a_file_ending_is_a_hub_id(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    (tmp_path / "here/rows.jsonl").touch()
    spec = load_spec(path, ["data.sources.1={path: rows.jsonl, format: hh}"])
    assert spec.models.actor == "facebook/opt-125m"
    assert spec.data.sources[0].path == "Dahoas/rm-static"
    assert spec.data.sources[1].path == str(tmp_path / "here/rows.jsonl")


def test_a_name_too_long_for_a_file_is_no_folder(tmp_path: Path) -> None:
    name = "x" * 1000
    assert load_spec(write(tmp_path, GOOD), [f"models.actor={name}"]).models.actor == name


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
