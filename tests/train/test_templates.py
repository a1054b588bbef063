"""A model with a chat template is trained, saved and chatted with in the format of its template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.chat import ChatModel
from hpc_rlhf.train.models.export import export
from tests.train import chatty, tiny
from tests.train.stages import log_tail, make_run, run_stage, tiny_spec

pytestmark = pytest.mark.train


def test_fine_tuning_teaches_a_response_and_its_end(tmp_path: Path) -> None:
    """A base model, whose EOS ends a document, memorizes one response and ends it as its template does."""
    tokenizer = chatty.tokenizer("chatml")
    export(tiny.causal("qwen2", vocab_size=310), tokenizer, tmp_path / "base", is_main=True)
    row = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you."}]}\n'
    (tmp_path / "one.jsonl").write_text(row * 64)
    sft = {"lr": 1e-2, "max_steps": 40, "answer_only": True, "global_batch": 4}
    fields = tiny_spec(tmp_path / "run", ranks=1, sft=sft).model_dump(mode="json")
    fields["models"] = {"actor": str(tmp_path / "base")}
    fields["data"] |= {"sources": [{"path": str(tmp_path / "one.jsonl"), "format": "messages"}], "held_out": 0}
    run = make_run(JobSpec.model_validate(fields))
    assert run_stage(run, "sft", 1) == [0], log_tail(run, "sft")

    chat: Any = ChatModel(run.stage("sft").model)
    assert "".join(chat.stream([("human", "Hi")], 16, 0.0, seed=1)) == "Hello you."
    assert chat.tokenizer.eos_token == "<|im_end|>"
    asked = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    said = chat.batch.decode_step.model.generate(asked, do_sample=False, max_new_tokens=16)[0, asked.shape[1] :]
    assert chat.tokenizer.decode(said) == "Hello you.<|im_end|>"
