"""Remote references when a process dies: nothing hangs, nothing is kept."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from distgrad import rpc
from distgrad.errors import OwnerLostError
from distgrad.testing import World

PATIENCE_S = 20.0

# Of each process its own.
kept: dict[str, Any] = {}


@rpc.expose
class Sleeper:
    """A value with a method that never returns."""

    def sleep(self) -> None:
        threading.Event().wait()

    def ping(self) -> str:
        return "pong"


@rpc.expose
def keep(rref: Any) -> None:
    kept["passed"] = rref


def hold_references(rank: int) -> None:
    """Refer to a value of worker 1, and wait for a call that will never be answered."""
    kept["rref"] = rpc.remote(1, Sleeper)
    assert kept["rref"].rpc_sync().ping() == "pong"
    kept["answer"] = kept["rref"].rpc_async(timeout=0).sleep()
    rpc.rpc_sync(2, keep, (kept["rref"],))


def check_owner_is_lost(rank: int) -> None:
    with pytest.raises(OwnerLostError, match="its owner 'worker1' is lost"):
        kept["answer"].wait(PATIENCE_S)
    for use in (kept["rref"].to_here, kept["rref"].rpc_sync().ping, kept["rref"].remote().ping):
        with pytest.raises(OwnerLostError, match="its owner 'worker1' is lost"):
            use()


def check_passed_reference_is_lost(rank: int) -> None:
    with pytest.raises(OwnerLostError, match="its owner 'worker1' is lost"):
        kept["passed"].to_here()


def share_value(rank: int) -> None:
    for to in (1, 2):
        rpc.rpc_sync(to, keep, (rpc.RRef("value"),))
    assert rpc.debug_info()["rref.forks"] == 2


def forks() -> int:
    return rpc.debug_info()["rref.forks"]


def check_one_fork_is_left(rank: int) -> None:
    until, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while forks() != 1:
        assert time.monotonic() < until, f"{forks()} forks are left"
        pause.wait(0.005)


def check_books_are_empty(rank: int) -> None:
    kept.clear()
    until, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while left := {k: n for k, n in rpc.debug_info().items() if k.startswith("rref.") and n}:
        assert time.monotonic() < until, f"left over: {left}"
        gc.collect()
        pause.wait(0.005)


@pytest.fixture(params=["unix", "tcp"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(3, transport=request.param) as running:
        yield running


def test_lost_owner_process_is_told_to_all_its_users(world: World) -> None:
    world.run(hold_references, ranks=[0])
    world.kill(1)
    world.run(check_owner_is_lost, ranks=[0])
    world.run(check_passed_reference_is_lost, ranks=[2])
    world.run(check_books_are_empty, ranks=[0, 2])


def test_lost_user_process_gives_its_forks_back(world: World) -> None:
    world.run(share_value, ranks=[0])
    world.kill(1)
    world.run(check_one_fork_is_left, ranks=[0])
    world.run(check_books_are_empty, ranks=[0, 2])
