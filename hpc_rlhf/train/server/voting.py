"""Votes on responses: what clients send, and how it is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import RatedModel, Vote, VoteMessage, VoteSampling
from hpc_rlhf.train.server.protocol import Text
from hpc_rlhf.web.api_error import ApiError

_Comment = Annotated[Text, StringConstraints(max_length=4000)]
_User = Annotated[Text, StringConstraints(max_length=100)]


class BallotMessage(BaseModel):
    """A turn of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: Text


class Ballot(BaseModel):
    """The body of a vote. Its fields are those of ``Vote``, with ``models`` as names; the server adds the rest."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    id: Text | None = None
    kind: Literal["thumbs", "pair"]
    models: Annotated[list[Text], Field(min_length=1, max_length=2)]
    sampling: VoteSampling = VoteSampling()
    messages: list[BallotMessage]
    responses: list[Text]
    vote: Text
    comment: _Comment = ""
    user: _User | None = None

    @property
    def results(self) -> set[tuple[str, str]]:
        """Its models, each with what the vote means for it, such as ``up`` or ``win``. A model that is compared with
        itself has both a win and a loss."""
        if self.vote not in ("left", "right"):
            return {(model, self.vote) for model in self.models}
        left, right = self.models
        return {(left, "win" if self.vote == "left" else "loss"), (right, "loss" if self.vote == "left" else "win")}


@dataclass(frozen=True)
class Voting:
    """Where votes go.

    Attributes:
        folder: of the votes.
        manifests: SHA-256 of the manifest of each model.
        record_user: whether names are stored that clients give.
    """

    folder: Path
    manifests: Mapping[str, str]
    record_user: bool

    def store(self, ballot: Ballot) -> Vote:
        """Store a vote; it is on disk when this returns.

        Raises:
            ApiError: it is no valid vote, too large, or cannot be stored.
        """
        try:
            vote = Vote(
                id=str(uuid.uuid4()) if ballot.id is None else ballot.id,
                time=round(time.time(), 3),
                kind=ballot.kind,
                models=[RatedModel(name=name, manifest=self.manifests[name]) for name in ballot.models],
                sampling=ballot.sampling,
                messages=[VoteMessage(role=each.role, content=each.content) for each in ballot.messages],
                responses=ballot.responses,
                vote=ballot.vote,  # type: ignore[arg-type]  # checked here
                comment=ballot.comment,
                user=ballot.user if self.record_user else None,
            )
            feedback.append(self.folder, vote)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "vote"
            raise ApiError(400, f"Invalid {place}: {first['msg']}.", place, "invalid_value") from error
        except HpcRlhfError as error:
            if error.exit_code == INPUT_WRONG:
                raise ApiError(
                    413, f"{error.message[:1].upper()}{error.message[1:]}.", code="request_too_large"
                ) from error
            raise ApiError(507, f"{error.message[:1].upper()}{error.message[1:]}.", code="not_stored") from error
        return vote
