"""The report as text: its content, that it is self-contained, and that no text in it can execute."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.observe.goodput.accounting import measure
from hpc_rlhf.observe.report.charts import make_charts, thin
from hpc_rlhf.observe.report.page import make_page
from hpc_rlhf.observe.report.timeline import make_timeline
from hpc_rlhf.run.events import Failed, Finished, Ready, Saved, Started
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.observe.report_runs import HOSTILE, add_line, evaluate, make_reported_run
from tests.train.stages import make_run, run_stage, tiny_spec


class Elements(HTMLParser):
    """Collects the elements of a page and its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        self.text += " "

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    return make_reported_run(tmp_path / "run", monkeypatch, interruptions=2)


def charts(page: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    data: list[dict[str, Any]] = json.loads(match[1])
    return data


def test_report_describes_the_run(run: RunDir) -> None:
    words = Elements(make_page(run)).words
    assert "PPO is done: reward -0.5 → 2.25 (first std 0.8), KL 0 → 0.31." in words
    assert "2 interruptions: 2 preempted" in words
    assert "sft 7-1 node1" in words
    assert "preempted, at step 20" in words
    assert "What is a bee?" in words
    assert "An insect. reward 1.5" in words
    assert "torch 2.13.0" in words
    assert "commit 0123456789ab" in words
    assert "global_batch" in words


def test_evaluation_gives_the_outcome_and_the_responses(run: RunDir) -> None:
    answers = {"sft": "plain", "ppo": "polite", "ema": "steady", "reference": "expected"}
    evaluate(run, "\n\nHuman: Hi\n\nAssistant:", answers)
    words = Elements(make_page(run)).words
    assert "PPO wins against SFT on 70% (60–79) of 100 held-out prompts" in words
    assert "wins against SFT – 70% (60–79)" in words
    order = [
        words.index(text)
        for text in ("SFT plain", "PPO polite", "EMA of PPO steady", "the data's own response expected")
    ]
    assert order == sorted(order)


def test_charts_have_every_metric(run: RunDir) -> None:
    data = charts(make_page(run))
    titles = {chart["title"] for chart in data}
    assert {"loss", "accuracy", "reward", "entropy", "clip fractions", "throughput"} <= titles
    rows = [json.loads(line) for line in run.stage("sft").metrics.read_text().splitlines()]
    loss = data[0]
    assert loss["steps"] == [row["step"] for row in rows]
    assert loss["lines"]["loss"] == [pytest.approx(row["loss"], rel=1e-5) for row in rows]


def test_non_finite_numbers_do_not_break_charts(run: RunDir) -> None:
    bad = {"loss": math.nan, "lr": math.inf, "grad_norm": -math.inf, "perplexity": math.nan}
    for kind in ("train", "eval"):
        add_line(run.stage("sft").metrics, step=61, total_steps=61, time=1.7e9, kind=kind, **bad)
    page = make_page(run)
    assert not re.search(r"\b(NaN|Infinity)\b", page.partition('id="charts">')[2].partition("</script>")[0])
    assert charts(page)[0]["lines"]["loss"][-1] is None


def test_throughput_excludes_interruptions(run: RunDir) -> None:
    speed = next(chart for chart in charts(make_page(run)) if chart["title"] == "throughput")
    values = speed["lines"]["throughput"]
    batch = json.loads(run.plan_json.read_text())["jobs"][0]["batch"]["global"]
    assert [step for step, value in zip(speed["steps"], values, strict=True) if value is None] == [1, 21, 41]
    assert {value for value in values if value is not None} == {batch}


def test_held_out_measurements_are_dots(run: RunDir) -> None:
    for step, value in ((0, 400.0), (60, 2.5)):
        add_line(run.stage("sft").metrics, step=step, total_steps=60, time=0.0, kind="eval", perplexity=value)
    chart = next(chart for chart in charts(make_page(run)) if chart["title"].startswith("perplexity"))
    measured = {s: v for s, v in zip(chart["steps"], chart["lines"]["held out"], strict=True) if v is not None}
    assert (measured, chart["dots"]) == ({0: 400.0, 60: 2.5}, ["held out"])
    add_line(run.stage("reward").metrics, step=60, total_steps=60, time=0.0, kind="eval", accuracy=0.5)
    accuracy = next(chart for chart in charts(make_page(run)) if chart["title"] == "accuracy")
    assert list(accuracy["lines"]) == ["training", "held out"]


def test_interrupted_run_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_reported_run(tmp_path / "run", monkeypatch)
    (run.stage("ppo").model / "manifest.json").unlink()
    run.ledger.write_text(run.ledger.read_text().rpartition('{"time"')[0])
    Ledger(run.ledger).append(Failed("ppo", attempt="9-0", message="out of <memory>"))
    for ask in ("queue", "accounting"):
        monkeypatch.setattr(f"hpc_rlhf.slurm.commands.{ask}", lambda *_: {})  # Slurm has forgotten the job
    page = make_page(run)
    assert "2 of 3 stages done; ppo has failed at step 60 of 60: out of &lt;memory&gt;." in page
    run.ledger.unlink()
    for stage in ("sft", "reward", "ppo"):
        (run.stage(stage).model / "manifest.json").unlink(missing_ok=True)
        run.stage(stage).metrics.write_text('{"step": 1, "kind": "train", "los')
    assert "0 of 3 stages done; sft has not started" in make_page(run)


@pytest.mark.parametrize("evaluated", [False, True])
def test_hostile_text_is_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool) -> None:
    ours = make_page(make_reported_run(tmp_path / "plain", monkeypatch))
    run = make_reported_run(tmp_path / "run", monkeypatch, prompt=HOSTILE, answer=HOSTILE)
    if evaluated:
        evaluate(run, HOSTILE, {"sft": HOSTILE, "ppo": HOSTILE})
    with run.job_yaml.open("a", encoding="utf-8") as file:
        file.write(f"# {HOSTILE}")
    Ledger(run.ledger).append(Started("sft", attempt=HOSTILE, host=HOSTILE, versions={HOSTILE: HOSTILE}))
    Ledger(run.ledger).append(Failed("sft", attempt=HOSTILE, message=HOSTILE))
    html = make_page(run)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    page = Elements(html)
    assert r"\x00\x1b[31m\x08\x7f\x9b" in page.text
    assert [tag for tag, _ in page.elements].count("script") == [tag for tag, _ in Elements(ours).elements].count(
        "script"
    )
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "img" not in {tag for tag, _ in page.elements}
    assert "<script>alert('x')</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_report_is_self_contained(run: RunDir) -> None:
    page = make_page(run)
    for _, attributes in Elements(page).elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page


