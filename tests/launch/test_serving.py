"""Serving a model in a Slurm job."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import serving
from hpc_rlhf.launch.prepare import claim, prepare
from tests.launch.specs import make_spec


def test_the_job_is_rendered_from_the_users_own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts: list[str] = []

    def submit(script: Path, options: list[str]) -> str:
        scripts.append(script.read_text())
        raise HpcRlhfError("no Slurm in this test")

    def serve() -> str:
        with pytest.raises(HpcRlhfError, match="no Slurm"):
            serving.serve_as_job(run, "demo", "sft", tmp_path, 8000, None, lambda text: None)
        return scripts.pop()

    monkeypatch.setattr("hpc_rlhf.slurm.commands.submit", submit)
    templates = tmp_path / "job/templates"
    templates.mkdir(parents=True)
    own = templates / "serve.sbatch.j2"
    own.write_text("#!/bin/bash\n# my own: {{ command }}\n")
    spec = make_spec(tmp_path / "run", sft={})
    with claim(spec, "a test") as run:
        prepare(spec, run, templates.parent)
    assert serve().startswith("#!/bin/bash\n# my own: ")
    with claim(spec, "a test") as run:
        prepare(spec, run)  # from the run directory alone
    assert "# my own: " in serve()
    own.unlink()
    with claim(spec, "a test") as run:
        prepare(spec, run, templates.parent)
    assert "# my own: " not in serve()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/v1"), ("0.0.0.0", "http://127.0.0.1:8000/v1"), ("::1", "http://[::1]:8000/v1"),
        ("::", "http://[::1]:8000/v1"), ("node7", "http://node7:8000/v1"),
    ],
)  # fmt: skip
def test_clients_get_an_address_that_reaches_the_server(host: str, url: str) -> None:
    assert serving.url(host, 8000) == url
