"""References in references: values that hold others, cycles, and what is left at the end."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from references import PATIENCE_S, counters, wait_until, wait_until_empty

from distgrad import rpc
from distgrad.errors import OwnerLostError, RpcTimeoutError
from distgrad.testing import World

release = threading.Event()
kept: list[Any] = []  # of a process: what is referred to from one run to the next
held_back: list[Any] = []


@rpc.expose
class Holder:
    """A value that refers to others."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.held: list[Any] = []

    def hold(self, *rrefs: Any) -> None:
        self.held += rrefs

    def first(self) -> Any:
        return self.held[0]

    def clear(self) -> None:
        self.held.clear()

    def get(self) -> int:
        return self.number

    def sum_along(self) -> int:
        """Add up the numbers of all that are referred to, however far away."""
        return self.number + sum(rref.rpc_sync().sum_along() for rref in self.held)


@rpc.expose
def make_holder_of(rref: Any) -> Holder:
    made = Holder(100)
    made.hold(rref)
    return made


@rpc.expose
def same(value: Any) -> Any:
    return value


@rpc.expose
def same_when_released(value: Any) -> Any:
    assert release.wait(PATIENCE_S)
    return value


@pytest.fixture(params=["inproc", "unix"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    release.clear()
    with World(3, transport=request.param) as running:
        yield running
        release.set()


def use_reference_to_a_reference(rank: int) -> None:
    inner = rpc.remote(1, Holder, (5,))
    outer = rpc.remote(2, same, (inner,))  # a value that is a reference
    assert outer.owner().id == 2
    back = outer.to_here()
    assert back.owner().id == 1
    assert back.rpc_sync().get() == 5
    del inner, back
    assert outer.to_here().rpc_sync().get() == 5  # worker 2 keeps it alive
    own = rpc.RRef(rpc.RRef(7))
    assert own.local_value().local_value() == 7
    assert rpc.rpc_sync(1, same, (own,)).local_value().local_value() == 7


def test_reference_to_a_reference_leads_to_the_value(world: World) -> None:
    world.run(use_reference_to_a_reference, ranks=[0])
    world.run(wait_until_empty)


def use_values_that_refer_to_each_other(rank: int) -> None:
    last = rpc.remote(1, Holder, (1,))
    middle = rpc.remote(2, Holder, (10,))
    middle.rpc_sync().hold(last)
    chain = rpc.remote(0, make_holder_of, (middle,))
    del last, middle
    assert chain.rpc_sync().sum_along() == 111
    assert chain.rpc_sync().first().rpc_sync().first().rpc_sync().get() == 1


def test_values_that_refer_to_others_keep_them(world: World) -> None:
    world.run(use_values_that_refer_to_each_other, ranks=[0])
    world.run(wait_until_empty)


def make_local_cycle(rank: int) -> None:
    rref = rpc.remote(1, Holder, (1,))
    holder = Holder(0)
    holder.hold(holder, rref, rpc.RRef(holder))
    assert rref.rpc_sync().get() == 1


def test_cycle_of_python_objects_lets_go_of_its_references(world: World) -> None:
    world.run(make_local_cycle, ranks=[0])
    world.run(wait_until_empty)


def make_cycle_across_workers(rank: int) -> None:
    one, two = rpc.remote(1, Holder, (1,)), rpc.remote(2, Holder, (2,))
    one.rpc_sync().hold(two)
    two.rpc_sync().hold(one)
    assert one.rpc_sync().first().rpc_sync().get() == 2
    kept.append(one)


def break_cycle(rank: int) -> None:
    kept.pop().rpc_sync().clear()


def test_cycle_across_workers_is_freed_when_it_is_broken(world: World) -> None:
    world.run(make_cycle_across_workers, ranks=[0])
    world.run(break_cycle, ranks=[0])
    world.run(wait_until_empty)


def test_shutdown_with_living_references_reports_them_and_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "distgrad"), World(3) as world:
        world.run(make_cycle_across_workers, ranks=[0])
    kept.clear()
    said = [record.getMessage() for record in caplog.records]
    # Whichever of the two that refer to each other leaves first.
    assert any(
        re.search(r"leaves 1 value that others refer to: 'worker\d' \(\d\)", t) for t in said
    )


def test_shutdown_without_references_reports_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distgrad"), World(2) as world:
        world.run(use_one, ranks=[0])
        world.run(wait_until_empty)
    assert not any("refer to" in record.getMessage() for record in caplog.records)


def use_one(rank: int) -> None:
    assert rpc.remote(1, Holder, (1,)).rpc_sync().get() == 1


def hold_back_answers(rank: int) -> None:
    agent: Any = rpc.current_worker().agent
    agent.reply = lambda *answer: held_back.append(answer)


def send_what_was_held_back(rank: int) -> None:
    agent: Any = rpc.current_worker().agent
    del agent.reply
    while held_back:
        agent.reply(*held_back.pop())


def create_too_late(rank: int) -> None:
    kept.append(rpc.remote(1, Holder, (1,), timeout=0.02))
    wait_until(lambda: counters().get("rref.pending_users") is None)


def use_what_was_created_too_late(rank: int) -> None:
    slow = kept.pop()
    assert not slow.confirmed_by_owner()
    for use in (
        slow.to_here,
        slow.rpc_sync().get,
        lambda: slow.rpc_async().get().wait(),
        slow.remote().get,
        lambda: rpc.rpc_sync(2, same, (slow,)),
        lambda: slow.backward(1),
    ):
        with pytest.raises(RpcTimeoutError, match="its creation was not acknowledged in time"):
            use()


def test_creation_that_times_out_says_so_and_leaves_nothing(world: World) -> None:
    world.run(hold_back_answers, ranks=[1])
    world.run(create_too_late, ranks=[0])
    world.run(send_what_was_held_back, ranks=[1])
    world.run(use_what_was_created_too_late, ranks=[0])
    world.run(wait_until_empty)


def create_on_a_lost_worker(rank: int) -> None:
    rref = kept.pop()
    wait_until(lambda: not rref.confirmed_by_owner())
    for use in (rref.to_here, rref.rpc_sync().get, lambda: rpc.rpc_sync(2, same, (rref,))):
        with pytest.raises(OwnerLostError, match="its owner 'worker1' is lost"):
            use()


def create_and_keep(rank: int) -> None:
    kept.append(rpc.remote(1, same_when_released, (3,)))


def test_creation_on_a_worker_that_is_lost_names_it(world: World) -> None:
    world.run(create_and_keep, ranks=[0])
    world.kill(1)
    world.run(create_on_a_lost_worker, ranks=[0])
    world.run(wait_until_empty, ranks=[0, 2])
