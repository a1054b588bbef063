"""Builds the rewards that a spec lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec import reward_files
from hpc_rlhf.spec.rewards import RewardItem, names
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.gym import COLUMN
from hpc_rlhf.train.rewards import code, gym, math
from hpc_rlhf.train.rewards.blend import Blend, Part, Source
from hpc_rlhf.train.rewards.classifier import ClassifierReward
from hpc_rlhf.train.rewards.committed import CommittedScores
from hpc_rlhf.train.rewards.exact import Exact, Format
from hpc_rlhf.train.rewards.function import FunctionReward
from hpc_rlhf.train.rewards.text import FromText, Pattern, TextReward
from hpc_rlhf.train.rewards.url import UrlReward
from hpc_rlhf.train.rewards.verifier import Verifier
from hpc_rlhf.train.rewards.workers import Pool, usual_size

# Patterns are matched in the rank itself, which does not notice a stop meanwhile.
PATTERN_SECONDS = 1.0


def text_rewards(context: StageContext, items: Sequence[RewardItem]) -> list[TextReward | None]:
    """The rewards that need no model, with None in place of the others. Collective.

    Built before models load, they fail at once if something is missing.
    """
    return [TEXT_REWARDS[item.kind](context, item) if item.kind != "model" else None for item in items]


def build_rewards(
    context: StageContext, items: Sequence[RewardItem], texts: Sequence[TextReward | None],
    trained: Source | None = None,
) -> Blend:  # fmt: skip
    """A blend of the rewards. Collective.

    Args:
        texts: see ``text_rewards``.
        trained: the run's reward model, for ``model: reward``.
    """
    parts = [
        Part(name, _source(context, item, text, trained), item.weight, item.on_error == "skip", item.kind in VARYING)
        for name, item, text in zip(names(items), items, texts, strict=True)
    ]
    committed = CommittedScores(context.files.rewards, context.checkpoints.store, context.world)
    return Blend(parts, context.tokenizer, context.world, committed if any(part.varies for part in parts) else None)


def _source(context: StageContext, item: RewardItem, text: TextReward | None, trained: Source | None) -> Source:
    if item.asks_run_model:
        assert trained is not None, "model_checks refuses such a spec"
        return trained
    return FromText(text or _model(context, item), context.tokenizer, context.world, context.stop.cancellable)


def pattern(item: RewardItem) -> Pattern | None:
    """Selects the part of a response that a reward judges."""
    return Pattern(item.format, min(item.limit, PATTERN_SECONDS)) if item.format is not None else None


def _model(context: StageContext, item: RewardItem) -> TextReward:
    assert item.own_model is not None
    budget = context.batch.micro * context.longest
    return ClassifierReward(item.own_model, context.dtype, context.world.device, budget, context.stop.should_stop)


def _exact(context: StageContext, item: RewardItem) -> TextReward:
    assert item.exact is not None
    return Exact(item.exact, pattern(item))


def _format(context: StageContext, item: RewardItem) -> TextReward:
    selects = pattern(item)
    assert selects is not None
    return Format(selects)


def _verifier(kind: str, column: str, memory: int, context: StageContext, item: RewardItem) -> Verifier:
    """A pool of processes that compare responses with a column by ``train/rewards/<kind>.py``."""
    selects = pattern(item)
    pool = Pool(
        f"hpc_rlhf.train.rewards.{kind}:make", {"selected": selects is not None}, size=usual_size(),
        timeout=item.limit, should_stop=context.stop.should_stop, memory=memory,
    )  # fmt: skip
    _start(context, pool, item.kind, "pip install 'hpc-rlhf[math,gym]' installs what it imports")
    return Verifier(item.kind, column, pool, selects)


def _start(context: StageContext, pool: Pool, where: str, hint: str) -> None:
    """Start a process of each rank's pool. Collective.

    Raises:
        HpcRlhfError: it cannot start on a rank. All ranks raise the same.
    """
    with context.stop.cancellable():
        started = pool.start()
    for error, too_long in context.world.gather((started.error, started.too_long)):
        if error is not None:
            why = error.removeprefix("could not start: SandboxError: ")
            raise HpcRlhfError(
                f"the reward {why}", where=where, hint=hint, exit_code=RUN_FAILED if too_long else INPUT_WRONG
            )


def _math(context: StageContext, item: RewardItem) -> TextReward:
    assert item.math is not None
    return _verifier("math", item.math, math.MEMORY, context, item)


def _gym(context: StageContext, item: RewardItem) -> TextReward:
    return _verifier("gym", COLUMN, gym.MEMORY, context, item)


def _code(context: StageContext, item: RewardItem) -> TextReward:
    assert item.code is not None
    selects = pattern(item)
    arguments = {
        "image": item.image, "seconds": item.limit, "memory": item.memory_bytes, "selected": selects is not None,
    }  # fmt: skip
    pool = Pool(
        "hpc_rlhf.train.rewards.code:make", arguments, size=usual_size(), timeout=item.limit + 2 * code.GRACE_SECONDS,
        should_stop=context.stop.should_stop,
    )  # fmt: skip
    hint = "load Apptainer in slurm.setup, and give an image with python3; without a sandbox, no code runs"
    _start(context, pool, f"code in {item.image}", hint)
    return Verifier("code", item.code, pool, selects)


def _url(context: StageContext, item: RewardItem) -> TextReward:
    assert item.url is not None
    return UrlReward(item.url, item.secret, item.limit, context.stop.should_stop)


def _function(context: StageContext, item: RewardItem) -> TextReward:
    assert item.function is not None
    file, name = reward_files.split(item.function)
    with context.stop.cancellable():
        return FunctionReward(file, name, item.limit, context.stop.should_stop)


# Kinds that may score the same response differently the next time.
VARYING = frozenset({"function", "code", "url", "math", "reasoning_gym"})
# Builds each kind of reward that needs no model.
TEXT_REWARDS: dict[str, Callable[[StageContext, RewardItem], TextReward]] = {
    "exact": _exact,
    "format": _format,
    "function": _function,
    "math": _math,
    "reasoning_gym": _gym,
    "code": _code,
    "url": _url,
}
