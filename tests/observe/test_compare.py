"""compare: ranking, differing fields, and metrics that do not compare."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hpc_rlhf.cli import group
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.sweep import lay_out
from hpc_rlhf.observe.compare import compare
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.spec.sweep import Sweep, load_any
from tests.spec.texts import GOOD, write

COEFS = "sweep: {stages.ppo.kl_coef: [0.02, 0.1, 0.5]}\n"


def make_sweep(folder: Path, sweep: str, rewards: Mapping[str, float]) -> dict[str, RunDir]:
    """The runs of a sweep: those with a reward are finished, the others up to the reward model."""
    spec = load_any(write(folder, GOOD.replace("runs/good", str(folder / "good")) + sweep))
    assert isinstance(spec, Sweep)
    lent = lay_out(spec)
    runs = {}
    for member in spec.members:
        run = runs[member.name] = RunDir(Path(member.spec.run_dir))
        (run.path / "stages").mkdir(parents=True)
        run.job_yaml.write_text(dump_spec(member.spec))
        run.plan_json.write_text(make_plan(member.spec).to_json())
        for stage in ("sft", "reward"):
            if stage in lent[member.name]:
                run.stage(stage).path.symlink_to(lent[member.name][stage].stage(stage).path)
            else:
                done(run, stage)
        if member.name in rewards:
            done(run, "ppo")
            score(run, 100, [rewards[member.name]] * 20)
    return runs


def done(run: RunDir, stage: str) -> None:
    run.stage(stage).model.mkdir(parents=True)
    manifest.write(run.stage(stage).model, {"step": 20})


def score(run: RunDir, total: int, rewards: list[float], **more: str) -> None:
    run.stage("ppo").path.mkdir(parents=True, exist_ok=True)
    first = total - len(rewards) + 1
    rows = [
        {"step": step, "total_steps": total, "time": 1.0, "kind": "train", "reward": reward, "kl": 2.0, **more}
        for step, reward in enumerate(rewards, first)
    ]
    run.stage("ppo").metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(run: RunDir, **numbers: Any) -> None:
    text = run.job_yaml.read_text().replace("  eval: null", "  eval: {}")
    run.job_yaml.write_text(text)
    run.stage("eval").model.mkdir(parents=True)
    run.stage("eval").report.write_text(json.dumps({"models": {"ppo": numbers}}))
    manifest.write(run.stage("eval").model, {"step": 1})


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.25, "high": value + 0.25}


def cli(*args: object) -> Result:
    return CliRunner().invoke(group, ["compare", *map(str, args)], catch_exceptions=False)


def rows(result: Result) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines()]


def test_sweep_is_ranked_by_final_training_reward(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, COEFS, {"kl_coef=0.02": 1.0, "kl_coef=0.1": 3.0})
    score(runs["kl_coef=0.02"], 100, [9.0] * 10 + [1.0] * 10)  # what counts is the end
    expected = [
        ["ppo.reward", "ppo.kl", "kl_coef", "state", "run"],
        ["1", "3", "2", "0.1", "done", "kl_coef=0.1"],
        ["2", "1", "2", "0.02", "done", "kl_coef=0.02"],
        ["-", "-", "-", "0.5", "not", "started", "ppo", "kl_coef=0.5"],
    ]
    for arguments in ([tmp_path / "job.yaml"], [tmp_path / "good"], [run.path for run in runs.values()]):
        result = cli(*arguments)
        assert rows(result) == expected
        assert result.stderr == "ranked by ppo.reward\n"


def test_the_last_tenth_of_a_long_run_is_averaged(tmp_path: Path) -> None:
    run = make_sweep(tmp_path, COEFS, {"kl_coef=0.1": 0.0})["kl_coef=0.1"]
    score(run, 5000, [9.0] * 4500 + [2.0] * 400 + [1.0] * 100, other="metrics" * 70)  # rows as long as real ones
    (compared,) = json.loads(cli("--json", run.path).stdout)["runs"]
    assert compared["numbers"]["ppo.reward"]["value"] == pytest.approx(1.8)


def test_evaluations_take_precedence_over_training(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, COEFS, {"kl_coef=0.02": 3.0, "kl_coef=0.1": 1.0, "kl_coef=0.5": 2.0})
    evaluate(runs["kl_coef=0.02"], reward=interval(0.5), win_rate=interval(0.6), perplexity=4.0)
    evaluate(runs["kl_coef=0.1"], reward=interval(1.5), win_rate=interval(0.7), perplexity=3.0)
    comparison = json.loads(cli("--json", tmp_path / "good").stdout)
    assert comparison["by"] == "reward"
    assert [run["name"] for run in comparison["runs"]] == ["kl_coef=0.1", "kl_coef=0.02", "kl_coef=0.5"]
    assert comparison["runs"][0]["numbers"]["reward"] == interval(1.5)
    assert comparison["runs"][0]["values"] == {"stages.ppo.kl_coef": 0.1}
    by_perplexity = cli(tmp_path / "good", "--by", "perplexity")
    assert [row[1] for row in rows(by_perplexity)[1:]] == ["3", "4", "-"]


def test_accuracy_is_what_runs_are_ranked_by(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, COEFS, {"kl_coef=0.02": 3.0, "kl_coef=0.1": 1.0})
    evaluate(runs["kl_coef=0.02"], accuracy=interval(0.5), reward=interval(3), **{"pass@4": interval(0.75)})
    evaluate(runs["kl_coef=0.1"], accuracy=interval(0.6), reward=interval(2), sources={"a": {}})
    comparison = json.loads(cli("--json", tmp_path / "good").stdout)
    assert comparison["by"] == "accuracy"
    assert [run["name"] for run in comparison["runs"]][:2] == ["kl_coef=0.1", "kl_coef=0.02"]
    assert comparison["runs"][1]["numbers"]["pass@4"] == interval(0.75)


def test_different_reward_models_are_ranked_by_win_rate(tmp_path: Path) -> None:
    names = [f"kl_coef={coef}+seed={seed}" for coef in (0.02, 0.1) for seed in (1, 2)]
    runs = make_sweep(
        tmp_path, "sweep: {stages.ppo.kl_coef: [0.02, 0.1], seed: [1, 2]}\n",
        dict(zip(names, (1.0, 30.0, 2.0, 20.0), strict=True)),
    )  # fmt: skip
    trained = cli(tmp_path / "good")
    assert "the runs have 2 different reward models, whose scales do not compare" in trained.stderr
    for run, share in zip(runs.values(), (0.5, 0.6, 0.7, 0.9), strict=True):
        evaluate(run, reward=interval(1.0), win_rate={"value": share, "low": share - 0.1, "high": share + 0.1})
    result = cli(tmp_path / "good")
    assert result.stderr == "ranked by win_rate\n"
    lines = result.stdout.splitlines()
    assert lines[1].startswith("1  90% (80–100)")
    assert [row for row in rows(result) if row[-1:] == ["0.1"] or row[-1:] == ["0.02"]] == [
        ["1", "0.8", "0.141", "2", "0.1"],
        ["2", "0.55", "0.0707", "2", "0.02"],
    ]


def test_field_that_only_some_runs_have_is_one_difference(tmp_path: Path) -> None:
    make_sweep(tmp_path, "sweep: {stages.sft.lora: [null, {rank: 8}]}\n", {})
    comparison = json.loads(cli("--json", tmp_path / "good").stdout)
    values = [run["values"]["stages.sft.lora"] for run in comparison["runs"]]
    assert values[0] is None
    assert values[1]["rank"] == 8
    assert list(comparison["runs"][0]["values"]) == ["stages.sft.lora"]
    assert comparison["by"] is None
    assert "no run has a metric to rank by yet" in cli(tmp_path / "good").stderr


def test_only_the_entry_of_a_list_that_differs_is_shown(tmp_path: Path) -> None:
    both = GOOD.replace("runs/good", str(tmp_path / "good"))
    for name, sources in (
        ("one", "{path: a/b, format: hh, weight: 0.5}, {demo: 300, columns: {}}"),
        ("two", "{path: a/b, format: hh, weight: 0.25}, {demo: 400, columns: {}}, {demo: 50}"),
    ):
        text = both.replace("good\n", f"{name}\n")
        text = text[: text.index("data:")] + f"data: {{sources: [{sources}]}}\n" + text[text.index("models:") :]
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        spec = load_any(write(tmp_path, text))
        assert not isinstance(spec, Sweep)
        run.job_yaml.write_text(dump_spec(spec))
        run.plan_json.write_text(make_plan(spec).to_json())
    runs = json.loads(cli("--json", tmp_path / "one", tmp_path / "two").stdout)["runs"]
    values = {run["name"]: run["values"] for run in runs}
    assert values["one"] == {"data.sources.0.weight": 0.5, "data.sources.1.demo": 300, "data.sources.2": None}
    assert values["two"]["data.sources.2"]["demo"] == 50
    assert "{" not in cli(tmp_path / "one", tmp_path / "two").stdout


def test_page_overlays_the_curves_of_all_runs(tmp_path: Path) -> None:
    rewards = {"kl_coef=0.02": 1.0, "kl_coef=0.1": 3.0}
    runs = make_sweep(tmp_path, COEFS, rewards)
    sft = runs["kl_coef=0.02"].stage("sft").metrics  # that of all runs
    rows = [
        {"step": step, "total_steps": 900, "kind": "train", "loss": step % 2, "time": 1.0} for step in range(1, 901)
    ]
    sft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "page.html"
    assert cli(tmp_path / "good", "--html", out).stdout == f"{out}\n"
    page = out.read_text(encoding="utf-8")
    assert cli(tmp_path / "good", "--html", "-").stdout == page
    assert "Ranked by ppo.reward." in page
    match = re.search(r'id="charts">(.*?)</script>', page)
    assert match is not None
    charts = {chart["title"]: chart for chart in json.loads(match[1])}
    assert list(charts["reward"]["lines"]) == ["kl_coef=0.1", "kl_coef=0.02"]  # the best first
    assert charts["reward"]["lines"]["kl_coef=0.1"] == [3.0] * 20
    assert list(charts["loss"]["lines"]) == ["all runs"]
    loss = charts["loss"]["lines"]["all runs"]
    assert (len(loss), set(loss)) == (300, {0.33333, 0.66667})


def test_unknown_metric_is_refused(tmp_path: Path) -> None:
    make_sweep(tmp_path, COEFS, {"kl_coef=0.1": 1.0})
    with pytest.raises(HpcRlhfError, match="no run has the metric 'bleu'") as caught:
        cli(tmp_path / "good", "--by", "bleu")
    assert caught.value.hint == "available: ppo.reward, ppo.kl"


def test_runs_that_differ_only_in_seed_are_summarized(tmp_path: Path) -> None:
    make_sweep(tmp_path, "sweep: {seed: [1, 2]}\n", {"seed=1": 1.0, "seed=2": 3.0})
    comparison = json.loads(cli("--json", tmp_path / "good").stdout)
    assert comparison["over_seeds"] == [{"values": {}, "runs": 2, "mean": 2.0, "std": pytest.approx(2**0.5)}]


def test_a_stage_that_keeps_its_best_weights_is_compared_by_them(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, COEFS, {"kl_coef=0.02": 1.0, "kl_coef=0.1": 1.0, "kl_coef=0.5": 1.0})
    for run, best in zip(runs.values(), (20.0, 2000.0, None), strict=True):
        folder = run.stage("reward").path
        if folder.is_symlink():
            folder.unlink()
            folder.mkdir()
        rows = [{"step": step, "kind": "train", "loss": step / 1000} for step in range(1, 2001)]
        kept = {} if best is None else {"best_step": best}
        rows += [{"step": step, "kind": "eval", "accuracy": 1 - step / 10000, **kept} for step in (20, 1000, 2000)]
        lines = [json.dumps({**row, "total_steps": 2000, "time": 1.0}) for row in sorted(rows, key=lambda r: r["step"])]
        run.stage("reward").metrics.write_text("".join(line + "\n" for line in lines))
    numbers = {run.name: run.numbers for run in compare(list(runs.values())).runs}
    found = {name: (of["reward.accuracy"]["value"], of["reward.loss"]["value"]) for name, of in numbers.items()}
    early, last, plain = (found[run.path.name] for run in runs.values())
    assert early == pytest.approx((1 - 20 / 10000, sum(range(1, 21)) / 20 / 1000))
    assert last == plain == pytest.approx((0.8, sum(range(1801, 2001)) / 200 / 1000))
