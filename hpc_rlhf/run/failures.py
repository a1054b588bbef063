"""How an attempt at a stage ended, told from the ledger, from Slurm's word on the job and from the logs. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hpc_rlhf.errors import INPUT_WRONG
from hpc_rlhf.slurm.commands import PastJob

Event = Mapping[str, Any]

PREEMPTED, TIME_LIMIT, NODE_FAILURE = "preempted", "time limit", "node failure"
OUT_OF_MEMORY, KILLED_FOR_MEMORY, KILLED = "out of memory", "killed for memory", "killed"
NETWORK, HANG, FAILED, LAUNCH_FAILURE = "NCCL or gloo error", "hang", "failed", "launch failure"
USER_ERROR, PAST_DEADLINE = "user error", "past its deadline"
CANCELLED_BY_TOOL, CANCELLED_BY_HAND = "cancelled by hpc-rlhf", "cancelled by hand"
REQUEUED_BY_HAND = "requeued by hand"

# Another attempt would end the same way.
FINAL = frozenset({USER_ERROR, PAST_DEADLINE, CANCELLED_BY_TOOL, CANCELLED_BY_HAND})
# What the cluster did says nothing about whether the stage can go on.
BLAMELESS = frozenset({PREEMPTED, NODE_FAILURE, LAUNCH_FAILURE, REQUEUED_BY_HAND})
# A node on which these come again and again is to be left out.
ON_A_NODE = frozenset(
    {NODE_FAILURE, LAUNCH_FAILURE, KILLED, KILLED_FOR_MEMORY, OUT_OF_MEMORY, NETWORK, HANG, FAILED}
)

_STATES = {
    "PREEMPTED": PREEMPTED,
    "TIMEOUT": TIME_LIMIT,
    "NODE_FAIL": NODE_FAILURE,
    "BOOT_FAIL": NODE_FAILURE,
    "OUT_OF_MEMORY": KILLED_FOR_MEMORY,
    "DEADLINE": PAST_DEADLINE,
    "CANCELLED": CANCELLED_BY_HAND,
}
# The words of slurmstepd.
_DUE_TO = {
    "PREEMPTION": PREEMPTED,
    "TIME LIMIT": TIME_LIMIT,
    "NODE FAILURE": NODE_FAILURE,
    "JOB REQUEUE": REQUEUED_BY_HAND,
}
# Those of the batch script, which requeues the job of ranks that were not up yet.
_PREEMPTED_EARLY = "hpc-rlhf: preempted"
_BEGINS = frozenset({"started", "submitted", "retried", "requeued"})
_MEMORY = re.compile(
    r"out of memory|outofmemory|cannot allocate memory|can't allocate memory|bad_alloc|MemoryError", re.I
)
_OTHER_RANK = re.compile(
    r"nccl|gloo|DistBackendError|DistNetworkError|DistStoreError|TCPStore|"
    r"connection (was )?(reset|closed|refused)|broken pipe|socket timeout",
    re.I,
)
_PEER_GONE = re.compile(r"connection (was )?(reset|closed)|broken pipe", re.I)
_TASK = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)[\d,-]*: (?P<how>.+)")
# torchrun and DeepSpeed's launcher, which srun sees end instead of the rank.
_UNDER_LAUNCHER = re.compile(r"failed \(exitcode: (?P<torch>-?\d+)\)|exits with return code = (?P<ds>-?\d+)")
_LONGEST = 300
STEP_TOO_LONG = "two attempts in a row came to the time limit before they could save anything new"
MORE_TIME = "raise slurm.time, or make a step shorter: a smaller global batch, shorter answers, or more GPUs"


class Logs(Protocol):
    """The logs of one attempt."""

    @property
    def batch(self) -> str:
        """What the batch script, srun and slurmstepd said."""

    def last_line(self, rank: int) -> str:
        """The last words of a rank; empty where it said nothing."""


class NoLogs:
    """For an attempt of which the ledger says all that is known."""

    batch = ""

    def last_line(self, rank: int) -> str:
        return ""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        reason: one of the reasons above.
        message: the line that matters, of the ledger or of the logs.
        node: the node on which it began, where that is known.
        step: the last step done; 0 before the first.
        progress: whether a new step was saved since the ending before.
    """

    reason: str
    message: str
    node: str = ""
    step: int = 0
    progress: bool = False


