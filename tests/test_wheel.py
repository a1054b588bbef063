"""The wheel, built by way of the sdist, works in an empty venv outside the checkout."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.spec.texts import JOBS

# Built once, however many workers there are.
pytestmark = [pytest.mark.xdist_group("wheel"), pytest.mark.slow]

ROOT = JOBS.parent
# What the verbs of the login node need; nothing else of this environment is there for the wheel.
LIGHT = [
    "click",
    "yaml",
    "_yaml",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "typing_inspection",
]
LIGHT += ["jinja2", "markupsafe", "rich", "pygments", "markdown_it", "mdurl", "submitit", "cloudpickle"]
# Of the hub's library, what looks into the cache.
LIGHT += [
    "huggingface_hub",
    "filelock",
    "fsspec",
    "packaging",
    "tqdm",
    "httpx2",
    "httpcore2",
    "anyio",
    "h11",
    "idna",
    "truststore",
]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def location(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def venv(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the wheel and the light dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (folder / "light").mkdir()
    for module in LIGHT:
        place = location(module)
        for path in (place, *place.parent.glob(f"{module}-*.dist-info")):
            (folder / "light" / path.name).symlink_to(path)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "light.pth").write_text(f"{folder / 'light'}\n")
    return folder / "venv"


def test_verbs_work_from_the_wheel(venv: Path, tmp_path: Path) -> None:
    verb = venv / "bin/hpc-rlhf"
    run(verb, "init", "--actor", "facebook/opt-13b", "--deployment", "single_node", "--out", "job.yaml", cwd=tmp_path)
    assert run(verb, "check", "job.yaml", cwd=tmp_path) == "job.yaml: ok\n"
    assert "ppo" in run(verb, "plan", "job.yaml", cwd=tmp_path)
    run(verb, "render", "job.yaml", "--out", "out", cwd=tmp_path)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"sft.sbatch", "reward.ds_config.json", "ppo.hostfile.in"} <= made
    assert run(verb, "schema", cwd=tmp_path).startswith("{")
    assert run(verb, "init", "--demo", "--out", "-", cwd=tmp_path) == (JOBS / "tiny.yaml").read_text()
    assert run(verb, "--version", cwd=tmp_path).startswith("hpc-rlhf ")


def test_wheel_carries_templates_and_jobs(venv: Path) -> None:
    (package,) = venv.glob("lib/python*/site-packages/hpc_rlhf")
    for carried, source in (("_templates", "templates"), ("_jobs", "jobs")):
        assert {p.name for p in (package / carried).iterdir()} == {p.name for p in (ROOT / source).iterdir()}


def test_sdist_carries_what_a_checkout_has(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"jobs/tiny.yaml", "templates/stage.sbatch.j2", "hostfiles/lab.hostfile", "tests/test_wheel.py", "Makefile", "constraints.txt", "LICENSE"} <= names  # fmt: skip  # noqa: E501
