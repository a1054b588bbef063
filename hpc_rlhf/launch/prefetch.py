"""Download a spec's models and data sets from the hub into the cache, so that its jobs need no network."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from hpc_rlhf import safe_path
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.hub import HubItem

_PATIENCE_SETTING = "HF_HUB_ETAG_TIMEOUT"  # the hub client's own: seconds that the hub may take to respond
_PATIENCE = 2.0  # without that setting
_PORTS = {"http": 80, "https": 443}  # any other proxy is SOCKS
# Files of tokenizers and configurations.
_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# In transformers' order of preference: prefix and suffix of weight files.
_WEIGHTS = (("model", ".safetensors"), ("", ".safetensors"), ("pytorch_model", ".bin"), ("", ".bin"))


@dataclass(frozen=True)
class Fetched:
    """An item that is in the cache: its number of files, their bytes, and whether all were there before."""

    item: HubItem
    files: int
    size: int
    before: bool


def prefetch(wanted: Sequence[HubItem]) -> Iterator[Fetched]:
    """Download each item into the cache, and yield it when it is complete.

    Files in the cache are not downloaded again, and a partial download resumes. Without the hub, a complete
    item in the cache is enough.

    Raises:
        HpcRlhfError: the hub does not have an item, refuses it, or cannot be reached.
    """
    why = why_unreachable() if wanted else None
    for item in wanted:
        before = hub.missing(item) is None
        try:
            if why is not None:
                raise Unreachable(why)
            files = _model(item) if item.kind == "model" else _data_set(item)
        except Unreachable as error:
            if not before:
                raise HpcRlhfError(
                    f"the hub cannot be reached for {item.kind} {item.name} ({error})",
                    where=item.where,
                    hint="run this on a machine with network access and the same HF_HOME; https_proxy sets a proxy",
                    exit_code=RUN_FAILED,
                ) from error
            sizes = list(hub.recorded(item).values())
        else:
            hub.remember(item, files)
            sizes = list(files.values())
        yield Fetched(item, len(sizes), sum(sizes), before)


def wanted(names: Sequence[str]) -> list[str]:
    """The files of a model's repository that loading needs: one kind of weights, and all small files.

    Subfolders hold the same model for other programs.
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
    """The hub does not respond."""


def why_unreachable() -> str | None:
    """Why no connection to the hub, or to the proxy before it, can be made; None if one can.

    It takes two seconds at most, or as long as the user lets the hub take. The hub's client, and the look-up of a
    name, may wait for minutes.
    """
    from huggingface_hub.constants import ENDPOINT, HF_HUB_ETAG_TIMEOUT

    patience = HF_HUB_ETAG_TIMEOUT if _PATIENCE_SETTING in os.environ else _PATIENCE
    hub_at, proxies = urlsplit(ENDPOINT), getproxies()
    proxy = None if proxy_bypass(hub_at.hostname or "") else proxies.get(hub_at.scheme) or proxies.get("all")
    at = hub_at if not proxy else urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (at.hostname or "", at.port or _PORTS.get(at.scheme, 1080))
    answer: queue.Queue[str | None] = queue.Queue()

    def connect() -> None:
        try:
            socket.create_connection(address, patience).close()
        except TimeoutError:
            pass  # waiting for the answer times out, too
        except OSError as error:
            answer.put(f"{address[0]}: {error.strerror or error}")
        else:
            answer.put(None)

    threading.Thread(target=connect, daemon=True).start()
    try:
        return answer.get(timeout=patience)
    except queue.Empty:
        return f"{address[0]} does not answer within {patience:g} s; {_PATIENCE_SETTING} gives it more"


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
    """Turn hub errors raised inside the block into one sentence."""
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
            f"{item.name} is gated: its license must be accepted first",
            where=item.where,
            hint=f"accept it on the hub page of {item.name}, then log in: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise HpcRlhfError(
            f"the hub has no {item.kind} {item.name} that you may read",
            where=item.where,
            hint="check the id; if it is private, log in: hf auth login",
        ) from error
    except OfflineModeIsEnabled as error:
        raise Unreachable(f"{hub.OFFLINE} is set") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise Unreachable(_first_line(error)) from error
    except OSError as error:
        if error.errno is not None:  # a problem of this machine, such as a full disk
            raise HpcRlhfError(
                f"cannot store {item.name}: {error.strerror}",
                where=str(error.filename or hub.cache()),
                hint="free some space, or set HF_HOME to a larger disk that all nodes share",
                exit_code=RUN_FAILED,
            ) from error
        raise Unreachable(_first_line(error)) from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # the hub's HTTP client, in some of its versions
            raise
        raise Unreachable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _data_set(item: HubItem) -> dict[Path, int]:
    """The files of a data set in the cache, with their sizes. A separate process loads it as the stages do."""
    env = dict(os.environ)
    if not sys.stderr.isatty():
        env.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    command = safe_path.module("hpc_rlhf.train.data.fetch", item.name, item.subset or "", item.split)
    # Elsewhere a folder could shadow the hub id.
    process = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, cwd="/")
    if not process.stdout:
        raise HpcRlhfError(
            f"the process that loads {item} exited with {process.returncode}",
            where=item.where,
            hint="see its output above",
            exit_code=RUN_FAILED,
        )
    reply = json.loads(process.stdout.splitlines()[-1])
    if "unreachable" in reply:
        raise Unreachable(reply["unreachable"])
    if "error" in reply:
        raise HpcRlhfError(reply["error"], where=item.where, hint=reply["hint"], exit_code=RUN_FAILED)
    return {Path(name): int(size) for name, size in reply["files"].items()}
