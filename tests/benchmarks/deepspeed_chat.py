"""DeepSpeed-Chat's three steps, rewritten for today's transformers and DeepSpeed.

Held against its sources (microsoft/DeepSpeedExamples, applications/DeepSpeed-Chat): the same engines (bf16, clipping at
1, betas 0.9 and 0.95, cosine schedule), every sequence padded to 512, a v_head over all places and a loop over pairs,
prompts padded to the left to 128, answers by transformers' generate, four forward passes over prompts and answers, one
actor and one critic update. EMA, LoRA, offload and the dead hybrid engine are off. Its other settings are the fastest
it has. Three things differ, so that both sides do the same work: answers are sampled, pad is not EOS, and AdamW is
torch's fused one (DeepSpeed's FusedAdam is a CUDA kernel to be compiled).
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.launch.local.environment import free_port
from tests.benchmarks import workload
from tests.benchmarks.measure import Clock, Result, main


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _join() -> None:
    import deepspeed

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
        os.environ.setdefault(name, value)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _config(samples: int, zero: int = 0) -> dict[str, Any]:
    return {
        "train_batch_size": samples, "train_micro_batch_size_per_gpu": samples, "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero}, "bf16": {"enabled": workload.precision() == "bf16"},
        "gradient_clipping": 1.0, "prescale_gradients": False, "wall_clock_breakdown": False,
    }  # fmt: skip


def _trained(model: nn.Module, samples: int, steps: int, lr: float) -> Any:
    import deepspeed
    from transformers import get_scheduler

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=_config(samples))
    return engine


def _frozen(model: nn.Module, samples: int) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=_config(samples))
    engine.eval()
    return engine


def _causal(options: Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.work / "model", dtype=workload.dtype())


def _padded(rows: list[list[int]], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """Ids (rows, width) padded on the right, and their mask, int64."""
    ids = torch.full((len(rows), width), pad)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    mask = torch.arange(width) < torch.tensor([len(tokens) for tokens in rows]).unsqueeze(1)
    return ids.to(_device()), mask.long().to(_device())


def _batches(options: Namespace, stage: str) -> Iterator[list[dict[str, list[int]]]]:
    rows = cycle(workload.rows(options.work, stage))
    for _ in range(options.steps):
        yield list(islice(rows, options.samples))


def _samples(options: Namespace) -> int:
    return int(options.samples * (options.steps - options.warm_up))


def _dtype(engine: Any) -> torch.dtype:
    dtype: torch.dtype = next(engine.module.parameters()).dtype
    return dtype


def sft(options: Namespace) -> Result:
    _join()
    engine = _trained(_causal(options), options.samples, options.steps, 1e-3)
    pad, clock, tokens, loss = engine.module.config.pad_token_id, Clock(), 0, torch.zeros(())
    for step, batch in enumerate(_batches(options, "sft")):
        rows = [row["prompt_ids"] + row["chosen_ids"] for row in batch]
        ids, mask = _padded(rows, pad, workload.LONGEST)
        labels = torch.where(mask.bool(), ids, -100)
        loss = engine(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        clock.step()
        tokens += sum(map(len, rows)) * (step >= options.warm_up)
    return clock.result(options.warm_up, _samples(options), tokens, _dtype(engine), loss=float(loss.detach()))


class Scorer(nn.Module):
    """A body with a head that returns a value per position."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.v_head = nn.Linear(body.config.word_embed_proj_dim, 1, bias=False, dtype=workload.dtype())

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.body(ids, attention_mask=mask, use_cache=False)[0]
        values: Tensor = self.v_head(hidden).squeeze(-1)
        return values


