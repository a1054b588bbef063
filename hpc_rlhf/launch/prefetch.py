"""Bring the models and data sets of a spec from the hub into the cache, so that its jobs need no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.hub import HubItem

# What a tokenizer or a configuration may be in, beside the weights.
_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# A later kind is taken where there is none of an earlier one, as transformers does.
_WEIGHTS = (("model", ".safetensors"), ("", ".safetensors"), ("pytorch_model", ".bin"), ("", ".bin"))


@dataclass(frozen=True)
class Fetched:
    """What was done about an item.

    Attributes:
        files: how many it consists of.
        size: bytes of them all.
        before: whether all of it was in the cache already.
    """

    item: HubItem
    files: int
    size: int
    before: bool


def prefetch(wanted: Sequence[HubItem]) -> Iterator[Fetched]:
    """Bring each item into the cache, and say so as soon as it is whole. What is there is not fetched again,
    and a download that broke off goes on where it stopped. Without the hub, what is there already will do.

    Raises:
        HpcRlhfError: the hub does not have one, does not give it, or cannot be reached.
    """
    for item in wanted:
        before = hub.missing(item) is None
        try:
            files = _model(item) if item.kind == "model" else _data_set(item)
        except Unreachable as error:
            if not before:
                raise error.told(item) from error
            sizes = hub.recorded(item)
            yield Fetched(item, len(sizes), sum(sizes.values()), before)
            continue
        hub.remember(item, files)
        yield Fetched(item, len(files), sum(files.values()), before)


def wanted(names: Sequence[str]) -> list[str]:
    """The files of a model's repository that loading it takes: one kind of weights, and all that is small. Folders in it
    hold the same model for other programs.
    """
    top = [name for name in names if "/" not in name]
    for start, end in _WEIGHTS:
        weights = [name for name in top if name.startswith(start) and name.endswith(end)]
        if weights:
            break
    chat_templates = [name for name in names if name.startswith("additional_chat_templates/")]
    small = [name for name in top if name.endswith(_SMALL)]
    of_others = [name for name in small if name.endswith(".index.json")]
    indexes = [name for name in of_others if name.removesuffix(".index.json").endswith(end)]
    return sorted({*weights, *chat_templates, *small} - set(of_others) | set(indexes))


class Unreachable(Exception):
    """The hub gives no answer."""

    def told(self, item: HubItem) -> HpcRlhfError:
        return HpcRlhfError(
            f"the hub cannot be reached for {item.kind} {item.name} ({self})",
            where=item.where,
            hint="run this on a machine with a network and the same HF_HOME; a proxy is set by https_proxy",
            exit_code=RUN_FAILED,
        )


def _model(item: HubItem) -> dict[Path, int]:
    """The files of a model in the cache, with their sizes."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with explained(item):
        names = wanted(HfApi().list_repo_files(item.name))
        folder = Path(snapshot_download(item.name, allow_patterns=names))
    return {folder / name: (folder / name).stat().st_size for name in names}


@contextmanager
def explained(item: HubItem) -> Iterator[None]:
    """Within it, what the hub objects to is put in a sentence."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise HpcRlhfError(
            f"{item.name} is given only to those who accepted its licence",
            where=item.where,
            hint=f"accept it on the page of {item.name}, then log in: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise HpcRlhfError(
            f"the hub has no {item.kind} {item.name}, or not for you",
            where=item.where,
            hint="check its id; for a private one, log in: hf auth login",
        ) from error
    except OfflineModeIsEnabled as error:
        raise Unreachable(f"{hub.OFFLINE} is set") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise Unreachable(_first_line(error)) from error
    except OSError as error:
        if error.errno is not None:  # of this machine, such as a full disk
            raise HpcRlhfError(
                f"cannot keep {item.name}: {error.strerror}",
                where=str(error.filename or hub.cache()),
                hint="free some space, or set HF_HOME to a larger disk that all nodes share",
                exit_code=RUN_FAILED,
            ) from error
        raise Unreachable(_first_line(error)) from error
    except Exception as error:
        if not type(error).__module__.startswith(
            "httpx"
        ):  # the hub's client; which one, its versions differ in
            raise
        raise Unreachable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _data_set(item: HubItem) -> dict[Path, int]:
    """The files of a data set in the cache, with their sizes. Read in a process of its own, by what the stages read it with."""
    env = dict(os.environ)
    if not sys.stderr.isatty():
        env.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    command = [sys.executable, "-m", "hpc_rlhf.train.data.fetch", item.name, item.subset or "", item.split]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise HpcRlhfError(
            f"the process that reads {item} ended with {done.returncode}",
            where=item.where,
            hint="it said why above",
            exit_code=RUN_FAILED,
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    if "unreachable" in answer:
        raise Unreachable(answer["unreachable"])
    if "error" in answer:
        raise HpcRlhfError(answer["error"], where=item.where, hint=answer["hint"], exit_code=RUN_FAILED)
    return {Path(name): int(size) for name, size in answer["files"].items()}