def latest_attempt(events: Sequence[Event]) -> Sequence[Event]:
    """A stage's events since its latest attempt began."""
    begin = max((index for index, event in enumerate(events) if event["event"] in _BEGINS), default=0)
    # A rank may have failed before rank 0 came to its first word.
    while (
        begin
        and events[begin]["event"] in ("started", "failed")
        and _failed_with(events[begin - 1], events[begin])
    ):
        begin -= 1
    return events[begin:]


def _failed_with(before: Event, event: Event) -> bool:
    """Whether an event is a failure in the same attempt as another. Without Slurm ranks name theirs to the second at first."""
    names = [str(each.get("attempt", "")) for each in (before, event)]
    same = names[0] == names[1] or all(name.startswith("local-") for name in names)
    return before["event"] == "failed" and same


def since_a_person(events: Sequence[Event]) -> Sequence[Event]:
    """A stage's events since a person sent it off, or told it to go on; what came before counts no more."""
    by_person = [
        index
        for index, event in enumerate(events)
        if event["event"] == "anew" or (event["event"] == "submitting" and event.get("by") != "heal")
    ]
    return events[by_person[-1] :] if by_person else events


def returns(events: Sequence[Event]) -> int:
    """How often a stage came back, counted so that an attempt that never came to its first word counts too."""
    kinds = Counter(event["event"] for event in events)
    by_person = 1 if events and events[0]["event"] == "anew" else 0  # that is one of those retried
    return max(kinds["started"] - 1, kinds["requeued"] + kinds["retried"] - by_person)


def out_of_time_in_vain(events: Sequence[Event]) -> int:
    """How many attempts in a row came to the time limit with nothing new saved, whoever sent the stage off again.

    Those that ended otherwise are passed over, but what they saved counts.
    """
    count, told = 0, False
    furthest = mark = (0, 0)  # saved so far, and when the attempt before ended
    for event in events:
        kind, place = event["event"], (event.get("step", 0), event.get("part", 0))
        if kind == "saved":
            furthest = max(furthest, place)
        elif kind == "resumed":
            mark, furthest = max(mark, place), max(furthest, place)
        elif kind == "started":
            told = False
        elif kind in ("requeued", "ended"):
            if furthest > mark or event.get("progress"):
                count = 0
            elif event["reason"] == TIME_LIMIT and not told:
                count += 1
            mark, told = furthest, kind == "requeued"
    return count


def progressed(events: Sequence[Event]) -> bool:
    """Whether a later step was saved since the ending before than ever before it."""
    ends = [index for index, event in enumerate(events) if event["event"] == "ended"]
    since = ends[-1] if ends else 0
    before, after = (
        max((event["step"] for event in part if event["event"] == "saved"), default=0)
        for part in (events[:since], events[since:])
    )
    return after > before


def first_cause(attempt: Sequence[Event]) -> Event | None:
    """The first failure of an attempt that is not a rank's losing touch with others, which follows from theirs; that one
    where there is no other; None where no rank and no launcher told of a failure."""
    failed = [event for event in attempt if event["event"] == "failed"]
    causes = [
        event
        for event in failed
        if _MEMORY.search(event["message"]) or not _OTHER_RANK.search(event["message"])
    ]
    return next(iter(causes or failed), None)


def judge(events: Sequence[Event], job: PastJob | None, logs: Logs, step: int) -> Ending:
    """How the latest attempt at a stage without a whole artifact ended.

    Args:
        events: the stage's, in the order written.
        job: what Slurm knows of the ended job; None where it knows nothing.
        logs: of the same attempt.
        step: the last step that the stage's metrics have.
    """
    attempt = latest_attempt(events)
    reason, message, node = _by_ledger(attempt) or _by_state(job, logs) or _by_logs(attempt, job, logs)
    if not node and job is not None:
        node = job.failed_node or ("" if re.search(r"[\[,]", job.nodes) else job.nodes)
    return Ending(reason, shorten(message), node, step, progressed(events))


def judge_requeued(events: Sequence[Event], logs: Logs, step: int) -> Ending:
    """How an attempt ended whose job Slurm requeued by itself; it does so for no fault of the job.

    Args:
        events: the stage's before the attempt that came after.
        logs: of the attempt that ended.
        step: the last step that the stage's metrics have.
    """
    # srun, on the node of rank 0, tells of any other that is lost.
    host = str(
        next((event.get("host", "") for event in latest_attempt(events) if event["event"] == "started"), "")
    )
    reason, message, node = _by_slurmstepd(logs) or (NODE_FAILURE, "", host)
    return Ending(reason, shorten(message), node, step, progressed(events))


