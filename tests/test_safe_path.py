"""Nothing that another user puts into the working directory is imported, or taken for a model or data of the hub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpc_rlhf import safe_path
from hpc_rlhf.errors import SpecError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec import model_files
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.train.data.sources import local_files
from tests.co_user import NOBODY

ROOT = Path(__file__).parents[1]
# Our name, those of dependencies, and modules that Python imports itself.
NAMES = ("hpc_rlhf", "submitit", "yaml", "click", "runpy", "json", "multiprocessing", "encodings")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shared working directory, with packages of another user that leave a file when they are imported."""
    folder = tmp_path / "shared"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write('{name} ')\n")
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    folder.chmod(0o1777)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return folder


@pytest.mark.parametrize("options", [safe_path.THIS_PYTHON, safe_path.ANY_PYTHON], ids=["this Python", "any Python"])
def test_a_module_starts_with_its_arguments_and_a_safe_path(planted: Path, options: tuple[str, ...]) -> None:
    for words, output in (
        (["hpc_rlhf.cli", "--version"], "hpc-rlhf "),
        (["hpc_rlhf.task", "a", "b", "c"], "too many values to unpack"),
        (["json.tool", "no such file"], "No such file or directory: 'no such file'"),
    ):
        done = subprocess.run([sys.executable, *options, *words], capture_output=True, text=True)
        assert output in done.stdout + done.stderr
    assert not (planted / "imported").exists()


def test_a_run_started_there_imports_nothing_from_it(planted: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    fields = {
        "name": "here", "run_dir": str(run.path), "slurm": {"gpus_per_node": 0, "ranks_per_node": 2},
        "data": {"sources": [{"demo": 100}]}, "models": {"actor": "facebook/opt-125m"}, "stages": {"sft": {}},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(fields))
    verb = shutil.which("hpc-rlhf", path=str(Path(sys.executable).parent))
    assert verb is not None
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests/launch/fake_stage"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([verb, "run", "../job.yaml"], env=env, capture_output=True, text=True)
    assert manifest.is_done(run.stage("sft")), done.stderr
    assert not (planted / "imported").exists()


@pytest.mark.parametrize("entries", [":/x", "", None, "/x::/y"])
@pytest.mark.parametrize("start", ["script", "-m", "-m cli"])
def test_the_command_imports_no_dependency_from_there(
    planted: Path, monkeypatch: pytest.MonkeyPatch, entries: str | None, start: str
) -> None:
    """Python itself imports our first module from there, and what belongs to Python."""
    for name in ("hpc_rlhf", "runpy", "json", "multiprocessing", "encodings"):
        shutil.rmtree(planted / name)
    monkeypatch.setenv("PYTHONPATH", entries) if entries is not None else monkeypatch.delenv("PYTHONPATH", False)
    command = {
        "script": [str(Path(sys.executable).with_name("hpc-rlhf"))],
        "-m": [sys.executable, "-m", "hpc_rlhf"],
        "-m cli": [sys.executable, "-m", "hpc_rlhf.cli"],
    }[start]
    (planted / "job.yaml").write_text("name: x\n")
    done = subprocess.run([*command, "check", "job.yaml"], capture_output=True, text=True)
    assert "run_dir: is missing" in done.stderr + done.stdout
    assert not (planted / "imported").exists()


def test_what_pythonpath_names_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}")
    safe_path.leave_working_directory()
    assert sys.path[0] == str(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    safe_path.leave_working_directory()
    assert str(tmp_path) not in sys.path


def test_no_command_starts_a_module_in_another_way() -> None:
    files = [*(ROOT / "hpc_rlhf").rglob("*.py"), *(ROOT / "templates").glob("*.j2")]
    found = {file.name for file in files if re.search(r"""["']-m["']|[}"] -m """, file.read_text())}
    assert found == {"safe_path.py"}


def test_what_ranks_inherit_does_not_lead_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": f":src:{os.sep}opt/lib:", "HF_HOME": "cache", "HF_HUB_CACHE": "~/hub", "HOME": "/home/me"}
    monkeypatch.setenv("HOME", "/home/me")
    safe_path.protect(env)
    assert env["PYTHONPATH"] == f"{tmp_path}/src:/opt/lib"
    assert (env["HF_HOME"], env["HF_HUB_CACHE"]) == (f"{tmp_path}/cache", "/home/me/hub")
    assert env["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("name", ["gpt2", "facebook/opt-125m", "org/data.v2"])
def test_a_folder_is_not_mistaken_for_a_hub_id_nor_the_other_way_round(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    fields = {
        "name": "x", "run_dir": "/x", "data": {"sources": [{"path": name, "format": "text"}]},
        "models": {"actor": name}, "stages": {"sft": {}},
    }  # fmt: skip
    file = tmp_path / "jobs/job.yaml"
    file.write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(tmp_path)
    spec = load_spec(file)
    for place, here in ((tmp_path, str(tmp_path / name)), (tmp_path / "jobs", f"./{name}")):
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text('{"model_type": "opt"}')
        (place / name / "train.jsonl").write_text('{"text": "theirs"}\n')
        assert local_files(spec.data.sources[0]) is None
        assert model_files.folder(name) is None
        with pytest.raises(SpecError) as error:
            load_spec(file)
        assert [problem.path for problem in error.value.problems] == ["data.sources.0.path", "models.actor"]
        assert all(f"for the folder, write {here};" in problem.what for problem in error.value.problems)
        options = [f"{path}={place / name}" for path in ("models.actor", "data.sources.0.path")]
        assert load_spec(file, options).models.actor == str(place / name)
    (tmp_path / "jobs/plan.json").touch()
    shutil.rmtree(tmp_path / "jobs" / name)
    assert load_spec(file).models.actor == name  # the spec of a run
