"""Calls with large arrays between processes: others go past them, and losses are told."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

from distgrad import rpc
from distgrad.errors import WorkerLostError
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


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_small_calls_beside_large_ones_are_answered(transport: str) -> None:
    with World(2, transport=transport) as world:
        world.run(call_past_large_ones, ranks=[0])


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_worker_lost_in_the_middle_of_a_large_answer_ends_every_wait(transport: str) -> None:
    with World(3, transport=transport) as world:
        world.run(wait_for_one_that_dies, ranks=[0])
        world.kill(1)  # it is dead; now the world knows
