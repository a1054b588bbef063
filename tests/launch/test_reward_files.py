"""The Python files of rewards: checked before anything runs, kept with the run, and compared by content."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError, SpecError
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.launch.relocate import relocate
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec import reward_files
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec, read_spec
from hpc_rlhf.spec.stage_inputs import inputs

JOB = """
name: demo
run_dir: {run}
data: {{sources: [{{demo: 100}}]}}
models: {{actor: facebook/opt-125m}}
stages: {{grpo: {{group_size: 4, rewards: [{{format: a}},
    {{function: rewards.py:score}}]}}}}
"""
SCORE = "def score(completions, **columns):\n    return [1.0 for _ in completions]\n"


def spec_of(folder: Path, code: str | None, run: str = "run") -> JobSpec:
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(JOB.format(run=folder.parent / run))
    if code is not None:
        (folder / "rewards.py").write_text(code)
    return load_spec(folder / "job.yaml")


def prepared(spec: JobSpec) -> RunDir:
    with claim(spec, "a test") as run:
        prepare(spec, run)
    return run


def kept(run: RunDir) -> Path:
    (item,) = (item for item in read_spec(run.job_yaml).stages.grpo.rewards if item.function)  # type: ignore[union-attr]
    file, name = reward_files.split(item.function)
    assert name == "score"
    return file


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "cannot read .*/rewards.py: No such file"),
        ("def other(completions): pass", "has no function score; it has other"),
        ("x = 1", "has no function score; it has no function"),
        ("def score(completions)\n    pass", "is not Python, line 1"),
        ("def score(completions, /): pass", "score takes completions by position only"),
        ("def score(text): pass", r"needs a parameter completions, or \*\*kwargs, for the responses; it takes text"),
        ("async def score(): pass", "for the responses; it takes nothing"),
        ("def score(completions, prompt): pass", r"takes prompt, .*\(name the parameter prompts, and expect a list"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_with_its_place(
    tmp_path: Path, code: str | None, message: str
) -> None:
    with pytest.raises(SpecError, match=rf"job.yaml:7:16: stages.grpo.rewards.1.function: .*{message}") as caught:
        spec_of(tmp_path / "mine", code)
    (problem,) = caught.value.problems
    assert problem.hint


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("def score(prompts, completions, answer, level=1, *, tests, **more): pass", {"answer", "tests"}),
        ("from elsewhere import score", set()),
        ("from elsewhere import *", set()),
        ("score = make()", set()),
        ("@decorated\ndef score(x): pass", set()),
        ("if fast:\n    def score(x): pass", set()),
        ("def score(x): pass\ndef score(completion_ids): pass", set()),
    ],
)
def test_columns_that_a_function_needs(tmp_path: Path, code: str, needed: set[str]) -> None:
    (tmp_path / "rewards.py").write_text(code)
    assert reward_files.needed_columns(f"{tmp_path}/rewards.py:score") == needed


def test_a_run_keeps_the_file_that_it_began_with(tmp_path: Path) -> None:
    run = prepared(spec_of(tmp_path / "mine", SCORE))
    copy = kept(run)
    assert copy.is_relative_to(run.scripts)
    assert copy.read_text() == SCORE
    run.stage("grpo").metrics.touch()

    prepared(spec_of(tmp_path / "other", SCORE))
    (tmp_path / "mine/rewards.py").unlink()
    prepared(load_spec(run.job_yaml))
    with pytest.raises(HpcRlhfError, match=r"cannot change any more:\n  stages.grpo.rewards.1.function: .*rewards.py"):
        prepared(spec_of(tmp_path / "mine", SCORE.replace("1.0", "2.0")))

    assert kept(run) == copy
    assert copy.read_text() == SCORE


def test_the_copy_of_a_file_is_exact(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "jobs", SCORE)
    code = b"# coding: latin-1\r\n# caf\xe9\r\n" + SCORE.encode()
    (tmp_path / "jobs/rewards.py").write_bytes(code)
    assert kept(prepared(spec)).read_bytes() == code


def test_a_run_that_is_moved_keeps_its_file(tmp_path: Path) -> None:
    run = prepared(spec_of(tmp_path / "mine", SCORE))
    (tmp_path / "mine/rewards.py").unlink()
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    relocate(moved)
    assert kept(moved).is_relative_to(moved.scripts)
    prepared(load_spec(moved.job_yaml))


def test_before_training_the_file_may_change(tmp_path: Path) -> None:
    prepared(spec_of(tmp_path / "mine", SCORE))
    changed = SCORE.replace("1.0", "2.0")
    assert kept(prepared(spec_of(tmp_path / "mine", changed))).read_text() == changed


def test_until_a_stage_has_done_a_step_its_rewards_may_change(tmp_path: Path) -> None:
    run = prepared(spec_of(tmp_path / "mine", SCORE))
    stage = run.stage("grpo")
    (stage.checkpoints / "owner").mkdir(parents=True)
    stage.rewards.mkdir()
    (stage.rewards / "00000000-rollout.jsonl").touch()
    changed = SCORE.replace("1.0", "2.0")
    assert kept(prepared(spec_of(tmp_path / "mine", changed))).read_text() == changed
    assert not stage.rewards.exists()


def test_what_follows_from_a_failure_may_change_at_any_time(tmp_path: Path) -> None:
    run = prepared(spec_of(tmp_path / "mine", SCORE))
    run.stage("grpo").metrics.touch()
    run.stage("grpo").rewards.mkdir()
    job = tmp_path / "mine/job.yaml"
    job.write_text(job.read_text().replace("py:score", "py:score, on_error: skip, timeout: 5 min"))
    prepared(load_spec(job))
    assert run.stage("grpo").rewards.exists()


def test_stages_with_the_same_file_elsewhere_can_be_shared(tmp_path: Path) -> None:
    run = prepared(spec_of(tmp_path / "mine", SCORE))
    same, other = spec_of(tmp_path / "other", SCORE), spec_of(tmp_path / "third", SCORE + "\n")
    assert inputs(read_spec(run.job_yaml), "grpo") == inputs(same, "grpo") != inputs(other, "grpo")


def test_a_file_that_others_could_change_is_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "mine", SCORE)
    (tmp_path / "mine/rewards.py").chmod(0o666)
    with pytest.raises(HpcRlhfError, match="world-writable"):
        prepared(spec)
