"""Serve finished models in a Slurm job, and show how people and clients use them."""

from __future__ import annotations

import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates, rank_python
from hpc_rlhf.run import acting
from hpc_rlhf.run.events import Serving
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.spec.stages import POLICIES
from hpc_rlhf.web.listening import LOCALHOST

_POLL = 0.5


def url(host: str, port: int) -> str:
    """The API's address for clients on this machine, of a server that listens on ``host``."""
    return f"http://{_reached(host)}:{port}/v1"


def _reached(host: str) -> str:
    """The address at which this machine reaches a server that listens on ``host``."""
    host = {"0.0.0.0": LOCALHOST, "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def how_to_open(host: str, port: int, node: str, token: str) -> str:
    """The address of a server's page, and a shell command that connects another machine to the server.

    Args:
        host: the address that the server listens on.
        node: the name of the machine that it runs on.

    Without ExitOnForwardFailure, ssh goes on if the port is in use, and clients send the token to another server.
    """
    reached = f"{_reached(host)}:{port}"
    return f"http://{reached}/#{token}\nssh -N -o ExitOnForwardFailure=yes -L {port}:{reached} {node}"


def how_to_use(name: str, host: str, port: int, node: str, token: str) -> str:
    """What ``how_to_open`` says, and two shell commands: one configures clients of OpenAI's API, the other sends the
    model a message.

    The token goes through a pipe, because everybody on a machine sees the arguments of its processes.
    """
    base = url(host, port)
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return (
        f"{how_to_open(host, port, node, token)}\n"
        f"export OPENAI_BASE_URL={base} OPENAI_API_KEY={token}\n"
        'echo "Authorization: Bearer $OPENAI_API_KEY" | curl $OPENAI_BASE_URL/chat/completions -H @- '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def new_token() -> str:
    """A token that cannot be guessed."""
    return secrets.token_urlsafe(32)


def serve_as_job(
    run: RunDir,
    names: Sequence[str],
    port: int,
    record_user: bool,
    vllm: RolloutSpec | None,
    say: Callable[[str], object],
) -> tuple[str, str, str]:
    """Submit a job that serves models of a run, wait until it responds, and return its id, node and token.

    It runs on one node of the kind of the last model's stage.

    Args:
        record_user: whether votes keep the name that a voter gives.
        vllm: how vLLM generates the responses; None if the server does.
        say: called with progress messages.

    Raises:
        HpcRlhfError: this user may not act on the run, Slurm rejects the job, or it ends before it serves.
    """
    acting.check(run)
    stage = POLICIES[names[-1]].name
    plan = make_plan(read_spec(run.job_yaml))
    (planned,) = [job for job in plan.jobs if job.stage == stage]
    job = replace(planned, job_name=f"{plan.name}.serve", slurm=planned.slurm.model_copy(update={"nodes": 1}))
    token = run.stage(stage).serve_token
    if not token.exists():  # a job that is queued reads it when it starts
        with open(token, "x", opener=lambda path, flags: os.open(path, flags, mode=0o600)) as file:
            file.write(new_token())
    ready = token.with_name(f"serve-{secrets.token_hex(4)}.ready")  # an earlier job may still be queued
    arguments = [str(run.path), *names, "--host", LOCALHOST, "--port", str(port)]
    arguments += ["--token", str(token), "--ready", str(ready), "--votes"]
    arguments += ["--record-user"] if record_user else []
    arguments += [] if vllm is None else ["--vllm", vllm.model_dump_json()]
    command = f"{rank_python(job)} hpc_rlhf.train.serve {shlex.join(arguments)}"
    script = run.stage(stage).path / "serve.sbatch"
    script.write_text(Templates(run.scripts).serve(plan, job, command), encoding="utf-8")
    job_id = commands.submit(script, [])
    Ledger(run.ledger).append(Serving(stage, job_id=job_id))
    if not _wait(job_id, ready, lambda words: say(f"{words}; hpc-rlhf cancel {run.path} cancels it")):
        raise HpcRlhfError(
            f"job {job_id} ended before it served",
            where=str(run.stage(stage).logs / f"{job_id}_batch.log"),
            hint=f"its log is there; if something else uses port {port} of its node, choose another with --port",
            exit_code=RUN_FAILED,
        )
    ready.unlink(missing_ok=True)
    past = commands.find_record(job_id)
    node = commands.hostnames(past.nodes)[0] if past and past.nodes else ""
    return job_id, node, token.read_text()


def _wait(job_id: str, ready: Path, say: Callable[[str], object]) -> bool:
    """Wait until a job has created the file ``ready``; False if the job has ended."""
    last = ""
    while (queued := commands.queue().get(job_id)) is not None and queued.live:
        if ready.exists():
            return True
        state = f"job {job_id}, {queued.state.lower()}{f' ({queued.reason})' if queued.reason else ''}"
        if state != last:
            say(f"waiting for {state}")
            last = state
        time.sleep(_POLL)
    return False
