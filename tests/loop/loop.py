"""Rounds of training as their users go through them: run, serve, votes over HTTP, next, run.

The votes come from a program that likes short polite responses, which then judges the rounds as well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from hpc_rlhf import intervals
from hpc_rlhf.intervals import Interval
from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.train.data import demo

_POLITE = [style.format("").strip() for style in demo.POLITE]
_RUDE = [style.format("").strip() for style in demo.RUDE]
SHORT = 45  # characters; longer responses get a thumb down


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def hpc_rlhf(*args: object) -> str:
    """Run a command, which must succeed, and return its output."""
    command = [sys.executable, "-m", "hpc_rlhf.cli", *map(str, args)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def run_here(spec: Path, run: Path, *options: str) -> None:
    """Run a job on this machine."""
    hpc_rlhf("run", spec, "--set", f"run_dir={run}", *options)


def taste(response: str) -> float:
    """How much the program likes a response: politeness first, then brevity."""
    manners = any(each in response for each in _POLITE) - any(each in response for each in _RUDE)
    return manners - len(response) / 1000


@contextmanager
def serving(run: Path, *options: str) -> Iterator[httpx.Client]:
    """A client of a server in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "hpc_rlhf.cli", "serve", str(run), "--port", str(port), *options]
    server = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        printed = "".join(islice(server.stdout, 4))
        token = re.search(r"OPENAI_API_KEY=(\S+)", printed)
        assert token is not None, printed
        headers = {"Authorization": f"Bearer {token[1]}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", headers=headers, timeout=60) as client:
            yield client
    finally:
        server.terminate()
        server.wait(30)


def vote(client: httpx.Client, models: list[str], prompts: list[str]) -> None:
    """Ask models, one or two, and vote on each of their responses or pairs of them."""

    def ask(prompt: str, seed: int, model: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 32, "seed": seed}
        answer = client.post("/chat/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    def judge(seed: int, prompt: str) -> None:
        responses = [ask(prompt, 2 * seed + side, model) for side, model in enumerate(models)]
        likes = [taste(response) for response in responses]
        if len(models) == 1:
            kind, choice = "thumbs", "up" if likes[0] > 0 and len(responses[0]) <= SHORT else "down"
        else:
            kind, choice = "pair", "tie" if likes[0] == likes[1] else "left" if likes[0] > likes[1] else "right"
        messages = [{"role": "user", "content": prompt}]
        body = {"kind": kind, "models": models, "messages": messages, "responses": responses, "vote": choice}
        client.post("/feedback", json=body).raise_for_status()

    with ThreadPoolExecutor(8) as people:
        list(people.map(judge, range(len(prompts)), prompts))


def next_round(
    first: Path, folder: Path, models: list[str], *options: str, train: Callable[..., None] = run_here
) -> RunDir:
    """Train the next round of a copy of a run, after 300 votes on the responses of its models.

    Args:
        options: the last arguments of ``train``, whose first are the next round's spec and run directory.
    """
    run, spec = folder / first.name, folder / "next.yaml"
    shutil.copytree(first, run)
    hpc_rlhf("relocate", run)
    prompts = [row["prompt"] for row in demo.dialogues(300, seed=99)]  # some of them are held out
    with serving(run, "--stage", models[0]) as client:
        vote(client, models, prompts)
    hpc_rlhf("next", run, "--out", spec)
    following = folder / f"{first.name}-round2"
    train(spec, following, *options)
    return RunDir(following)


def answers(run: RunDir) -> list[dict[str, Any]]:
    """The prompts of a run's evaluation, with the models' responses."""
    return [json.loads(line) for line in run.stage("eval").answers.read_text().splitlines()]


def like(run: RunDir, model: str, against: str = "start") -> Interval:
    """How often the program likes a model's response more than another model's, on the prompts of the evaluation; a tie
    counts half."""
    likes = [(taste(row["answers"][model]), taste(row["answers"][against])) for row in answers(run)]
    return intervals.share(sum((ours > theirs) + (ours == theirs) / 2 for ours, theirs in likes), len(likes))
