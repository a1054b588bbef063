"""What login-node verbs import: never the training stack, and no more than they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.cli import VERBS
from tests.spec.texts import JOBS

TRAINING = {"torch", "deepspeed", "transformers", "datasets", "tokenizers", "tensorboard", "numpy"}
SLOW = {"submitit", "jinja2", "rich"}
TINY = str(JOBS / "tiny.yaml")


def loaded_by(*args: str, cwd: Path) -> set[str]:
    """The top-level modules that a verb imports."""
    code = (
        "import json, sys; from hpc_rlhf.cli import main; code = main(sys.argv[1:]); sys.stdout.flush();"
        "sys.stderr.write('\\n' + json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd)
    exit_code, modules = json.loads(done.stderr.splitlines()[-1])
    assert exit_code == 0, done.stderr
    return set(modules)


@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (["--help"], {*SLOW, "pydantic", "yaml"}),
        (["--version"], {*SLOW, "pydantic", "yaml"}),
        (["check", TINY], SLOW),
        (["schema"], SLOW),
        (["init", "--actor", "facebook/opt-1.3b", "--deployment", "single_gpu"], SLOW),
        (["plan", TINY], {"submitit"}),
        (["plan", TINY, "--json"], {"submitit", "rich"}),
        (["render", TINY, "--out", "out"], {"submitit", "rich"}),
        (["submit", "--dry-run", TINY], set()),
        *([[verb, "--help"], SLOW] for verb in VERBS),  # a verb's help imports its module
    ],
    ids=lambda value: "-".join(value[:2]).replace(TINY, "tiny") if isinstance(value, list) else "",
)  # fmt: skip
def test_login_node_verbs_stay_light(tmp_path: Path, args: list[str], unwanted: set[str]) -> None:
    assert not loaded_by(*args, cwd=tmp_path) & (TRAINING | unwanted)


def test_a_node_launcher_starts_quickly() -> None:
    """Until it has started, a signal kills it and the ranks are not asked to save."""
    code = "import sys, hpc_rlhf.launch.node; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hpc_rlhf.launch.node" in modules
    assert "pydantic" not in modules
