"""Runs the code in responses against tests, in Apptainer without network and home; in a process without torch.

``python -m hpc_rlhf.train.rewards.code IMAGE`` prints as JSON why code cannot be contained here, or null.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A block of code; a response is judged by its last one.
FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# For a container to start and to end, perhaps on a busy file system.
GRACE_SECONDS = 60.0
PROCESSES, DISK = 32, 64 * 2**20
_ISOLATED = (
    "exec", "--containall", "--no-home", "--no-mount", "home,cwd,hostfs,bind-paths", "--net", "--network", "none",
)  # fmt: skip
_GUARD = Path(__file__).with_name("guard.py")


class SandboxError(Exception):
    """There is no sandbox, or it does not isolate. The message is worded as ``Failure.why``."""


def make(image: str, seconds: float, memory: int, selected: bool) -> Callable[[list[Any]], list[Any] | str]:
    """Make the function of a ``Verifier``, which returns the share of passed tests and the limit that was exceeded.

    Args:
        seconds: for all tests of a response.
        memory: bytes.
        selected: a format has selected the code from each response.

    Raises:
        SandboxError: code cannot be contained here.
    """
    limits = {"seconds": seconds, "memory": memory, "processes": PROCESSES, "disk": DISK}
    command = [*program(), "--silent", *_ISOLATED, image, "python3", "-I", "-c", _GUARD.read_text(encoding="utf-8")]
    if run(command, "a = 1", ["assert a == 1", "assert a == 2"], limits) != [1, None]:
        raise SandboxError(f"cannot run a test in {image}")

    def judge(item: list[Any]) -> list[Any] | str:
        tests, response = item
        tests = [tests] if isinstance(tests, str) else tests
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            return f"needs tests as text or a list of texts, and got {tests!r}"[:300]
        code = response if selected else (FENCE.findall(response) or [None])[-1]
        if code is None:
            return [0.0, None]
        try:
            passed, why = run(command, code, tests, limits)
        except (SandboxError, OSError, ValueError) as error:  # the node's fault, such as too many processes
            return str(error)
        return [passed / len(tests), why]

    return judge


def program() -> list[str]:
    """The start of Apptainer's command.

    Raises:
        SandboxError: it is not installed.
    """
    path = shutil.which("apptainer") or shutil.which("singularity")
    if path is None:
        raise SandboxError("needs Apptainer, which is not on PATH on this node, to run the model's code")
    return [path]


def run(command: list[str], code: str, tests: list[str], limits: dict[str, Any]) -> list[Any]:
    """How many tests pass, and which limit was exceeded.

    Raises:
        SandboxError: the sandbox did not start, or leaves something open.
    """
    folders = [os.path.expanduser("~"), os.getcwd(), "/tmp", "/dev/shm"]
    outside = {
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid", "ipc", "mnt")},
        "folders": {path: [os.stat(path).st_dev, os.stat(path).st_ino] for path in folders if os.path.exists(path)},
    }
    task = json.dumps({"code": code, "tests": tests, "limits": limits, "outside": outside})
    # Nothing else from the environment: a variable could add mounts, or be a secret.
    env = {"PATH": os.environ["PATH"], "APPTAINER_NO_PRIVS": "1", "SINGULARITY_NO_PRIVS": "1"}
    env |= {f"APPTAINERENV_{name}": "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    try:
        output, errors = process.communicate(task.encode(), timeout=limits["seconds"] + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    lines = output.decode(errors="replace").splitlines()
    if not lines:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise SandboxError(f"has no sandbox, because it did not start ({last[:300]})")
    opened = json.loads(lines[0])["open"]
    if opened is not None:
        raise SandboxError(f"has a sandbox that does not isolate: {opened}")
    if len(lines) < 2:
        return [0, "ended the sandbox"]
    result = json.loads(lines[1])
    return [result["passed"], result["why"]]


def main() -> None:
    why = None
    try:
        make(sys.argv[1], seconds=30.0, memory=512 * 2**20, selected=True)
    except SandboxError as error:
        why = str(error)
    print(json.dumps(why))


if __name__ == "__main__":
    main()
