"""Who is told how a run goes: the trackers that get its numbers, and where word of its end is sent."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints

from hpc_rlhf.spec.fields import FreeText, Model, PathText, SlurmValue


def _without_password(uri: str) -> str:
    if "@" in urlsplit(uri).netloc:
        raise ValueError(
            "must hold no user and password, which others could read here; put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


def _no_address(text: str) -> str:
    if "://" in text:
        raise ValueError(
            "must not be the address itself, which is a secret; put it into a file that only you can read, or into a variable, and give ~/FILE or ${NAME}"
        )
    return text


class WandbSpec(Model):
    """Weights & Biases."""

    project: Annotated[FreeText, StringConstraints(min_length=1, max_length=128)] = Field(
        description="Project that the runs belong to; each stage is a run in it, in a group of the spec's name."
    )
    entity: FreeText | None = Field(default=None, description="Team or user; your default one when left out.")
    mode: Literal["offline", "online"] = Field(
        default="offline",
        description="offline writes below RUN/stages/*/wandb, for `wandb sync --append` from a machine with a network; choose online where compute nodes have one and WANDB_API_KEY is in the jobs' environment.",
    )


class MlflowSpec(Model):
    """MLflow."""

    experiment: Annotated[FreeText, StringConstraints(min_length=1, max_length=128)] = Field(
        description="Experiment that the runs belong to; each stage is a run in it."
    )
    tracking_uri: Annotated[PathText, AfterValidator(_without_password)] | None = Field(
        default=None,
        description="Server to log to, where compute nodes reach one; files in RUN/mlruns when left out. What it asks to log in with goes into MLFLOW_TRACKING_TOKEN, or …_USERNAME and …_PASSWORD, never in here.",
    )


class TrackersSpec(Model):
    """Where numbers go besides metrics.jsonl and TensorBoard. `pip install hpc-rlhf[trackers]` brings what they need."""

    wandb: WandbSpec | None = Field(default=None, description="Log to Weights & Biases.")
    mlflow: MlflowSpec | None = Field(default=None, description="Log to MLflow.")


class WebhookSpec(Model):
    """An address that word is posted to, from the node that knows: compute nodes need a way there, or a proxy (HTTPS_PROXY)."""

    url: Annotated[PathText, AfterValidator(_no_address)] = Field(
        description="Where the address is, which is a secret: ${NAME}, a variable of the environment that you submit from, or a file that only you can read (chmod 600)."
    )
    style: Literal["json", "slack"] = Field(
        default="json",
        description="json posts event, run, run_dir, stage, message and text; slack posts what Slack, Mattermost and others take.",
    )


class NotifySpec(Model):
    """Who hears that a run is finished, or stopped and needs a person, because of an error or a spent budget of requeues."""

    mail: SlurmValue | None = Field(
        default=None,
        description="Who gets mail from Slurm: once when the run is finished, and when it stops and needs a person. Not at each requeue, as slurm.mail_type has it. Needs no network on the nodes.",
    )
    webhook: WebhookSpec | None = Field(
        default=None,
        description="Post to a chat or a program. Of a stop, only where sentinels wait (slurm.heal.enabled).",
    )
