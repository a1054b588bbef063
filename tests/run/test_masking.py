"""Values of names that sound secret are masked wherever setup lines may show up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.launch.prepare import prepare
from hpc_rlhf.observe.report.page import make_page
from hpc_rlhf.run.events import Failed
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.masking import mask, mask_all, secret_names
from tests.launch.specs import make_spec


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("export HF_TOKEN=hf_abc", "export HF_TOKEN=***"),
        ("export HF_TOKEN=hf_abc WANDB_API_KEY='a b'; module load x=1",
         "export HF_TOKEN=*** WANDB_API_KEY=***; module load x=1"),
        ('MY_SECRET="a \\" b"c python x.py', "MY_SECRET=*** python x.py"),
        ("db_password=p\\ w&&true", "db_password=***&&true"),
        ("declare -x AWS_SECRET_ACCESS_KEY=$(cat ~/k ) && y", "declare -x AWS_SECRET_ACCESS_KEY=*** && y"),
        ("source env.sh; export OMP_NUM_THREADS=1", "source env.sh; export OMP_NUM_THREADS=1"),
        ("export HF_TOKEN=", "export HF_TOKEN="),
        ("curl https://me:pass@host/x http://host:80/x", "curl https://me:***@host/x http://host:80/x"),
        ("echo key = value; tokens=5", "echo key = value; tokens=***"),
    ],
)  # fmt: skip
def test_mask(line: str, masked: str) -> None:
    assert mask(line) == masked
    assert mask_all({"a": [line, 1, None]}) == {"a": [masked, 1, None]}


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("export HF_TOKEN=hf_abc WANDB_API_KEY='x'", ["HF_TOKEN", "WANDB_API_KEY"]),
        ("export HF_TOKEN=$(cat ~/.token)", []),
        ('export HF_TOKEN="$TOKEN" MY_KEY=${KEY}', []),
        ("export HF_TOKEN=$(cat x)y", ["HF_TOKEN"]),
        ("module load cuda", []),
    ],
)
def test_a_reference_is_no_secret(line: str, names: list[str]) -> None:
    assert secret_names(line) == names


def test_no_file_that_is_shown_holds_a_secret(tmp_path: Path) -> None:
    run, secret = RunDir(tmp_path / "run"), 'hf_it\'s a "secret"'
    setup = ["module load cuda", f"export HF_TOKEN='{secret[:5]}' WANDB_API_KEY=wb_{secret[:5]}"]
    prepare(make_spec(run.path, {"setup": setup, "heal": {"setup": setup}}, sft={}), run)
    Ledger(run.ledger).append(Failed("sft", attempt="7-0", message=f"hpc-rlhf: setup failed at: {setup[1]}"))
    page = make_page(run)
    for text in (run.ledger.read_text(), run.plan_json.read_text(), page):
        assert "HF_TOKEN=***" in text
        assert secret[:5] not in text
    assert secret[:5] in run.job_yaml.read_text()  # from which the scripts are rendered
    assert "module load cuda" in page


def test_check_warns_of_a_secret_in_setup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = {
        "name": "x", "run_dir": str(tmp_path / "run"), "data": {"sources": [{"demo": 100}]},
        "models": {"actor": "facebook/opt-125m"}, "stages": {"sft": {}},
    }  # fmt: skip
    for line, warns in (("export HF_TOKEN=hf_abc", True), ("export HF_TOKEN=$(cat ~/.hf)", False)):
        (tmp_path / "job.yaml").write_text(json.dumps({**spec, "slurm": {"setup": [line]}}))
        assert main(["check", str(tmp_path / "job.yaml")]) == 0
        output = capsys.readouterr().out
        assert ("warning: slurm.setup holds the value of HF_TOKEN" in output) == warns
        assert "hf_abc" not in output
