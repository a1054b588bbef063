"""hpc-rlhf serve with the real vLLM, through OpenAI's client: what a request means is the same with both engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.train.chat import ChatModel
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.text_stream import TextStream
from tests.launch.specs import make_spec
from tests.train import tiny
from tests.train.rollout.test_vllm_server import running

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CONTEXT = 128
HI: Any = [{"role": "user", "content": "Hi"}]
# vLLM has no attention for smaller heads.
SHAPE: dict[str, Any] = {
    "vocab_size": 300, "max_position_embeddings": CONTEXT, "hidden_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass
class Served:
    process: subprocess.Popen[str]
    client: openai.OpenAI
    here: ChatModel

    def ask(self, messages: Any = HI, **fields: Any) -> Any:
        fields = {"model": "sft", "max_tokens": 12, "temperature": 0, **fields}
        return self.client.chat.completions.create(messages=messages, **fields)

    def text(self, messages: Any = HI, **fields: Any) -> str:
        return str(self.ask(messages, **fields).choices[0].message.content)


@pytest.fixture(scope="module")
def served(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    run = RunDir(tmp_path_factory.mktemp("serve") / "run")
    run.path.mkdir(mode=0o700)
    run.job_yaml.write_text(dump_spec(make_spec(run.path)))
    folder = run.stage("sft").model
    export(tiny.causal("llama", **SHAPE), tiny.tokenizer(), folder, is_main=True)
    manifest.write(folder, {"stage": "sft"})
    port = free_port()
    command = [sys.executable, "-m", "hpc_rlhf.cli", "serve", str(run.path), "--engine", "vllm", "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            token = process.stdout.readline().strip().rpartition("#")[2]
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0) as client:
                yield Served(process, client, ChatModel(folder))
        finally:
            process.kill()


def test_greedy_responses_are_those_of_the_engine_in_process_also_streamed_and_16_at_once(served: Served) -> None:
    questions = [f"Say {number}" for number in range(16)]

    def streamed(question: str) -> str:
        chunks = served.ask([{"role": "user", "content": question}], max_tokens=40, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    expected = ["".join(served.here.stream([("human", each)], 40, 0.0, seed=0)) for each in questions]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(streamed, questions)) == expected
    assert len(set(expected)) > 8
    whole = served.ask([{"role": "user", "content": questions[0]}], max_tokens=40)
    assert whole.choices[0].message.content == expected[0]
    assert whole.usage.prompt_tokens == len(served.here.prompt([("human", questions[0])]))


def test_a_length_and_a_stop_text_end_a_response(served: Served) -> None:
    text = served.text(max_tokens=40)
    stop = next(character for character in text[5:] if character.isalnum() and character not in text[:5])
    cut = served.ask(max_tokens=40, stop=[stop])
    assert cut.choices[0].message.content == text.partition(stop)[0].rstrip()
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens < 40) == ("stop", True)
    short = served.ask(max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    prompt = short.usage.prompt_tokens
    served.ask(max_tokens=CONTEXT - prompt)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens"):
        served.ask(max_tokens=CONTEXT - prompt + 1)


def test_a_seed_repeats_a_response(served: Served) -> None:
    def drawn(seed: int) -> str:
        return served.text(max_tokens=30, temperature=1, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(-5) == drawn(-5)


@torch.no_grad()
def test_tokens_are_drawn_at_the_temperature_from_the_most_likely_ones(served: Served) -> None:
    temperature, top_p, draws = 0.7, 0.8, 600
    here: Any = served.here
    prompt = torch.tensor([here.prompt([("human", "Hi")])])
    logits = here.batch.decode_step.model(input_ids=prompt).logits[0, -1] / temperature
    likely, tokens = logits.softmax(0).sort(descending=True)
    kept = int((likely.cumsum(0) < top_p).sum()) + 1
    expected: Counter[str] = Counter()
    for share, token in zip((likely[:kept] / likely[:kept].sum()).tolist(), tokens[:kept].tolist(), strict=True):
        stream = TextStream(here.tokenizer)
        expected[stream.push(token) + stream.finish()] += share * draws

    def drawn(seed: int) -> str:
        return served.text(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)

    with ThreadPoolExecutor(16) as threads:
        seen = Counter(threads.map(drawn, range(draws)))
    assert seen.keys() <= expected.keys()
    frequent = [text for text, count in expected.items() if count >= 5]
    rare = draws - sum(expected[text] for text in frequent), draws - sum(seen[text] for text in frequent)
    pairs = [(expected[text], seen[text]) for text in frequent] + ([rare] if rare[0] >= 5 else [])
    statistic = sum((count - mean) ** 2 / mean for mean, count in pairs)
    freedom = len(pairs) - 1
    assert freedom >= 3
    # Wilson and Hilferty's cube root is close to normal; 4 standard deviations.
    assert (statistic / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5


def test_a_killed_engine_ends_the_server_with_its_reason(served: Served) -> None:
    """Runs last."""
    engine, *below = _below(served.process.pid)
    chunks = served.ask(max_tokens=100, stream=True)
    next(iter(chunks))
    os.kill(below[-1], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="The inference engine failed"):
        list(chunks)
    _, errors = served.process.communicate(timeout=60)
    assert served.process.returncode == 1
    assert "error: vLLM failed: its process was killed by SIGKILL" in errors
    assert not any(map(running, [engine, *below]))


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    own = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [each for child in own for each in (child, *_below(child))]
