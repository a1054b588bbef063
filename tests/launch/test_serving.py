"""Serving a model in a Slurm job."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import serving
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.rollout import RolloutSpec
from tests.launch.specs import make_spec


@pytest.fixture
def render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The script of the job that would serve a run's SFT model, perhaps with vLLM."""
    scripts: list[str] = []

    def submit(script: Path, options: list[str]) -> str:
        scripts.append(script.read_text())
        raise HpcRlhfError("no Slurm in this test")

    def rendered(run: RunDir, vllm: RolloutSpec | None = None) -> str:
        with pytest.raises(HpcRlhfError, match="no Slurm"):
            serving.serve_as_job(run, ["sft"], 8000, False, vllm, lambda text: None)
        return scripts.pop()

    monkeypatch.setattr("hpc_rlhf.slurm.commands.submit", submit)
    return rendered


def test_the_settings_of_vllm_reach_the_server(tmp_path: Path, render: Callable[..., str]) -> None:
    vllm = RolloutSpec(
        engine="vllm", tensor_parallel=2, python="/opt/my vllm/python", args={"swap_space": 1.5, "a": "'"}
    )
    with claim(make_spec(tmp_path / "run", sft={}), "a test") as run:
        prepare(make_spec(tmp_path / "run", sft={}), run)
    words = shlex.split(render(run, vllm), comments=True)
    assert RolloutSpec.model_validate_json(words[words.index("--vllm") + 1]) == vllm
    assert "--vllm" not in render(run)


def test_the_job_is_rendered_from_the_users_own_template(tmp_path: Path, render: Callable[..., str]) -> None:
    templates = tmp_path / "job/templates"
    templates.mkdir(parents=True)
    own = templates / "serve.sbatch.j2"
    own.write_text("#!/bin/bash\n# my own: {{ command }}\n")
    spec = make_spec(tmp_path / "run", sft={})
    with claim(spec, "a test") as run:
        prepare(spec, run, templates.parent)
    assert render(run).startswith("#!/bin/bash\n# my own: ")
    with claim(spec, "a test") as run:
        prepare(spec, run)  # from the run directory alone
    assert "# my own: " in render(run)
    own.unlink()
    with claim(spec, "a test") as run:
        prepare(spec, run, templates.parent)
    assert "# my own: " not in render(run)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/v1"), ("0.0.0.0", "http://127.0.0.1:8000/v1"), ("::1", "http://[::1]:8000/v1"),
        ("::", "http://[::1]:8000/v1"), ("node7", "http://node7:8000/v1"),
    ],
)  # fmt: skip
def test_clients_get_an_address_that_reaches_the_server(host: str, url: str) -> None:
    assert serving.url(host, 8000) == url
