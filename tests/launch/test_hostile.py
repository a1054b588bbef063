"""Specs that try to break out: each is refused, or its script does what any script does and nothing else.

A few of them run with the other tests; ``make fuzz`` runs all.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.submit import preview
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec
from tests.launch.test_render import run_script

# `LEFT` is a file that must not appear.
PAYLOADS = [
    "x\ntouch LEFT", "x\n#SBATCH --wrap='touch "
                     "LEFT'", "x\r\ntouch LEFT", "$(touch LEFT)", "`touch LEFT`", "; touch LEFT", "x; touch LEFT #",
    "&& touch LEFT", "| touch LEFT", "x > LEFT", "' ; touch LEFT ; "
                                                 "'", '" ; touch LEFT ; '
                                                      '"', "'$(touch LEFT)'", '"$(touch LEFT)"', "\\\"; touch LEFT; \\\"",  # noqa: E501
    "\\\n touch LEFT", "${IFS}touch${IFS}LEFT", "$((1+a[$(touch "
                                                "LEFT)]))", "{{ ''.__class__.__mro__[1].__subclasses__() "
                                                            "}}", "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__.os.system('touch LEFT') "
    "}}", "../../LEFT", "/../../../../tmp/LEFT", "a/../../LEFT", "~root/LEFT", "${HOME}/../LEFT",
    "--wrap=touch "
    "LEFT", "-o LEFT", "%j/../LEFT", "x\x00touch LEFT", "x\x1b]0;LEFT\x07", "\u202etouch LEFT", "\u2028touch LEFT", "\u0085touch LEFT", "ｔouch; ﹔touch LEFT",  # noqa: E501
    "!!python/object/apply:os.system ['touch "
    "LEFT']", "*anchor", "x" * 100_000, "\ud83d\ude00'; touch LEFT", "EOF\ntouch LEFT\nEOF",
]  # fmt: skip
RAW = [
    "!!python/object/apply:os.system ['touch "
    "LEFT']", "!!python/name:os.system", "&a [*a]", "{<<: *a}", "!include /etc/passwd",
    "&a [&b [&c [x, x], *c, *c, *c, *c, *c, *c, *c], *b, *b, *b, *b, *b, *b, "
    "*b]", "[" * 500 + "]" * 500, "|\n  touch LEFT", "? [x]\n: y",
]  # fmt: skip


def whole_spec(run_dir: str) -> dict[str, Any]:
    """Every text field, set to a valid value."""
    container = {"runtime": "apptainer", "image": "img.sif", "mounts": ["/data:/data"]}
    slurm = {
        "partition": "gpu", "account": "a", "qos": "q", "time": "1:00:00", "gpus_per_node": 2, "gres": "gpu:2", "mem": "9G", "constraint": "c", "exclude": "n1",  # noqa: E501
        "nodelist": "n2", "reservation": "r", "licenses": "l:1", "mail_type": "END", "mail_user": "m@x.org", "comment": "c", "container": container, "extra": {"switches": "1"},  # noqa: E501
    }  # fmt: skip
    return {
        "name": "demo",
        "run_dir": run_dir,
        "slurm": slurm,
        "data": {
            "sources": [{"path": "org/set", "format": "hh", "split": "train", "subset": "s"}],
            "template": "plain",
        },
        "models": {"actor": "org/actor", "reward": {"from_scratch": {"model_type": "opt", "vocab_size": 512}}},
        "stages": {"sft": {"precision": "bf16", "schedule": "cosine", "slurm": {"partition": "p"}}},
    }


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from places(node[key], (*path, key))
    else:
        yield path


def changed(tree: dict[str, Any], path: tuple[Any, ...], value: Any = None, name: str | None = None) -> dict[str, Any]:
    """The tree with another value at a path, or with the key there renamed."""
    tree = copy.deepcopy(tree)
    inside: Any = tree
    for key in path[:-1]:
        inside = inside[key]
    if name is None:
        inside[path[-1]] = value
    elif isinstance(inside, dict):
        inside[name] = inside.pop(path[-1])
    return tree


def hostile_texts(run_dir: str) -> list[str]:
    """Each payload as the value and as the name of each field; and hostile YAML."""
    good = whole_spec(run_dir)
    texts = []
    for path in places(good):
        texts += [json.dumps(changed(good, path, payload)) for payload in PAYLOADS]
        marked = yaml.safe_dump(changed(good, path, "PLACE"), allow_unicode=True)
        texts += [marked.replace("PLACE", raw, 1) for raw in RAW]
        texts += [json.dumps(changed(good, path, name=payload)) for payload in PAYLOADS[:4]]
    return texts


def everything_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "stubs" not in path.parts and "out" not in path.parts}


def taken(file: Path) -> JobSpec | str:
    """The spec that submit would submit, or its error."""
    try:
        spec = load_spec(file)
        preview(make_plan(spec), spec)
    except HpcRlhfError as error:
        return str(error)
    return spec


def test_hostile_specs_are_refused_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work.parent))
    texts = hostile_texts(str(work / "run"))
    if not os.environ.get("HPC_RLHF_FUZZ"):
        texts = random.Random(1).sample(texts, 120)
    ran = 0
    for text in texts:
        (tmp_path / "job.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        before = everything_below(tmp_path)
        spec = taken(tmp_path / "job.yaml")
        if isinstance(spec, str):
            assert all(line.isprintable() for line in spec.splitlines()), text
            assert "Traceback" not in spec, text
            assert everything_below(tmp_path) == before, text
        elif Path(spec.run_dir).is_relative_to(tmp_path):
            assert run_script(spec, "sft", tmp_path)[::2] == (0, ""), text
            ran += 1
            run_dir, new = Path(spec.run_dir), everything_below(tmp_path) - before - {tmp_path / "cwd"}
            assert all(path.is_relative_to(run_dir) or path in run_dir.parents for path in new), text
            assert not [path for path in tmp_path.rglob("LEFT*") if path.is_file()], text
    assert ran > 3