def _by_ledger(attempt: Sequence[Event]) -> tuple[str, str, str] | None:
    """What nothing outweighs: a cancellation, a hang that was seen, a mistake that was named."""
    for event in attempt:
        if event["event"] == "cancelled":
            # A rank that finds its job cancelled says in which attempt; `hpc-rlhf cancel` knows of none.
            by_tool = any(e["event"] == "cancelled" and "attempt" not in e for e in attempt)
            return (CANCELLED_BY_TOOL if by_tool else CANCELLED_BY_HAND), "", ""
    for event in attempt:
        if event["event"] == "hang":
            return HANG, str(event.get("message", "")), str(event.get("host", ""))
        if event["event"] == "failed" and event.get("exit_code") == INPUT_WRONG:
            return USER_ERROR, str(event["message"]), ""
    return None


def _by_state(job: PastJob | None, logs: Logs) -> tuple[str, str, str] | None:
    """Slurm's own word, where it is more than that the job ended so or so."""
    if job is not None and job.state in _STATES:
        return _STATES[job.state], "", job.failed_node
    return _by_slurmstepd(logs)


def _by_slurmstepd(logs: Logs) -> tuple[str, str, str] | None:
    """What Slurm's own programs, and the script that asks for a requeue itself, put into the log as the job ended."""
    line = _line_with(_PREEMPTED_EARLY, logs.batch)
    if line:
        return PREEMPTED, line, ""
    for words, reason in _DUE_TO.items():
        line = _line_with(f"DUE TO {words}", logs.batch)
        if line:
            return reason, line, ""
    line = _line_with("Node failure on ", logs.batch)
    return (NODE_FAILURE, line, line.split("Node failure on ")[1].split()[0]) if line else None


def _by_logs(attempt: Sequence[Event], job: PastJob | None, logs: Logs) -> tuple[str, str, str]:
    """A failure: of what ranks said of themselves, the cause; else how srun saw the first one end."""
    failed = first_cause(attempt)
    message = str(failed["message"]) if failed is not None else ""
    if failed is not None and (_MEMORY.search(message) or not _OTHER_RANK.search(message)):
        raised = OUT_OF_MEMORY if _MEMORY.search(message) else FAILED
        return (KILLED if failed.get("killed") else raised), message, str(failed.get("host", ""))
    memory = _line_with("oom_kill", logs.batch) or _line_with("oom-kill", logs.batch)
    if memory:
        return KILLED_FOR_MEMORY, memory, ""
    task = _TASK.search(logs.batch)
    if task is not None and task["how"].startswith("Killed"):
        return KILLED, task[0], task["node"]
    killed = [task for task in _TASK.finditer(logs.batch) if task["how"].startswith("Killed")]
    if killed and _PEER_GONE.search(message):
        # srun heard first of a rank that lost a killed one, and then killed the others itself.
        nodes = {task["node"] for task in killed}
        return KILLED, killed[0][0], nodes.pop() if len(nodes) == 1 else ""
    launched = [seen["torch"] or seen["ds"] for seen in _UNDER_LAUNCHER.finditer(logs.batch)]
    if "-9" in launched and (failed is None or _PEER_GONE.search(message)):
        return KILLED, "a rank was ended by SIGKILL", ""
    if failed is not None:
        return NETWORK, message, str(failed.get("host", ""))
    if launched:  # srun's tasks are nodes then
        return FAILED, f"a rank ended with exit code {launched[0]}", task["node"] if task else ""
    if task is not None:
        said = logs.last_line(int(task["rank"]))
        reason = OUT_OF_MEMORY if _MEMORY.search(said) else FAILED
        return reason, said if said and "exit code" in task["how"] else task[0], task["node"]
    if job is not None and (
        job.exit_code.endswith(":9") or job.exit_code.startswith("137:")
    ):  # of the script, or of srun
        return KILLED, f"exit code {job.exit_code}", ""
    said = _last_line(logs.batch)
    if said:
        return FAILED, said, ""
    return FAILED, f"Slurm says {job.state}" if job else "it left no word", ""


def _line_with(words: str, text: str) -> str:
    return next((line for line in text.splitlines() if words in line), "")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("hpc-rlhf: attempt ")]
    return lines[-1] if lines else ""


def shorten(message: str) -> str:
    """On one line, and not too long for a table."""
    line = " ".join(message.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
