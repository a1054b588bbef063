"""Reports the end of a run through the webhook of its spec. A failed report does not affect the run."""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.masking import mask
from hpc_rlhf.run.retry_policy import StopKind
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.notify import WebhookSpec

News = Literal["finished", "stopped", "budget spent"]

_TIMEOUT = 5.0
_PAUSES = (1.0, 4.0)  # seconds before the second and the third try
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def send(run: RunDir, news: News, stage: str, message: str = "") -> None:
    """Post news of a run. Takes 20 seconds at most; a failure is one line on stderr, without the address.

    Args:
        stage: the one that finished last, or that stopped.
        message: why it stopped.
    """
    try:
        spec = read_spec(run.job_yaml)
        if spec.notify.webhook is not None:
            _post(address(spec.notify.webhook), _body(spec, run, news, stage, mask(message)))
    except Exception as error:  # never let it end the run
        reason = error.message if isinstance(error, HpcRlhfError) else type(error).__name__
        print(f"hpc-rlhf: notify.webhook could not be reached: {reason}", file=sys.stderr, flush=True)


def send_stop(run: RunDir, stage: str, kind: StopKind, message: str) -> None:
    """Report that a stage was left to the user."""
    if kind is StopKind.EARLY:
        return
    send(run, "budget spent" if kind is StopKind.BUDGET_SPENT else "stopped", stage, message)


def send_if_finished(run: RunDir, spec: JobSpec, stage: str) -> None:
    """Post that the run is finished, if the stage that has just finished was its last."""
    if all(manifest.is_done(run.stage(name)) for name in spec.stage_names):
        send(run, "finished", stage)


def address(webhook: WebhookSpec) -> str:
    """The webhook's URL.

    Raises:
        HpcRlhfError: it is not where the spec says, others can read it there, or it is not a URL.
    """
    where = "notify.webhook.url"
    variable = _VARIABLE.fullmatch(webhook.url)
    if variable:
        url = os.environ.get(variable[1], "")
        if not url:
            raise HpcRlhfError(
                f"the variable {variable[1]} is not set", where, "export it where you submit from, or use a file"
            )
    else:
        path = Path(webhook.url).expanduser()
        try:
            shared = stat.S_IMODE(path.stat().st_mode) & 0o077
            url = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise HpcRlhfError(f"cannot read {path}: {reason}", where, "write the URL into it") from None
        if shared:
            raise HpcRlhfError(f"others can read {path}, and the URL in it is a secret", where, f"chmod 600 {path}")
    if not re.fullmatch(r"https?://[^\s\x00-\x1f\x7f]+", url):
        raise HpcRlhfError(f"{webhook.url} does not contain an http or https URL", where, "write the whole URL there")
    return url


def _body(spec: JobSpec, run: RunDir, news: News, stage: str, message: str) -> dict[str, object]:
    assert spec.notify.webhook is not None
    phrase = {
        "finished": "is finished",
        "stopped": f"stopped in {stage} and needs your help",
        "budget spent": f"stopped in {stage}: no requeues are left",
    }[news]
    text = f"hpc-rlhf: {spec.name} {phrase}" + (f": {message}" if message else "") + f"\n{run.path}"
    if spec.notify.webhook.style == "slack":
        return {"text": text}
    return {
        "event": news, "run": spec.name, "run_dir": str(run.path), "stage": stage, "message": message,
        "text": text, "time": round(time.time(), 3),
    }  # fmt: skip


def _post(url: str, body: dict[str, object]) -> None:
    for pause in (*_PAUSES, None):
        request = urllib.request.Request(
            url,
            data=json.dumps(body, ensure_ascii=False).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "hpc-rlhf"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT):
                return
        except urllib.error.HTTPError as error:
            reason, lasting = (f"the server answered {error.code}", 400 <= error.code < 500 and error.code != 429)
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            reason, lasting = getattr(cause, "strerror", None) or type(cause).__name__, False
        if pause is None or lasting:
            raise HpcRlhfError(reason)
        time.sleep(pause)
