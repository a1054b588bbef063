"""The workload of every side: one model, one tokenizer and the same rows of token ids, prepared once."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

from hpc_rlhf.launch.local.environment import free_port
from tests.train.stages import make_run

HH = "harmless-base.jsonl.gz"


def _opt(layers: int, width: int, vocabulary: int = 4096) -> dict[str, Any]:
    """The configuration of an OPT with heads of 64."""
    return {
        "model_type": "opt", "vocab_size": vocabulary, "hidden_size": width, "ffn_dim": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "word_embed_proj_dim": width,
        "max_position_embeddings": 512, "dropout": 0.0,
    }  # fmt: skip


# The models by layers and width.
SHAPES = {
    "4 x 256": _opt(4, 256),
    "12 x 768": _opt(12, 768),
    "OPT-125M": _opt(12, 768, 50_272),
    "1 x 64": _opt(1, 64),  # for tests
}
LONGEST = 512  # tokens of a sequence in SFT and the reward model
PROMPT = ANSWER = 128  # tokens of PPO's and GRPO's longest prompt, and of each of its answers
GROUP = 8  # GRPO's responses to each prompt
SEED = 1234
# Pushes EOS below every other token, so that each response has its full length on every side.
AGAINST_EOS = 6.0
# In GRPO, responses end at each token with a probability of 1 / this: real ones have a long tail of lengths, too.
MEAN_ANSWER = 64


def source(work: Path) -> dict[str, Any]:
    """The data source of a job spec: HH pairs if present, else synthetic dialogues of the same lengths."""
    for folder in (os.environ.get("HH_RLHF"), Path(__file__).parents[3] / "shared/data/hh-rlhf"):
        if folder and (Path(folder) / HH).exists():
            return {"path": str(Path(folder) / HH), "format": "hh"}
    path = work / "made.jsonl"
    if not path.exists():
        print(f"NO HH DATA: set HH_RLHF to a folder with {HH}. Using synthetic dialogues of the same lengths.")
        work.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in _made(1712)))
    return {"path": str(path), "format": "hh"}


def _made(count: int) -> list[dict[str, str]]:
    """Synthetic pairs of transcripts; their lengths have a long tail like HH's (median 140 tokens)."""
    draw = random.Random(SEED)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvwy", k=draw.randint(2, 7))) for _ in range(3000)]

    def words_of_length(size: float) -> str:
        return " ".join(draw.choices(words, k=max(2, round(draw.lognormvariate(size, 0.8)))))

    rows = []
    for _ in range(count):
        prompt = f"\n\nHuman: {words_of_length(3.6)}\n\nAssistant:"
        rows.append({"chosen": f"{prompt} {words_of_length(3.4)}", "rejected": f"{prompt} {words_of_length(3.4)}"})
    return rows


# What GRPO rewards: responses with this letter.
REWARDED = "z"


def reward(responses: list[str]) -> list[float]:
    """GRPO's reward for the peers."""
    return [float(REWARDED in response) for response in responses]


def documents(work: Path) -> Path:
    """The chosen dialogues as documents of plain text."""
    path = work / "documents.jsonl"
    if not path.exists():
        from hpc_rlhf.spec.source import SourceSpec
        from hpc_rlhf.train.data import sources

        samples = sources.read(SourceSpec.model_validate(source(work)), SEED)
        path.write_text("".join(json.dumps({"text": one.prompt + one.chosen}) + "\n" for one in samples))
    return path


def precision() -> str:
    """bf16, or fp32 on a processor whose matrix products in bfloat16 are emulated. All sides use it."""
    import torch

    return "bf16" if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def dtype() -> Any:
    """The ``torch.dtype`` of ``precision``."""
    import torch

    return torch.bfloat16 if precision() == "bf16" else torch.float32


def job(work: Path, run: Path, stage: str, samples: int, steps: int, ranks: int = 1) -> dict[str, Any]:
    """The job spec of our side, for one stage at a time.

    Args:
        samples: samples per optimizer step.
    """
    sampled = stage in ("ppo", "grpo")
    longest = PROMPT if sampled else LONGEST // 2
    common = {
        "micro_batch": micro_batch(stage, samples, ranks),
        "global_batch": samples,
        "max_steps": steps,
        "epochs": 100,
    }
    rates = {"actor_lr": 1e-5, "critic_lr": 1e-5} if stage == "ppo" else {"lr": 1e-3}
    stages = {stage: {**common, **rates, "precision": precision(), "zero": 0, "checkpoint_every": 10**6}}
    if stage == "sft":
        stages["sft"]["answer_only"] = False  # as its peers train
    if stage == "pretrain":
        text = {"path": str(documents(work)), "format": "text"}
        stages["pretrain"] |= {"sources": [text], "sequence_length": LONGEST, "held_out": 0, "weight_decay": 0.0}
    if stage == "ppo":
        stages["ppo"]["ema"] = False
        stages["reward"] = {**common, "max_steps": 1, "lr": 1e-3}
    if stage == "grpo":
        stages["grpo"] |= {"lr": 1e-5, "group_size": GROUP, "rewards": [{"format": f".*{REWARDED}.*"}]}
    return {
        "name": "bench", "run_dir": str(run), "seed": SEED,
        "slurm": {"gpus_per_node": 0, "ranks_per_node": ranks},
        "data": {
            "sources": [source(work)], "held_out": 0,
            "max_prompt_tokens": longest, "max_answer_tokens": ANSWER if sampled else LONGEST - longest,
        },
        "models": {"actor": str(work / model(stage))},
        "stages": stages,
    }  # fmt: skip


