"""A sweep makes a run for every combination of values. Runs share a stage if everything that affects it is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.load import dump_spec, load_spec, read_spec
from hpc_rlhf.spec.sweep import Sweep, lenders, load_any
from tests.spec.texts import GOOD, write

SIX = "sweep: {stages.ppo.kl_coef: [0.02, 0.1], seed: [1, 2, 3]}\n"


def load_sweep(folder: Path, sweep: str, *sets: str) -> Sweep:
    found = load_any(write(folder, GOOD + sweep), sets)
    assert isinstance(found, Sweep)
    return found


def lent(sweep: Sweep) -> dict[tuple[str, str], str]:
    return lenders({member.name: member.spec for member in sweep.members})


def problems(folder: Path, sweep: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_any(write(folder, GOOD + sweep))
    return [str(problem).partition("job.yaml:")[2] for problem in caught.value.problems]


def test_every_combination_is_a_complete_spec(tmp_path: Path) -> None:
    sweep = load_sweep(tmp_path, SIX, "sweep_limit=2")
    assert [member.name for member in sweep.members] == [
        f"kl_coef={coef}+seed={seed}" for coef in (0.02, 0.1) for seed in (1, 2, 3)
    ]
    assert sweep.limit == 2
    for member in sweep.members:
        assert member.spec.stages.ppo is not None
        assert (member.spec.stages.ppo.kl_coef, member.spec.seed) == tuple(member.values.values())
        assert Path(member.spec.run_dir) == sweep.run_dir / member.name
        (tmp_path / "out.yaml").write_text(dump_spec(member.spec))
        assert "sweep" not in (tmp_path / "out.yaml").read_text()
        assert read_spec(tmp_path / "out.yaml") == member.spec
    assert len({member.spec.name for member in sweep.members}) == 6


def test_spec_without_a_sweep_is_a_single_run(tmp_path: Path) -> None:
    one = load_spec(write(tmp_path, GOOD))
    assert load_any(write(tmp_path, GOOD)) == one
    assert load_any(write(tmp_path, GOOD + SIX), ["sweep=null"]) == one


def test_loading_a_single_run_reports_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"job.yaml:23:1: sweep: makes several runs"):
        load_spec(write(tmp_path, GOOD + SIX))


def test_first_run_trains_shared_stages(tmp_path: Path) -> None:
    assert lent(load_sweep(tmp_path, SIX)) == {
        (f"kl_coef=0.1+seed={seed}", stage): f"kl_coef=0.02+seed={seed}"
        for seed in (1, 2, 3)
        for stage in ("sft", "reward")
    }


@pytest.mark.parametrize(
    ("path", "values", "shared"),
    [
        ("stages.sft.lr", "[1e-4, 2e-4]", {"reward"}),
        ("stages.reward.epochs", "[1, 2]", {"sft"}),
        ("models.reward", "[facebook/opt-125m, facebook/opt-350m]", {"sft"}),
        ("models.actor", "[facebook/opt-125m, facebook/opt-350m]", set()),
        ("data.max_prompt_tokens", "[64, 128]", set()),
        ("stages.sft.slurm.nodes", "[1, 2]", {"reward"}),  # other sums in another order
        ("stages.sft.slurm.time", "['1:00:00', '2:00:00']", {"sft", "reward", "ppo"}),
        ("stages.ppo", "[{micro_batch: 2}, null]", set()),  # prompts are shared out otherwise
        ("stages.eval", "[{}, {prompts: 64}]", {"sft", "reward", "ppo"}),
    ],
)
def test_which_fields_affect_which_stages(tmp_path: Path, path: str, values: str, shared: set[str]) -> None:
    sweep = load_sweep(tmp_path, f"sweep: {{{path}: {values}}}\n", "stages.eval={}")
    assert {stage for (_, stage) in lent(sweep)} - {"eval"} == shared


def test_run_names_are_safe_short_and_unique(tmp_path: Path) -> None:
    sweep = load_sweep(
        tmp_path,
        "sweep: {stages.sft.lr: [1e-6], stages.reward.lr: [1e-5], models.actor: [org/ab], "
        f"slurm.partition: [{'p' * 300}], stages.ppo.lora: [{{rank: 8}}], slurm.account: [null]}}\n",
    )
    (member,) = sweep.members
    start, cut, end = member.name.partition("p" * 39)
    assert start == "sft.lr=1e-06+reward.lr=1e-05+actor=org-ab+partition="
    assert cut
    assert end.endswith("+lora=rank-8+account=null")
    assert len(member.spec.name) <= 128


def test_problems_have_their_places(tmp_path: Path) -> None:
    wrong = "sweep: {stages.ppo.kl_coeff: [1, 2], seed: [4, -1]}\n"
    assert problems(tmp_path, wrong) == [
        "23:9: stages.ppo.kl_coeff: is not a field (did you mean kl_coef?)",
        "23:48: seed: must be at least 0, not -1",
    ]
    wrong = "sweep: {stages.dpo.beta: [1], name: [a, b], seed: 3}\n"
    assert [line.partition(" ")[0] for line in problems(tmp_path, wrong)] == ["23:9:", "23:31:", "23:51:"]


def test_problem_of_some_combinations_names_a_run(tmp_path: Path) -> None:
    text = GOOD.replace("    slurm: {nodes: 2}", "    global_batch: 32") + "sweep: {stages.ppo.micro_batch: [4, 3]}\n"
    with pytest.raises(SpecError) as caught:
        load_any(write(tmp_path, text))
    (problem,) = caught.value.problems
    assert (problem.line, problem.path) == (22, "stages.ppo.global_batch")
    assert problem.what.endswith("(in the run micro_batch=3)")


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("sweep: {seed: [1, 1]}", "two runs would have the folder seed=1"),
        ("sweep: {seed: []}", "must be a list of values"),
        ("sweep: {}", "must map paths to lists"),
        ("sweep: [1]", "must map paths to lists"),
        (f"sweep: {{seed: {list(range(201))}}}", "makes 201 runs; the maximum is 200"),
        ("sweep: {seed: [1]}\nsweep_limit: 0", "must be a whole number of at least 1"),
    ],
)
def test_invalid_sweep_is_reported(tmp_path: Path, sweep: str, message: str) -> None:
    (line,) = problems(tmp_path, sweep + "\n")
    assert message in line
