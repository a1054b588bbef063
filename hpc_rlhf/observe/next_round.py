"""The next round of a run: a spec that goes on from its best model, and learns from the votes on its models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.feedback import votes_of
from hpc_rlhf.observe.results import cell, read_report
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.row_counts import stage_counts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import rounds
from hpc_rlhf.spec.stages import DPO, EVALUATION, KTO, PPO, SFT, STAGE_NAMES, Data, kind_of

# How often each vote is used per epoch.
_VOTE_WEIGHT = 4
_KINDS = {"left": "pairs", "right": "pairs", "up": "thumbs", "down": "thumbs"}
# Why there is a stage that the run did not have, its learning rate as a share of that of SFT, and where this is from.
_NEW = {
    DPO.name: ("The votes are pairs.", 0.1, "as in Tülu 3 (arXiv 2411.15124)"),
    KTO.name: ("Most votes are thumbs.", 0.025, "because more soon makes responses worse on a few hundred votes"),
}
# What it takes over from the stage that fine-tuned the same model.
_TAKEN_OVER = {
    "micro_batch", "global_batch", "zero", "precision", "offload_params", "offload_optimizer", "tensor_parallel",
    "sequence_parallel", "activation_checkpointing", "chunked_mlp", "lora",
}  # fmt: skip

# A part of the spec as plain values, and a comment on it.
_Commented = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class NextRound:
    """The spec of a next round.

    Attributes:
        fields: those that are not the defaults, as plain values.
        notes: comments, by the path of the field that each is about; that on the whole spec has the empty path.
        start: the model that it starts from, and why.
    """

    fields: Mapping[str, Any]
    notes: Mapping[str, str]
    start: str


def next_round(run: RunDir, spec: JobSpec) -> NextRound:
    """The next round of a finished run.

    Args:
        spec: of the run.

    Raises:
        HpcRlhfError: no vote says which response is better, or whether one is good; or there is a next round already.
    """
    votes = _votes(run)
    number, folder = _place(run, spec)
    model, path, why = best_model(run, spec)
    names = _stages(spec, votes)
    sources = [*_old_data(run, spec, votes, names), *_new_data(run, votes, names)]
    stages = {name: _stage(spec, name) for name in names}
    if KTO.name in stages:
        stages[KTO.name][0].update(_balance(run, votes))
    counted = " and ".join(f"{count} {kind}" for kind, count in votes.items())
    notes = {
        "": f"Round {number}: it learns from the votes on the models of {run.path}: {counted}.",
        "follows": "The evaluation asks the same prompts as in that run. They are not trained on.",
        **{f"data.sources.{place}": note for place, (_, note) in enumerate(sources)},
        "data.split": "Each conversation goes to one stage, with the votes on it.",
        "models.actor": f"{model} {why}.",
        "models.reward": "" if spec.judge is None else "Trained further, on the votes as well.",
        **{f"stages.{name}": note for name, (_, note) in stages.items()},
    }
    kept = spec.model_dump(mode="json", exclude_defaults=True, include={"slurm", "data", "trackers", "notify", "share"})
    data = {**kept.pop("data"), "sources": [source for source, _ in sources]}
    data.pop("split", None)
    if len(shared := [name for name in names if kind_of(name).data.is_shared]) > 1:
        data["split"] = dict.fromkeys(shared, 1)
    fields = {
        "name": _renamed(spec.name, number),
        "run_dir": str(folder),
        "follows": str(run.path),
        "seed": spec.seed,
        "slurm": kept.pop("slurm", {}),
        **kept,
        "data": data,
        "models": {"actor": path, **_reward_model(run, spec, names)},
        "stages": {name: settings for name, (settings, _) in stages.items()},
    }
    return NextRound(fields, notes, f"{model}, which {why}")


def best_model(run: RunDir, spec: JobSpec) -> tuple[str, str, str]:
    """The name and path of a finished run's best model, and why it is the best.

    It has the highest win rate in the evaluation, or else the highest accuracy; without either, it is that of the last
    stage. If no model wins more than half against the one that all are compared with, it is that one.
    """
    paths = {model: str(run.stage(stage).policy(model)) for model, stage in spec.policies.items()}
    latest = next(model for model, stage in reversed(spec.policies.items()) if model == stage)
    if spec.evaluation is None:
        return latest, paths[latest], "was trained last; there is no evaluation"
    report = read_report(run)
    base, metrics = report["base"], report["models"]
    if base == "start" and isinstance(spec.models.actor, str):
        paths[base] = spec.models.actor
    for metric, what in (("win_rate", f"wins {{}} against {base}"), ("accuracy", "is right on {} of the prompts")):
        known = {model: metrics[model][metric] for model in paths if metric in metrics.get(model, {})}
        if not known:
            continue
        top = max(known, key=lambda model: known[model]["value"])
        if metric == "win_rate" and known[top]["value"] < 0.5 and base in paths:
            return base, paths[base], f"is better than the others: {top} {what.format(cell(metric, known[top]))}"
        return top, paths[top], f"is the best in the evaluation: it {what.format(cell(metric, known[top]))}"
    return latest, paths[latest], "was trained last; the evaluation has no win rates"


def _votes(run: RunDir) -> Counter[str]:
    """How many votes say which response is better (pairs), and how many whether one is good (thumbs)."""
    votes, _ = votes_of(run, lambda vote: True)
    counts = Counter(_KINDS[vote.vote] for vote in votes if vote.vote in _KINDS)
    if not counts:
        what = f"none of the {len(votes)} votes prefers a response" if votes else "nobody has voted on its models"
        raise HpcRlhfError(what, where=str(run.path), hint=f"people vote on the page of hpc-rlhf serve {run.path}")
    return counts


def _place(run: RunDir, spec: JobSpec) -> tuple[int, Path]:
    """The number and the folder of the next round."""
    number = len(rounds(spec)) + 1
    path = run.sweep.path if run.path.name in run.sweep.recorded()[0] else run.path
    folder = path.with_name(_renamed(path.name, number))
    if folder.exists():
        what = f"the folder of the next round exists already: {folder}"
        raise HpcRlhfError(what, where=str(run.path), hint="go on from that run, or remove it")
    return number, folder


def _renamed(name: str, number: int) -> str:
    return f"{re.sub('-round[0-9]+$', '', name)}-round{number}"


def _by_thumbs(votes: Counter[str]) -> bool:
    return votes["thumbs"] > votes["pairs"]


def _stages(spec: JobSpec, votes: Counter[str]) -> list[str]:
    """The stages of the next round: those of the run that can learn from the votes, or else DPO or KTO."""
    learning = (Data.LABELED,) if _by_thumbs(votes) else (Data.PAIRS, Data.LABELED)
    stages = {name for name in spec.trained if kind_of(name).data in learning}
    if spec.judge in stages:
        sampling = (name for name in spec.trained if kind_of(name).data is Data.PROMPTS)
        stages |= {name for name in sampling if spec.judge in spec.needs(name)}
    if not any(kind_of(name).makes_policy for name in stages):
        stages.add(KTO.name if _by_thumbs(votes) else DPO.name)
    if spec.data.held_out:
        stages.add(EVALUATION.name)
    return [name for name in STAGE_NAMES if name in stages]


def _old_data(run: RunDir, spec: JobSpec, votes: Counter[str], stages: Sequence[str]) -> Iterator[_Commented]:
    """The run's sources. Those without votes together get as many rows as there are new votes, as far as they have
    them. Where responses are sampled, they get as many as the votes have with their weight, for their prompts."""
    samples = any(kind_of(name).data is Data.PROMPTS for name in stages)
    wanted = votes.total() * (_VOTE_WEIGHT if samples else 1)
    note = f"The earlier data, with about {wanted:,} rows{', also for their prompts' if samples else ''}."
    rows = {counts.source: counts.read for stage in spec.trained for counts in stage_counts(run.stage(stage))}
    others = [source for source in spec.data.sources if not source.feedback]
    read = sum(rows.get(source.name, 0) * source.weight for source in others)
    share = wanted / read if read else 1.0
    first = {source.name: source.weight for source in rounds(spec)[0].data.sources}
    for source in spec.data.sources:
        fields = source.model_dump(mode="json", exclude_defaults=True)
        if source.feedback:
            yield fields, ""
            continue
        whole = first.get(source.name, source.weight)
        weight = min(float(f"{source.weight * share:.2g}"), whole)
        yield {**fields, "weight": weight}, note if weight < whole else ""


def _new_data(run: RunDir, votes: Counter[str], stages: Sequence[str]) -> Iterator[_Commented]:
    source = {"feedback": str(run.path), "weight": _VOTE_WEIGHT}
    times = f"Each is used {_VOTE_WEIGHT} times per epoch."
    if votes["pairs"]:
        yield {**source, "kind": "pairs"}, f"{votes['pairs']} votes for the better of two responses. {times}"
    if votes["thumbs"] and any(kind_of(name).data in (Data.LABELED, Data.PROMPTS) for name in stages):
        yield {**source, "kind": "thumbs"}, f"{votes['thumbs']} thumbs up or down. {times}"


def _reward_model(run: RunDir, spec: JobSpec, stages: Sequence[str]) -> dict[str, Any]:
    """The run's reward model, if the next round trains it further; otherwise it would judge without knowing the votes.
    One that the spec names stays."""
    if spec.judge is None:
        return spec.models.model_dump(mode="json", include={"reward"}, exclude_none=True)
    return {"reward": str(run.stage(spec.judge).model)} if spec.judge in stages else {}


def _stage(spec: JobSpec, name: str) -> _Commented:
    """A stage with the settings that it had, or that follow from those of other stages."""
    if name in spec.stage_names:
        fields = spec.stage(name).model_dump(mode="json", exclude_defaults=True, exclude={"slurm"})
        note = (
            "As before, but without margins, which votes do not have." if fields.pop("margins", False) else "As before."
        )
        return {**fields, **_slurm(spec, name)}, note
    if not kind_of(name).trains:
        return {}, ""
    tuned = next((each for each in reversed(rounds(spec)) if SFT.name in each.trained), spec)
    like = SFT.name if SFT.name in tuned.trained else spec.policies[next(reversed(spec.policies))]
    fields = tuned.stage(like).model_dump(mode="json", exclude_defaults=True, include=_TAKEN_OVER)
    why, share, source = _NEW[name]
    if like == SFT.name:
        fields["lr"] = float(f"{tuned.stages.sft.lr * share:.2g}")
        note = f"{why} The learning rate is that of sft times {share:g}, {source}."
    else:
        fields["lr"] = getattr(tuned.stage(like), "actor_lr" if like == PPO.name else "lr")
        note = f"{why} The learning rate is that of {like}."
    return {**fields, **_slurm(tuned, like)}, f"{note} Batches and memory are as in {like}."


def _balance(run: RunDir, votes: Counter[str]) -> dict[str, float]:
    """Weights with which good and bad responses count alike in KTO. A pair has one of each."""
    thumbs = Counter(vote.vote for vote in votes_of(run, lambda vote: vote.kind == "thumbs")[0])
    pairs = votes["pairs"] + votes.total() / _VOTE_WEIGHT  # the latter in the earlier data
    good, bad = thumbs["up"] + pairs, thumbs["down"] + pairs
    return {"desirable_weight": round(max(1.0, bad / good), 2), "undesirable_weight": round(max(1.0, good / bad), 2)}


def _slurm(spec: JobSpec, stage: str) -> dict[str, Any]:
    """The Slurm settings of a stage, as far as they are its own."""
    base, own = (each.model_dump(mode="json") for each in (spec.slurm, spec.stage(stage).slurm))
    different = {key: value for key, value in own.items() if value != base[key]}
    return {"slurm": different} if different else {}
