"""Votes for tests."""

from __future__ import annotations

from hpc_rlhf.run.feedback import RatedModel, Vote, VoteMessage, VoteSampling

_MANIFESTS = {"sft": "5" * 64, "ppo": "9" * 64}


def thumbs(id: str, vote: str = "up", model: str = "sft", **more: object) -> Vote:
    return _vote(id, "thumbs", vote, [model], **{"responses": ["White."], **more})


def pair(id: str, vote: str, models: tuple[str, str] = ("sft", "ppo"), **more: object) -> Vote:
    return _vote(id, "pair", vote, list(models), **{"responses": ["White.", "Snow is white."], **more})


def _vote(id: str, kind: str, vote: str, models: list[str], **more: object) -> Vote:
    fields: dict[str, object] = {
        "id": id, "time": 1.5, "kind": kind, "vote": vote,
        "models": [RatedModel(name=name, manifest=_MANIFESTS[name]) for name in models],
        "sampling": VoteSampling(temperature=0.7, seed=3),
        "messages": [VoteMessage(role="user", content="What colour is snow?")],
    }  # fmt: skip
    return Vote.model_validate({**fields, **more})