def micro_batch(stage: str, samples: int, ranks: int) -> int:
    """Samples of a micro-batch, of ``samples`` in an optimizer step. Where responses are given it has the tokens of at
    most four of the longest, or of two in float32, which is as fast as more and takes less memory."""
    longest_at_once = 4 if precision() == "bf16" else 2
    return min({"ppo": 8, "grpo": samples}.get(stage, longest_at_once), samples // ranks)


def model(stage: str) -> str:
    """The folder of the model that a stage starts from, in that of the workload."""
    return "ending-model" if stage == "grpo" else "model"


def make(work: Path, shape: dict[str, Any]) -> None:
    """Write the shared tokenizer, initial model and tokens."""
    from transformers import AutoModelForSequenceClassification

    from hpc_rlhf.spec.job import JobSpec
    from hpc_rlhf.train.context import StageContext
    from hpc_rlhf.train.data import sources
    from hpc_rlhf.train.data.sampler import sample_at
    from hpc_rlhf.train.models.tokenizers import train_bpe
    from hpc_rlhf.train.runtime.stop_signals import StopFlag
    from hpc_rlhf.train.runtime.world import join, leave
    from hpc_rlhf.train.stages.pretrain import Text

    world = join(1)
    texts = sources.texts(JobSpec.model_validate(job(work, work / "none", "sft", 8, 1)))
    tokenizer = train_bpe(texts, shape["vocab_size"])
    tokenizer.save_pretrained(str(work / "model"))
    _model(tokenizer, shape, -AGAINST_EOS).save_pretrained(str(work / "model"))
    tokenizer.save_pretrained(str(work / "ending-model"))
    ending = math.log(shape["vocab_size"] / MEAN_ANSWER) / AGAINST_EOS  # other tokens are about equally likely
    _model(tokenizer, shape, ending).save_pretrained(str(work / "ending-model"))
    scorer = AutoModelForSequenceClassification.from_pretrained(str(work / "model"), num_labels=1)
    scorer.save_pretrained(str(work / "reward"))
    tokenizer.save_pretrained(str(work / "reward"))
    for stage in ("sft", "reward", "ppo", "grpo"):
        spec = JobSpec.model_validate(job(work, tokens(work, stage), stage, 8, 1))
        context = StageContext(spec, stage, make_run(spec), world, StopFlag(), "bench")
        rows = context.data().train
        drawn = [rows[sample_at(place, len(rows), SEED, stage)] for place in range(len(rows))]
        kept = [{k: v for k, v in row.items() if k.endswith("_ids")} for row in drawn]
        (work / f"{stage}.json").write_text(json.dumps(kept))
    spec = JobSpec.model_validate(job(work, tokens(work, "pretrain"), "pretrain", 8, 1))
    context = StageContext(spec, "pretrain", make_run(spec), world, StopFlag(), "bench")
    text = Text.prepare(context, context.stage_spec)  # type: ignore[arg-type]
    sequences = [text.train[text.index_at(place)]["ids"].tolist() for place in range(len(text.train))]
    (work / "pretrain.json").write_text(json.dumps([{"ids": ids} for ids in sequences if len(ids) == LONGEST]))
    leave()


def _model(tokenizer: Any, shape: dict[str, Any], eos: float) -> Any:
    """A fresh OPT whose last layer norm points to EOS with this factor; if negative, a response never ends."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **ids))
    with torch.no_grad():
        direction = torch.zeros(shape["hidden_size"])
        direction[0] = 1.0
        model.model.decoder.final_layer_norm.bias += AGAINST_EOS * direction
        head = model.get_output_embeddings().weight
        head[:, 0] = 0
        head[tokenizer.pad_token_id] = -AGAINST_EOS * direction
        head[tokenizer.eos_token_id] = eos * direction
    return model


def tokens(work: Path, stage: str) -> Path:
    """The run directory that holds a stage's tokens for our side."""
    return work / f"rows-{stage}"


def rows(work: Path, stage: str) -> list[dict[str, list[int]]]:
    """The same rows for the peers, in the order in which our side takes them.

    They have ``prompt_ids``, ``chosen_ids`` and, for the reward model, ``rejected_ids``; for pretraining ``ids``.
    """
    made: list[dict[str, list[int]]] = json.loads((work / f"{stage}.json").read_text())
    return made


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    make(Path(sys.argv[1]), SHAPES[sys.argv[2]])
