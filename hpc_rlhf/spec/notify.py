"""Trackers that log the metrics of a run, and notifications about its end."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints

from hpc_rlhf.spec.fields import FreeText, Model, PathText, SlurmValue


def _without_password(uri: str) -> str:
    if "@" in urlsplit(uri).netloc:
        raise ValueError(
            "must not contain a user and password, which others could read here; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    return uri


def _no_address(text: str) -> str:
    if "://" in text:
        raise ValueError(
            "must not be the address itself, which is a secret; put it in an environment variable or in a "
            "file that only you can read, and write ${NAME} or ~/FILE"
        )
    return text


class WandbSpec(Model):
    """Weights & Biases."""

    project: Annotated[FreeText, StringConstraints(min_length=1, max_length=128)]
    """Project for the runs. Each stage is a run, in a group with the spec's name."""
    entity: FreeText | None = Field(default=None, description="Team or user; defaults to your default entity.")
    mode: Literal["offline", "online"] = "offline"
    """offline writes to RUN/stages/*/wandb, for `wandb sync --append` from a machine with network access. Choose online
    if compute nodes have network access and WANDB_API_KEY is in the jobs' environment."""


class MlflowSpec(Model):
    """MLflow."""

    experiment: Annotated[FreeText, StringConstraints(min_length=1, max_length=128)]
    """Experiment for the runs. Each stage is a run."""
    tracking_uri: Annotated[PathText, AfterValidator(_without_password)] | None = None
    """Server to log to, if compute nodes can reach it; defaults to the SQLite file RUN/mlflow.db. Put credentials in
    MLFLOW_TRACKING_TOKEN, or …_USERNAME and …_PASSWORD, never here."""


class TrackersSpec(Model):
    """Trackers that log metrics in addition to metrics.jsonl and TensorBoard.

    `pip install hpc-rlhf[trackers]` installs the required packages.
    """

    wandb: WandbSpec | None = Field(default=None, description="Log to Weights & Biases.")
    mlflow: MlflowSpec | None = Field(default=None, description="Log to MLflow.")


class WebhookSpec(Model):
    """An address to post notifications to, which compute nodes must reach, if need be by HTTPS_PROXY."""

    url: Annotated[PathText, AfterValidator(_no_address)]
    """Where to find the address, which is a secret: ${NAME}, a variable of the environment that you submit from, or a
    file that only you can read (chmod 600)."""
    style: Literal["json", "slack"] = "json"
    """json posts event, run, run_dir, stage, message and text; slack posts the format of Slack, Mattermost and
    others."""


class NotifySpec(Model):
    """Who is notified when a run has finished, or has stopped and needs the user."""

    mail: SlurmValue | None = None
    """Recipient of mail from Slurm when the run has finished, and when it has stopped and needs the user. Unlike
    slurm.mail_type, it sends none for requeues. Needs no network on the nodes."""
    webhook: WebhookSpec | None = None
    """Post to a chat or a program. Stops are posted only with sentinels (slurm.heal.enabled)."""
