"""Calls with large arrays between processes: others go past them, and losses are told."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from typing import Any

import numpy as np
import pytest

from distgrad import rpc
from distgrad.config import config
from distgrad.errors import DistgradError, RpcTimeoutError, WorkerLostError
from distgrad.testing import World

PATIENCE_S = 20.0
LARGE = 64 * 2**20

# Of each process its own.
kept: dict[str, Any] = {}


@rpc.expose
def size_of(array: np.ndarray) -> int:
    return array.nbytes


@rpc.expose
def large() -> np.ndarray:
    return np.ones(LARGE, np.uint8)


@rpc.expose
def number(value: int) -> int:
    return value


@rpc.expose
def own_pid() -> int:
    return os.getpid()


@rpc.expose
def total(array: np.ndarray) -> int:
    kept.setdefault("totals", []).append(int(array.sum()))
    return kept["totals"][-1]


@rpc.expose
def totals() -> list[int]:
    return kept["totals"]


@rpc.expose
def block() -> None:
    threading.Event().wait()


@rpc.expose
def die_in_the_middle() -> np.ndarray:
    """Return an array and stop the process while it is being sent."""
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return np.ones(2**28, np.uint8)


def call_past_large_ones(rank: int) -> None:
    array = np.ones(LARGE, np.uint8)
    answers = [rpc.rpc_async(1, size_of, (array,)), rpc.rpc_async(1, large)]
    assert [rpc.rpc_sync(1, number, (n,)) for n in range(100)] == list(range(100))
    assert answers[0].wait() == LARGE
    assert np.all(answers[1].wait() == 1)


def wait_for_one_that_dies(rank: int) -> None:
    waits = [rpc.rpc_async(1, block) for _ in range(4)]
    waits.append(rpc.rpc_async(1, die_in_the_middle))
    for wait in waits:
        with pytest.raises(WorkerLostError):
            wait.wait(PATIENCE_S)
    assert rpc.rpc_sync(2, number, (7,)) == 7


def give_a_stopped_one_up(array: np.ndarray, calls: int) -> list[str]:
    """Call a worker that takes nothing with little time, again and again; then let it go on."""
    pid = rpc.rpc_sync(1, own_pid)
    failures = []
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(calls):
            with pytest.raises(DistgradError) as caught:
                rpc.rpc_sync(1, total, (array,), timeout=0.3)
            failures.append(type(caught.value))
    finally:
        os.kill(pid, signal.SIGCONT)
    return failures


def give_up_and_go_on(rank: int) -> None:
    array = np.ones(LARGE, np.uint8)
    assert give_a_stopped_one_up(array, 3) == [RpcTimeoutError] * 3
    array[:] = 2
    assert rpc.rpc_sync(1, total, (array,)) == 2 * LARGE
    assert {*rpc.rpc_sync(1, totals)} <= {LARGE, 2 * LARGE}  # nobody got a part of each


def interrupt_and_go_on(rank: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pid = rpc.rpc_sync(1, own_pid)
    array = np.ones(LARGE, np.uint8)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            rpc.rpc_async(1, total, (array,), timeout=0)
    finally:
        os.kill(pid, signal.SIGCONT)
    array[:] = 2
    assert rpc.rpc_sync(1, total, (array,)) == 2 * LARGE
    assert {*rpc.rpc_sync(1, totals)} <= {LARGE, 2 * LARGE}


def give_up_once_too_often(rank: int) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        failures = give_a_stopped_one_up(np.ones(LARGE, np.uint8), 3)
    assert [str(warning.message) for warning in warned] == []  # all failures were told
    assert failures == [RpcTimeoutError, WorkerLostError, WorkerLostError]


@pytest.fixture
def only_calls_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is stopped is not noticed by other means, but for TCP by the kernel, later."""
    monkeypatch.setattr(config, "stall_timeout", 600.0)
    monkeypatch.setattr(config, "heartbeat_interval", 0.0)


@pytest.mark.usefixtures("only_calls_end")
@pytest.mark.parametrize(("shared", "transport"), [(False, "unix"), (True, "tcp")])
@pytest.mark.parametrize("go_on", [give_up_and_go_on, interrupt_and_go_on])
def test_call_ends_in_time_though_the_peer_does_not_take_its_array(
    monkeypatch: pytest.MonkeyPatch, go_on: Any, shared: bool, transport: str
) -> None:
    monkeypatch.setattr(config, "shared_memory", shared)
    with World(2, transport=transport) as world:
        world.run(go_on, ranks=[0])


@pytest.mark.usefixtures("only_calls_end")
def test_calls_that_end_leave_behind_no_more_than_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "max_peer_bytes", LARGE)
    with World(2, transport="tcp") as world:
        world.run(give_up_once_too_often, ranks=[0])
        world.kill(1)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_small_calls_beside_large_ones_are_answered(transport: str) -> None:
    with World(2, transport=transport) as world:
        world.run(call_past_large_ones, ranks=[0])


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_worker_lost_in_the_middle_of_a_large_answer_ends_every_wait(transport: str) -> None:
    with World(3, transport=transport) as world:
        world.run(wait_for_one_that_dies, ranks=[0])
        world.kill(1)  # it is dead; now the world knows