def test_report_of_a_long_run_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_reported_run(tmp_path / "run", monkeypatch, steps=3000, interruptions=40)
    page = make_page(run)
    assert len(page.encode()) < 1_500_000
    assert all(len(chart["steps"]) <= 1300 for chart in charts(page))
    assert Elements(page).words.count("preempted, at step") == 40


def test_thinning_keeps_every_peak() -> None:
    flat = [0.0] * 10_000
    flat[4321], flat[777] = 9.0, -9.0
    gaps: list[float | None] = [None] * 10_000
    gaps[5] = 1.0
    indices = thin([flat, gaps])
    assert {0, 5, 777, 4321, 9999} <= set(indices)
    assert indices == sorted(set(indices))
    assert len(indices) <= 700
    assert thin([flat[:600]]) == list(range(600))


def test_timeline_has_no_gaps(run: RunDir) -> None:
    events = list(Ledger(run.ledger).events("sft"))
    goodput = measure(events, {"sft": []})
    (bar,) = make_timeline(goodput, {"sft": "finished"}, {}).bars
    assert len(bar.marks) == 2
    for before, after in zip(bar.segments, bar.segments[1:], strict=False):
        assert before.left + before.width == pytest.approx(after.left, abs=0.2)
    assert bar.segments[-1].left + bar.segments[-1].width == pytest.approx(10_000, abs=0.2)


def test_each_of_several_rewards_has_a_curve() -> None:
    def titles(*rewards: str) -> dict[str, list[str]]:
        values = {"reward": 0.5, **{f"reward/{name}": 0.5 for name in rewards}}
        row = {"step": 1, "total_steps": 2, "time": 0.0, "kind": "train", **values}
        charts = make_charts("".join(json.dumps({**row, "step": step}) + "\n" for step in (1, 2)), "grpo", 8, [])
        return {chart.plot.title: list(chart.lines) for chart in charts}

    assert titles("math", "format")["each reward"] == ["format", "math"]
    assert "each reward" not in titles("math"), "it is the reward"


def test_invisibly_short_saves_do_not_split_a_bar() -> None:
    started = Started("sft", attempt="7-0", host="node1")
    ready = Ready("sft", attempt="7-0")
    saves = [Saved("sft", time=300.0 * at, attempt="7-0", step=at, seconds=1.0, stall=0.1) for at in range(1, 3000)]
    goodput = measure([started, ready, *saves], {"sft": []}, at_work=["sft"], now=900_000)
    (bar,) = make_timeline(goodput, {"sft": "running"}, {}).bars
    assert [segment.span for segment in bar.segments] == ["productive"]
    assert bar.totals["saving"] == "5 min 0 s"


def test_verb_writes_the_report_and_prints_its_path(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.read_text(encoding="utf-8").startswith("<!doctype html>")
    other = tmp_path / "other.html"
    assert main(["report", str(run.path), "--out", str(other)]) == 0
    assert other.exists()
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_unusable_paths_are_one_message(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run.path), "--out", str(tmp_path / "no/such/folder.html")]) == 2
    assert "cannot write: No such file or directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    run.plan_json.write_text("{")
    assert main(["report", str(run.path)]) == 1
    assert "cannot read the plan" in capsys.readouterr().err


def test_report_imports_nothing_heavy(run: RunDir) -> None:
    heavy = "torch", "deepspeed", "transformers", "datasets"
    code = (
        "import sys; from hpc_rlhf.cli import main; main(['report', sys.argv[1]]); "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.train
def test_stage_finishes_even_if_the_report_cannot_be_written(tmp_path: Path) -> None:
    """Real ranks: a finished stage writes the report, and finishes even if it cannot be written."""
    run = make_run(tiny_spec(tmp_path / "run", 1, sft={"max_steps": 2}, reward={"max_steps": 2}))
    run_stage(run, "sft", 1)
    words = Elements(run.report.read_text(encoding="utf-8")).words
    assert "1 of 2 stages done" in words
    assert re.search(r"torch \d+\.\d+", words)
    run.report.unlink()
    run.report.mkdir()
    run_stage(run, "reward", 1)
    assert Ledger(run.ledger).last(Finished, "reward") is not None
