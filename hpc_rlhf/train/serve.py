"""Serves one or two finished models of a run with an OpenAI-compatible API and a page.

``python -m hpc_rlhf.train.serve RUN NAME [NAME] --host HOST --port PORT --token FILE --ready FILE [--votes]
[--record-user] [--vllm JSON]`` is what a Slurm job runs.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hpc_rlhf.errors import TO_BE_CONTINUED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.spec.stages import POLICIES
from hpc_rlhf.web.listening import check_installed, listen

# Seconds that responses have to end when the server is stopped.
GRACE = 5
# Open connections that the server can have, if the system lets it.
_FILES = 1 << 16


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc_rlhf.train.serve", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("names", nargs="+", help="of the models")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--token", required=True, type=Path, help="file with the token that clients must give")
    parser.add_argument("--ready", required=True, type=Path, help="file to create when the server responds")
    parser.add_argument("--votes", action="store_true", help="store votes in the run")
    parser.add_argument("--record-user", action="store_true", help="store the names that voters give")
    parser.add_argument("--vllm", type=RolloutSpec.model_validate_json, help="how vLLM generates the responses")
    args = parser.parse_args()
    # Slurm sends SIGTERM before it preempts the job. The server ends, and then sends itself the signal once more.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TO_BE_CONTINUED))

    def is_up() -> None:
        # Slurm sends SIGUSR2 before the time limit. A limit too short to start the server kills it instead, so that
        # the job is not requeued for ever.
        signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
        args.ready.touch()

    try:
        token = args.token.read_text().strip()
        votes = args.record_user if args.votes else None
        serve(RunDir(args.run), args.names, args.host, args.port, token, is_up, votes, args.vllm)
    except HpcRlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        args.ready.unlink(missing_ok=True)
    return 0


def serve(
    run: RunDir,
    names: list[str],
    host: str,
    port: int,
    token: str,
    ready: Callable[[], object],
    record_user: bool | None,
    vllm: RolloutSpec | None,
) -> None:
    """Serve in this process until a signal ends it.

    Args:
        names: of the models, which are finished; two are compared, and may be the same.
        token: what clients must give as their API key.
        ready: called when the server responds.
        record_user: whether votes keep the name that a voter gives; None if no votes are stored.
        vllm: how vLLM generates the responses; None if this process does.

    Raises:
        HpcRlhfError: the server is not installed, or cannot listen; or vLLM does not start, or has failed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    check_installed("fastapi", "uvicorn", "prometheus_client")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, most) if most > 0 else _FILES, most))
    with listen(host, port) as listener:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import uvicorn

        from hpc_rlhf.train.chat import load_models
        from hpc_rlhf.train.server.app import make_server
        from hpc_rlhf.train.server.voting import Voting

        failures: list[HpcRlhfError] = []

        def end(failure: HpcRlhfError) -> None:
            failures.append(failure)
            server.should_exit = True

        stages = {name: run.stage(POLICIES[name].name) for name in names}
        manifests = {name: manifest.sha256(stage.model / manifest.NAME) for name, stage in stages.items()}
        voting = None if record_user is None else Voting(run.feedback, manifests, record_user)
        models = load_models({name: stage.policy(name) for name, stage in stages.items()}, vllm)
        app = make_server(models, names if len(names) == 2 else [], voting, token, host, ready, end)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=GRACE
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
        if failures:
            raise failures[0]


if __name__ == "__main__":
    sys.exit(main())
