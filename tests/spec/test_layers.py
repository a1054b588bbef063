"""`extends` and `--set` merge values, and every value keeps its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.spec.load import load_spec
from tests.spec.texts import GOOD, problems_in, write


def test_mappings_are_merged_and_lists_replaced(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "extends: ../base.yaml\nslurm: {nodes: 4}\n", "middle.yaml")
    top = write(tmp_path, "extends: deep/middle.yaml\nname: top\ndata: {sources: [{demo: 50}]}\nstages: {ppo: null}\n")
    spec = load_spec(top)
    assert (spec.name, spec.slurm.nodes, spec.slurm.partition) == ("top", 4, "gpu")
    assert [source.demo for source in spec.data.sources] == [50]
    assert spec.stage_names == ("sft", "reward")


def test_problem_in_a_base_points_at_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, GOOD.replace("lr: 1e-4", "lr: no"), "base.yaml")
    top = write(tmp_path, "extends: base.yaml\nseed: -1\n")
    assert [(p.source, p.line) for p in problems_in(top)] == [(str(base), 17), (str(top), 2)]


def test_circular_extends_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    b = write(tmp_path, "extends: a.yaml\n", "b.yaml")
    (problem,) = problems_in(b)
    assert "extends this file again" in problem.what


@pytest.mark.parametrize("base", ["[a]", "12", "''", '"a\\0b"', "x" * 5000, "'.'"])
def test_missing_base_is_rejected(tmp_path: Path, base: str) -> None:
    (problem,) = problems_in(write(tmp_path, f"extends: {base}\n"))
    assert (problem.line, problem.path) == (1, "extends")


def test_set_replaces_and_creates_values(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    sets = ["stages.sft.lr=2e-6", "data.sources.1.demo=50", "stages.reward.slurm.nodes=3", "slurm.extra={switches: 1}", "slurm.time=60", "name=a=b", "name=x"]  # fmt: skip  # noqa: E501
    spec = load_spec(path, sets)
    assert spec.stages.sft is not None
    assert (spec.stages.sft.lr, spec.data.sources[1].demo, spec.stage("reward").slurm.nodes) == (2e-6, 50, 3)
    assert (spec.slurm.extra, spec.slurm.time, spec.name) == ({"switches": "1"}, "60", "x")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("stages.ppo.lr=1e-6", "--set stages.ppo.lr: is not a field (did you mean actor_lr or critic_lr?)"),
        ("stages.sft.lr=fast", "--set stages.sft.lr: must be a number, not 'fast'"),
        ("stages.ppo.slurm={nodes: 0}", "--set stages.ppo.slurm: stages.ppo.slurm.nodes: must be at least 1, not 0"),
        ("seed", "--set seed: does not have the form a.b.c=VALUE (such as --set stages.ppo.epochs=2)"),
        ("=3", "--set : does not have the form a.b.c=VALUE"),
        ("a..b=3", "--set a..b: does not have the form a.b.c=VALUE"),
        ("data.sources.2.demo=3", "--set data.sources.2.demo: '2' is not an index of this list (valid ones "
                                  "are 0 to 1)"),
        ("data.sources.x=3", "--set data.sources.x: 'x' is not an index of this list"),
        ("name.x=3", "--set name.x: there is no 'x' in 'good', which is not a mapping"),
        ("name={", "--set name: is not YAML: "),
        ("name=a\nb: c", "--set name: is not YAML: "),
        ("name=\udcff", "--set name: contains the control character '\\udcff'"),
        ("extends=other.yaml", "--set extends: is not a field"),
    ],
)  # fmt: skip
def test_invalid_set_is_reported(tmp_path: Path, option: str, expected: str) -> None:
    (problem,) = problems_in(write(tmp_path, GOOD), option)
    assert str(problem).startswith(expected)


def test_all_invalid_sets_are_reported(tmp_path: Path) -> None:
    assert len(problems_in(write(tmp_path, GOOD), "a", "name.x=3")) == 2