class PairLoss(nn.Module):
    """Step 2's loss: per pair, the mean from the first difference to the end of the longer one."""

    def __init__(self, scorer: Scorer, pad: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.pad = pad

    def _end(self, ids: Tensor) -> int:
        padding = (ids == self.pad).nonzero()
        return int(padding[0].item()) if len(padding) else len(ids)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        values = self.scorer(ids, mask)
        losses, chosen_scores, rejected_scores = [], [], []
        half = len(ids) // 2
        for chosen, rejected, good, bad in zip(ids[:half], ids[half:], values[:half], values[half:], strict=True):
            ends = self._end(chosen), self._end(rejected)
            differ = (chosen != rejected).nonzero()
            first = int(differ[0].item()) if len(differ) else max(ends) - 1
            margin = good[first : max(ends)] - bad[first : max(ends)]
            chosen_scores.append(good[ends[0] - 1])
            rejected_scores.append(bad[ends[1] - 1])
            losses.append(-F.logsigmoid(margin).mean())
        torch.stack(chosen_scores), torch.stack(rejected_scores)  # it returns both
        return torch.stack(losses).mean()


def _scorer(options: Namespace) -> Scorer:
    from transformers import AutoModel

    torch.manual_seed(workload.SEED)
    return Scorer(AutoModel.from_pretrained(options.work / "model", dtype=workload.dtype()))


def reward(options: Namespace) -> Result:
    _join()
    scorer = _scorer(options)
    pad = scorer.body.config.pad_token_id
    engine = _trained(PairLoss(scorer, pad), options.samples, options.steps, 1e-3)
    clock, tokens, loss = Clock(), 0, torch.zeros(())
    for step, batch in enumerate(_batches(options, "reward")):
        rows = [row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids") for row in batch]
        ids, mask = _padded(rows, pad, workload.LONGEST)
        loss = engine(ids, mask)
        engine.backward(loss)
        engine.step()
        clock.step()
        tokens += sum(map(len, rows)) * (step >= options.warm_up)
    return clock.result(options.warm_up, _samples(options), tokens, _dtype(engine), loss=float(loss.detach()))


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


class Ppo:
    """Step 3 with DeepSpeed-Chat's constants: KL 0.1, score clip 5, both clip ranges 0.2, gamma 1, lambda 0.95."""

    def __init__(self, options: Namespace) -> None:
        samples = options.samples
        self.actor = _trained(_causal(options), samples, options.steps, 1e-5)
        self.ref = _frozen(_causal(options), samples)
        self.critic = _trained(_scorer(options), samples, options.steps, 1e-5)
        self.reward = _frozen(_scorer(options), samples)
        self.pad: int = self.actor.module.config.pad_token_id

    def experience(self, prompts: Tensor, mask: Tensor) -> dict[str, Tensor]:
        for engine in (self.actor, self.critic):
            engine.eval()
        start = prompts.shape[1]
        with torch.no_grad():
            ids = self.actor.module.generate(
                prompts, attention_mask=mask, max_length=start + workload.ANSWER, pad_token_id=self.pad,
                do_sample=True, top_k=0, top_p=1.0,
            )  # fmt: skip
        for engine in (self.actor, self.critic):
            engine.train()
        real = ids.not_equal(self.pad).long()
        with torch.no_grad():
            logits = self.actor(ids, attention_mask=real).logits
            ref_logits = self.ref(ids, attention_mask=real).logits
            scored = self.reward(ids, real)
            ends = [
                int(start + answer[0].item()) if len(answer := (row[start:] == self.pad).nonzero()) else len(row)
                for row in ids
            ]
            scores = torch.stack([row[end - 1] for row, end in zip(scored, ends, strict=True)])
            values = self.critic(ids, real)[:, :-1]
        old = _log_probs(logits[:, :-1], ids[:, 1:])
        ref = _log_probs(ref_logits[:, :-1], ids[:, 1:])
        return {
            "ids": ids, "real": real, "old": old, "ref": ref, "values": values, "scores": scores,
            "start": torch.tensor(start - 1),
        }  # fmt: skip

    def learn(self, made: dict[str, Tensor]) -> float:
        ids, real, old, values = (made[name] for name in ("ids", "real", "old", "values"))
        start = int(made["start"])
        actions = real[:, 1:]
        with torch.no_grad():
            rewards = -0.1 * (old - made["ref"])
            ends = start + actions[:, start:].sum(1) + 1
            for row, end, score in zip(rewards, ends, made["scores"].clamp(-5, 5), strict=True):
                row[start:end][-1] += score
            for row, end in enumerate(ends):
                rewards[row, end:] = 0
                values[row, end:] = 0
            advantages, returns = self._advantages(values, rewards, start)
        mask = actions[:, start:]
        logits = self.actor(ids, attention_mask=real, use_cache=False).logits
        new = _log_probs(logits[:, :-1], ids[:, 1:])
        ratio = ((new[:, start:] - old[:, start:]) * mask).exp()
        worst = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        actor_loss = (worst * mask).sum() / mask.sum()
        self.actor.backward(actor_loss)
        self.actor.step()
        guess = self.critic(ids, real)[:, :-1][:, start:]
        before = values[:, start:]
        near = guess.clamp(before - 0.2, before + 0.2)
        worst = torch.max((guess - returns) ** 2, (near - returns) ** 2)
        critic_loss = 0.5 * (worst * mask).sum() / mask.sum()
        self.critic.backward(critic_loss)
        self.critic.step()
        return actor_loss.item() + critic_loss.item()

    @staticmethod
    def _advantages(values: Tensor, rewards: Tensor, start: int) -> tuple[Tensor, Tensor]:
        last: Tensor | float = 0.0
        backwards = []
        length = rewards.shape[1]
        for t in reversed(range(start, length)):
            following = values[:, t + 1] if t < length - 1 else 0.0
            last = rewards[:, t] + following - values[:, t] + 0.95 * last
            backwards.append(last)
        advantages = torch.stack(backwards[::-1], dim=1)
        return advantages, advantages + values[:, start:]


def ppo(options: Namespace) -> Result:
    _join()
    trainer, clock, tokens, length, loss = Ppo(options), Clock(), 0, 0, math.nan
    for step, batch in enumerate(_batches(options, "ppo")):
        flipped = [row["prompt_ids"][::-1] for row in batch]
        ids, mask = _padded(flipped, trainer.pad, workload.PROMPT)
        made = trainer.experience(ids.flip(1), mask.flip(1))
        loss = trainer.learn(made)
        clock.step()
        length = int(made["real"].sum())
        tokens += length * (step >= options.warm_up)
    answer = (length - int(mask.sum())) / options.samples
    dtype = _dtype(trainer.actor)
    return clock.result(options.warm_up, _samples(options), tokens, dtype, loss=loss, answer_tokens=answer)


if __name__ == "__main__":
    main({"sft": sft, "reward": reward, "ppo": ppo})
