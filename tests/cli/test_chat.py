"""hpc-rlhf chat, with a fake model that echoes its input; test_run_for_real uses a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import dump_spec
from tests.launch.specs import make_spec

FAKE = Path(__file__).parent / "fake_chat"


def make_run(tmp_path: Path, *finished: str) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.job_yaml.write_text(dump_spec(make_spec(run.path)))
    for stage in finished:
        run.stage(stage).model.mkdir(parents=True)
        manifest.write(run.stage(stage).model, {"stage": stage})
    return run


def chat(run: RunDir, *arguments: str, typed: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hpc_rlhf.cli", "chat", str(run.path), *arguments],
        env={**os.environ, "PYTHONPATH": str(FAKE)},
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_prompt_prints_only_the_response(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", "reward", "ppo")
    options = ("--max-tokens", "9", "--temperature", "0", "--seed", "4")
    assert chat(run, "--prompt", "Hi", *options) == (0, "ppo 9 0 4 after human: Hi\n", "")
    assert chat(run, "--prompt", "-", *options, typed="Hi\n") == (0, "ppo 9 0 4 after human: Hi\n", "")


def test_conversation_has_memory_until_it_is_reset(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft")
    code, out, err = chat(run, typed="one\n\ntwo\n/nonsense\n/reset\nthree\n/quit\nfour\n")
    first = "sft 256 0.7 0 after human: one"
    assert code == 0
    assert out.splitlines() == [
        first,
        f"sft 256 0.7 0 after human: one | assistant: {first} | human: two",
        "sft 256 0.7 0 after human: three",
    ]
    assert "no such command: /nonsense" in err


def test_stage_can_be_selected(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", "reward", "ppo")
    assert chat(run, "--stage", "sft", "--prompt", "Hi")[1].startswith("sft ")


def test_ema_model_needs_a_run_that_keeps_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", "reward", "ppo")
    code, _, err = chat(run, "--stage", "ema", "--prompt", "Hi")
    assert (code, "keeps no moving average" in err) == (2, True)
    fields = yaml.safe_load(run.job_yaml.read_text())
    fields["stages"]["ppo"]["ema"] = True
    run.job_yaml.write_text(yaml.safe_dump(fields))
    assert chat(run, "--stage", "ema", "--prompt", "Hi")[1].startswith("ema ")


def test_compared_models_keep_separate_histories(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", "reward", "ppo")
    saved = tmp_path / "conversation.json"
    code, out, err = chat(run, "--compare", "sft", "ppo", typed=f"one\ntwo\n/save {saved}\n/save {saved}\n")
    responses = {name: f"{name} 256 0.7 0 after human: one" for name in ("sft", "ppo")}
    assert code == 0
    assert out.splitlines() == [
        *(f"{name}: {answer}" for name, answer in responses.items()),
        *(f"{name}: {answer} | assistant: {answer} | human: two" for name, answer in responses.items()),
    ]
    assert f"saved in {saved}" in err
    assert f"not saved: {saved}: File exists" in err
    conversations = json.loads(saved.read_text())
    assert [each["stage"] for each in conversations] == ["sft", "ppo"]
    assert conversations[1]["messages"][:2] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": responses["ppo"]},
    ]


def test_responses_are_side_by_side_on_a_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", "reward", "ppo")
    command = [sys.executable, "-m", "hpc_rlhf.cli", "chat", str(run.path), "--compare", "sft", "ppo", "--prompt", "Hi"]
    env = {**os.environ, "PYTHONPATH": str(FAKE), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 4096)
        except OSError:  # its other end is closed
            break
    assert process.wait(60) == 0
    os.close(ours)
    last = output.decode().rpartition("sft 256")
    assert "ppo 256 0.7 0 after" in last[2].splitlines()[0]


def test_prompt_as_json(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", "reward", "ppo")
    code, out, err = chat(run, "--compare", "ppo", "sft", "--prompt", "too long", "--json")
    assert code == 0
    assert [each["messages"][1]["content"].split()[0] for each in json.loads(out)] == ["ppo", "sft"]
    assert "sft no longer sees the oldest 7 tokens" in err


def test_sft_model_is_used_until_ppo_is_finished(tmp_path: Path) -> None:
    assert chat(make_run(tmp_path, "sft", "reward"), "--prompt", "Hi")[1].startswith("sft ")


@pytest.mark.parametrize(
    ("finished", "arguments", "code", "message"),
    [
        ((), (), 1, "there is no finished model yet: ppo and sft are not finished"),
        (("sft",), ("--stage", "ppo"), 1, "ppo is not finished"),
        (("sft",), ("--stage", "reward"), 2, "'reward' is not one of"),
        (("sft",), ("--stage", "sft", "--compare", "sft", "ppo"), 2, "--stage cannot be used with --compare"),
        (("sft",), ("--compare", "sft", "ppo"), 1, "ppo is not finished"),
        (("sft",), ("--temperature", "nan"), 2, "nan is not a finite number"),
        (("sft",), ("--temperature", "-1"), 2, "-1.0 is not in the range"),
    ],
)
def test_unusable_requests_are_refused(
    tmp_path: Path, finished: tuple[str, ...], arguments: tuple[str, ...], code: int, message: str
) -> None:
    exit_code, out, err = chat(make_run(tmp_path, *finished), *arguments, "--prompt", "Hi")
    assert (exit_code, out) == (code, "")
    assert message in err


def test_missing_run_is_reported(tmp_path: Path) -> None:
    code, _, err = chat(RunDir(tmp_path / "nowhere"), "--prompt", "Hi")
    assert code == 2
    assert "does not exist" in err
