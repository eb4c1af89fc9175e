"""Very many remote references over four processes: nothing is kept, nothing grows.

``DISTGRAD_RREFS=100000`` makes as many as a long run does, and ``DISTGRAD_HEARTBEAT_INTERVAL=4``
waits for a process that was stopped as long as a worker does by default.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from typing import Any

import pytest
from references import counters, wait_until

from distgrad import rpc
from distgrad.testing import World

RREFS = int(os.environ.get("DISTGRAD_RREFS", "2000"))
HEARTBEAT_S = float(os.environ.get("DISTGRAD_HEARTBEAT_INTERVAL", "0.1"))
WORKERS, BATCH = 4, 100

kept: list[Any] = []  # of each process its own


@rpc.expose
class Value:
    """A value with a method."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get(self) -> int:
        return self.number


@rpc.expose
def keep(rrefs: Any) -> int:
    """Hold references until the next ones come, and use the first."""
    kept[:] = rrefs
    number: int = rrefs[0].rpc_sync().get()
    return number


@rpc.expose
def keep_on(rrefs: Any) -> None:
    kept.extend(rrefs)


def share_and_drop(rank: int, rrefs: int) -> None:
    """Create references everywhere, in batches, and share each batch with two workers."""
    choices = random.Random(rank)
    for first in range(0, rrefs, BATCH):
        owners = [choices.randrange(WORKERS) for _ in range(BATCH)]
        batch = [rpc.remote(owner, Value, (first + i,)) for i, owner in enumerate(owners)]
        for to in choices.sample(range(WORKERS), 2):
            assert rpc.rpc_sync(to, keep, (batch,)) == first


def seconds_until_empty(rank: int) -> float:
    """Drop what is left; return how long it takes until nothing is counted here."""
    kept.clear()
    gc.collect()
    start = time.monotonic()
    wait_until(lambda: not counters(), counters, collect=False)
    return time.monotonic() - start


def memory(rank: int) -> int:
    """Return how many bytes of this process are in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def process_id(rank: int) -> int:
    return os.getpid()


@pytest.mark.deadline(600)
def test_rrefs_many_are_freed_and_leave_no_memory() -> None:
    with World(WORKERS, transport="unix", timeout=580) as world:
        world.run(share_and_drop, max(RREFS // WORKERS // 2, BATCH))  # what grows once has grown
        world.run(seconds_until_empty)
        before = world.run(memory)
        start = time.monotonic()
        world.run(share_and_drop, RREFS // WORKERS)
        made = time.monotonic() - start
        left = max(world.run(seconds_until_empty))
        after = world.run(memory)
    grown = [b - a for a, b in zip(before, after, strict=True)]
    print(
        f"{RREFS} references in {made:.1f} s; tables empty after {left * 1e3:.0f} ms; "
        f"memory grew by {[g // 1024 for g in grown]} KiB"
    )
    # A reference that stayed would cost its owner 500 bytes.
    assert max(grown) < 2_000_000 + 20 * RREFS


def hold_many(rank: int, rrefs: int) -> None:
    kept.extend(rpc.RRef(Value(i)) for i in range(rrefs))
    for to in (1, 2):
        rpc.rpc_sync(to, keep_on, (kept[:],))
    kept.clear()
    assert counters() == {"rref.owner_rrefs": rrefs, "rref.forks": 2 * rrefs}


def forks_after_loss(rank: int, left: int) -> float:
    start = time.monotonic()
    wait_until(lambda: counters().get("rref.forks", 0) == left, counters, collect=False)
    return time.monotonic() - start


@pytest.mark.deadline(100)
def test_rrefs_of_a_stopped_user_are_reclaimed_when_it_gives_no_sign() -> None:
    with World(3, transport="unix", heartbeat_interval=HEARTBEAT_S) as world:
        world.run(hold_many, RREFS, ranks=[0])
        (stopped,) = world.run(process_id, ranks=[1])
        os.kill(stopped, signal.SIGSTOP)
        (seconds,) = world.run(forks_after_loss, RREFS, ranks=[0])
        world.kill(1)
    print(f"reclaimed after {seconds:.1f} s with signs of life every {HEARTBEAT_S:g} s")


def test_rrefs_of_a_killed_user_are_reclaimed_at_once() -> None:
    with World(3, transport="unix") as world:
        world.run(hold_many, RREFS, ranks=[0])
        world.kill(1)
        first = world.run(forks_after_loss, RREFS, ranks=[0])
        world.kill(2)
        second = world.run(forks_after_loss, 0, ranks=[0])
    print(
        f"{RREFS} references of a killed user reclaimed after {first[0]:.3f} and {second[0]:.3f} s"
    )
