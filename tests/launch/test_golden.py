"""Golden files: one case for each way in which the templates branch, compared line by line.

``pytest --update-golden`` rewrites them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import pytest

from hpc_rlhf import safe_path
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates, rank_command, render
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec

CHECKOUT = Path(__file__).parents[2]
GOLDEN = CHECKOUT / "tests/golden"
JOBS = sorted((CHECKOUT / "jobs").glob("*.yaml"))

SETUP = ["module load cuda", "export NCCL_DEBUG=WARN"]
# What each case covers: the fields of the spec that select its branches.
CASES: dict[str, dict[str, Any]] = {
    # One GPU, every option left to the cluster, bf16 without ZeRO.
    "defaults": {"slurm": {"gpus_per_node": 1}, "stages": {"sft": {"zero": 0}}},
    # Several nodes, ZeRO-3 with offload, a frozen model beside the trained one. No sentinels, so that
    # failures send mail.
    "multi-node-without-heal": {
        "slurm": {"nodes": 8, "gpus_per_node": 8, "cpus_per_gpu": 8, "heal": {"enabled": False}},
        "stages": {"dpo": {"zero": 3, "offload_params": True, "offload_optimizer": True}},
        "notify": {"mail": "me@example.org"},
    },
    # Every option that a site may need, setup lines, tensor parallelism. A sentinel on its own partition sends mail.
    "site-options": {
        "slurm": {
            **{name: f"my-{name}" for name in ("partition", "account", "qos", "reservation", "constraint")},
            **{"gpus_per_node": 4, "cpus_per_gpu": 4, "gres": "gpu:a100:4", "mem": "64G", "exclusive": True},
            **{"exclude": "node[1-2]", "nodelist": "node[3-4]", "licenses": "matlab:1", "comment": "two words"},
            **{"setup": SETUP, "extra": {"hint": "nomultithread", "contiguous": True, "overcommit": False}},
            "expedite": True,
            "heal": {"partition": "cpu", "mem": "1G", "setup": SETUP[1:], "extra": {"oversubscribe": True}},
        },
        "stages": {"sft": {"tensor_parallel": 2, "zero": 1}},
        "notify": {"mail": "me@example.org"},
    },
    # DeepSpeed's launcher in an Apptainer container with GPUs, fp16 with ZeRO-2.
    "apptainer-deepspeed-launcher": {
        "slurm": {
            **{"nodes": 2, "gpus_per_node": 2, "cpus_per_gpu": 4, "launcher": "deepspeed"},
            "container": {"runtime": "apptainer", "image": "/images/rlhf.sif", "mounts": ["/data"]},
        },
        "stages": {"sft": {"precision": "fp16", "zero": 2}},
    },
    # torchrun in an Apptainer container on CPUs, in fp32.
    "apptainer-torchrun-cpu": {
        "slurm": {
            **{"ranks_per_node": 2, "launcher": "torchrun"},
            "container": {"runtime": "apptainer", "image": "/images/rlhf.sif"},
        },
        "stages": {"sft": {"precision": "fp32", "zero": 0}},
    },
    # A node for vLLM alone.
    "vllm-node": {
        "slurm": {"gpus_per_node": 4, "cpus_per_gpu": 8},
        "stages": {
            "ppo": {"rollout": {"engine": "vllm", "tensor_parallel": 2, "placement": {"separate": {"nodes": 1}}}}
        },
    },
    # srun with the Pyxis plugin.
    "pyxis": {
        "slurm": {
            "gpus_per_node": 2,
            "container": {"runtime": "pyxis", "image": "/images/rlhf.sqsh", "mounts": ["/data:/data"]},
        },
        "stages": {"sft": {}},
    },
}


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/hpc-rlhf/bin/python")
    monkeypatch.setattr(safe_path, "THIS_PYTHON", ("-u", "-P", "-m"))


def make_files(case: str, folder: Path) -> None:
    """Write everything that the templates make of a case."""
    fields = {
        "name": case,
        "run_dir": f"/scratch/runs/{case}",
        "data": {"sources": [{"demo": 100}]},
        "models": {"actor": "facebook/opt-125m"},
        **CASES[case],
    }
    spec = JobSpec.model_validate(fields)
    plan, templates = make_plan(spec), Templates()
    render(plan, folder)
    if case not in ("defaults", "site-options"):
        return
    # The scripts of the verbs doctor and serve differ in fewer options.
    job = plan.jobs[0]
    command = rank_command(plan, job)
    (folder / "doctor.sbatch").write_text(templates.doctor(plan, job, Path("/scratch/visit"), command, 66))
    (folder / "serve.sbatch").write_text(templates.serve(plan, job, command))


@pytest.mark.parametrize("case", CASES)
def test_case_renders_to_its_golden_files(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    make_files(case, tmp_path)
    golden = GOLDEN / case
    if request.config.getoption("--update-golden"):
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(tmp_path, golden)
    rendered = {path.name: path.read_text() for path in tmp_path.iterdir()}
    expected = {path.name: path.read_text() for path in golden.iterdir()}
    assert sorted(rendered) == sorted(expected)
    for name in rendered:
        assert rendered[name] == expected[name], f"{golden / name} differs"


def test_every_golden_folder_belongs_to_a_case() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


class TracingLoader(jinja2.FileSystemLoader):
    """Loads templates that record which branches of their `if` blocks are taken."""

    branches: set[str]
    taken: set[str]

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, Any]:
        source, file, uptodate = super().get_source(environment, template)
        return "".join(self._traced(source, template)), file, uptodate

    def load(self, environment: jinja2.Environment, name: str, globals: Any = None) -> jinja2.Template:
        return super().load(environment, name, {**(globals or {}), "taken": self.taken.add})

    def _traced(self, source: str, template: str) -> Iterator[str]:
        has_else: list[bool] = []
        for number, part in enumerate(re.split(r"(\{%-?\s*(?:if|elif|else|endif)\b.*?%\})", source)):
            if not number % 2:
                yield part
                continue
            keyword = re.findall(r"\w+", part)[0]
            line = source[: source.index(part)].count("\n") + 1
            branch = f"{template}:{line} {part}"
            mark = f"{{{{ taken({branch!r}) or '' }}}}"
            if keyword == "if":
                has_else.append(False)
            elif keyword == "else":
                has_else[-1] = True
            elif keyword == "endif":
                branch = f"{template}:{line} without else"
                mark = f"{{{{ taken({branch!r}) or '' }}}}"
                if not has_else.pop():
                    yield f"{{% else %}}{mark}"
                    self.branches.add(branch)
                yield part
                continue
            yield part + mark
            self.branches.add(branch)


def test_the_cases_cover_every_branch_of_the_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TracingLoader.branches, TracingLoader.taken = set(), set()
    monkeypatch.setattr("jinja2.FileSystemLoader", TracingLoader)
    for case in CASES:
        make_files(case, tmp_path / case)
    templates = {branch.partition(":")[0] for branch in TracingLoader.branches}
    with_branches = {path.name for path in (CHECKOUT / "templates").iterdir() if "{% if" in path.read_text()}
    assert templates == with_branches
    assert TracingLoader.branches - TracingLoader.taken == set()


@pytest.fixture
def job_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What every job file in jobs/ renders to."""
    monkeypatch.setenv("SCRATCH", "/scratch")
    for job in JOBS:
        render(make_plan(load_spec(job)), tmp_path / job.stem, job.parent)
    return [tmp_path / job.stem for job in JOBS]


def test_scripts_are_sound_bash(job_folders: list[Path]) -> None:
    golden = sorted(GOLDEN.glob("*/*.sbatch"))
    assert golden
    for script in chain(golden, *(folder.glob("*.sbatch") for folder in job_folders)):
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.prefix, "bin/shellcheck")
    program = shellcheck if shellcheck.exists() else "shellcheck"
    done = subprocess.run([program, *golden], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.train
def test_deepspeed_configs_use_only_keys_that_deepspeed_knows(job_folders: list[Path]) -> None:
    """DeepSpeed silently ignores an unknown key at the top level, such as zero_optimisation."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    blocks = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensor_parallel": TPTrainingConfig,
    }
    known = {value for value in vars(constants).values() if isinstance(value, str)} | set(blocks)
    folders = [*job_folders, *GOLDEN.iterdir()]
    configs = [path for folder in folders for path in sorted(folder.glob("*.ds_config.json"))]
    assert configs
    for path in configs:
        config = json.loads(path.read_text())
        assert set(config) <= known, path
        assert {"train_batch_size", "optimizer", "scheduler"}.isdisjoint(config), path
        for name in blocks.keys() & config.keys():
            blocks[name](**config[name])
