"""Signals set a flag, and the reason with the highest priority wins."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, StopFlag

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    made = StopFlag()
    made.install()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_without_a_signal_there_is_no_reason(flag: StopFlag) -> None:
    assert flag.code == 0
    assert flag.code not in REASON_OF_CODE


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGUSR2, "time limit"), (signal.SIGTERM, "preempted"), (signal.SIGINT, "interrupted")],
)
def test_a_signal_sets_the_flag_and_does_nothing_else(flag: StopFlag, number: signal.Signals, reason: str) -> None:
    send(number)
    assert REASON_OF_CODE[flag.code] == reason


def test_a_signal_of_lower_priority_does_not_override(flag: StopFlag) -> None:
    send(signal.SIGUSR2)
    assert REASON_OF_CODE[flag.code] == "time limit"
    send(signal.SIGTERM)
    send(signal.SIGUSR2)
    assert REASON_OF_CODE[flag.code] == "preempted"
