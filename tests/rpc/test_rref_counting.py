"""Remote references on the move: values live as long as someone refers to them, no longer."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from references import PATIENCE_S, counters, wait_until

from distgrad import rpc
from distgrad._codec import encode
from distgrad.errors import OwnerLostError, RpcTimeoutError, SerializationError
from distgrad.rpc._exchange import Session
from distgrad.testing import World

release = threading.Event()
kept: list[Any] = []
dead: set[int] = set()
living: weakref.WeakSet[Any] = weakref.WeakSet()


@rpc.expose
class Value:
    """A value that tells whether it lives."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        living.add(self)

    def get(self) -> int:
        return self.number

    def get_when_released(self) -> int:
        assert release.wait(PATIENCE_S)
        return self.number


@rpc.expose
def keep(rref: Any) -> bool:
    """Hold a reference on the worker that is called; tell whether it is confirmed."""
    kept.append(rref)
    confirmed: bool = rref.confirmed_by_owner()
    return confirmed


@rpc.expose
def make(number: int) -> Any:
    return rpc.RRef(Value(number))


@rpc.expose
def make_on(owner: int, number: int) -> Any:
    return rpc.remote(owner, Value, (number,))


@rpc.expose
def give_back(rref: Any) -> Any:
    return rref


@rpc.expose
def relay(rref: Any, route: list[int]) -> Any:
    """Pass a reference on along a route of workers; the last one asks for the number."""
    if route:
        return rpc.rpc_sync(route[0], relay, (rref, route[1:]))
    return rref.rpc_sync().get()


@rpc.expose
def hold_on(rrefs: Any) -> Any:
    assert release.wait(PATIENCE_S)
    return rrefs


def books_of(world: World) -> dict[int, dict[str, int]]:
    ranks = [rank for rank in range(len(world.names)) if rank not in dead]
    found = world.run(lambda rank: counters(), ranks=ranks)
    return {rank: books for rank, books in zip(ranks, found, strict=True) if books}


def check_all_freed(world: World) -> None:
    """Wait until no worker that lives counts anything, and no value is left."""
    wait_until(lambda: not books_of(world) and (dead or not living), lambda: books_of(world))


@pytest.fixture
def world() -> Iterator[World]:
    release.clear()
    kept.clear()
    dead.clear()
    with World(4) as running:
        yield running
        release.set()
        kept.clear()
        check_all_freed(running)


def kill(world: World, rank: int) -> None:
    dead.add(rank)
    world.kill(rank)


def on_first(world: World, body: Any) -> Any:
    return world.run(lambda rank: body(), ranks=[0])[0]


def test_value_dropped_by_its_creator_is_freed(world: World) -> None:
    def body() -> None:
        rref = rpc.remote(1, Value, (7,))
        assert rref.rpc_sync().get() == 7
        assert len(living) == 1

    on_first(world, body)
    check_all_freed(world)


def test_reference_dropped_before_it_is_confirmed_is_freed(world: World) -> None:
    on_first(world, lambda: [rpc.remote(1, Value) for _ in range(50)].clear())
    check_all_freed(world)


def test_references_of_one_message_are_noted_without_copying_those_before(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.RRef(Value(i)) for i in range(3)]
        session, noted = Session(rpc.current_worker(), 1), set()
        for rref in rrefs:
            encode(1, (rref,), session)
            noted.add(id(session.undo))
        assert len(noted) == 1
        assert counters()["rref.forks"] == 3
        session.take_back()
        assert counters() == {}

    on_first(world, body)


def test_owner_passes_to_a_user_that_is_confirmed_at_once(world: World) -> None:
    def body() -> None:
        rref = rpc.RRef(Value(3))
        assert rpc.rpc_sync(1, keep, (rref,)) is True
        assert counters() == {"rref.owner_rrefs": 1, "rref.forks": 1}

    on_first(world, body)
    assert len(living) == 1
    assert world.run(lambda rank: kept[0].rpc_sync().get(), ranks=[1]) == [3]


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_user_passes_to_a_user_that_is_confirmed_when_called(world: World, owner: int) -> None:
    def body() -> None:
        rref = rpc.remote(owner, Value, (5,))
        assert rpc.rpc_sync(2, keep, (rref,)) is True

    on_first(world, body)
    assert world.run(lambda rank: kept[0].rpc_sync().get(), ranks=[2]) == [5]


def test_parent_dropped_at_once_leaves_its_child_the_value(world: World) -> None:
    def body() -> rpc.Future:
        return rpc.rpc_async(2, keep, (rpc.remote(1, Value, (9,)),))

    on_first(world, body).wait()
    assert world.run(lambda rank: kept[0].rpc_sync().get(), ranks=[2]) == [9]


def test_reference_comes_home_as_the_value_itself(world: World) -> None:
    def body() -> None:
        value = Value(4)
        rref = rpc.RRef(value)
        back = rpc.rpc_sync(1, give_back, (rref,))
        assert back.is_owner()
        assert back.local_value() is value
        again = rpc.rpc_sync(0, give_back, ({"deep": [rref]},))
        assert again["deep"][0].local_value() is value

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_returned_reference_is_confirmed_when_it_arrives(world: World, owner: int) -> None:
    def body() -> None:
        rref = rpc.rpc_sync(1, make_on, (owner, 6))
        assert rref.confirmed_by_owner()
        assert rref.owner().id == owner
        assert rref.rpc_sync().get() == 6
        assert rpc.rpc_sync(3, keep, (rref,)) is True

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1, 3])
def test_reference_passed_along_a_route_reaches_its_value(world: World, owner: int) -> None:
    def body() -> int:
        number: int = relay(rpc.remote(owner, Value, (owner,)), [1, 2, 2, 3, 0, 1])
        return number

    assert on_first(world, body) == owner


def test_reference_sent_twice_in_one_message_stays_one_object(world: World) -> None:
    def body() -> None:
        rref = rpc.remote(2, Value)
        first, second = rpc.rpc_sync(1, give_back, ([rref, rref],))
        assert first is second

    on_first(world, body)


def test_reference_in_a_call_that_cannot_be_sent_is_taken_back(world: World) -> None:
    def body() -> None:
        own, user = rpc.RRef(Value()), rpc.remote(1, Value)
        with pytest.raises(SerializationError):
            rpc.rpc_sync(2, give_back, ([own, user, object()],))
        assert counters().get("rref.forks") is None
        assert counters().get("rref.pending_children") is None

    on_first(world, body)


def test_reference_in_an_answer_that_comes_too_late_is_dropped(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.remote(owner, Value) for owner in range(4)]
        with pytest.raises(RpcTimeoutError):
            rpc.rpc_sync(2, hold_on, (rrefs,), timeout=0.05)
        release.set()

    on_first(world, body)


def test_reference_dropped_while_a_call_through_it_runs_keeps_the_value(world: World) -> None:
    answer = on_first(world, lambda: rpc.remote(1, Value, (8,)).rpc_async().get_when_released())
    gc.collect()
    release.set()
    assert answer.wait(PATIENCE_S) == 8


def test_value_of_a_lost_user_is_freed(world: World) -> None:
    def pass_to_all(rank: int) -> None:
        rref = rpc.RRef(Value())
        for to in (1, 2):
            rpc.rpc_sync(to, keep, (rref,))

    world.run(pass_to_all, ranks=[0])
    kill(world, 1)
    wait_until(lambda: books_of(world).get(0) == {"rref.owner_rrefs": 1, "rref.forks": 1})
    kill(world, 2)
    wait_until(lambda: 0 not in books_of(world))


def test_reference_to_a_lost_owner_raises(world: World) -> None:
    rref = on_first(world, lambda: rpc.remote(1, Value))
    answer = on_first(world, lambda: (rref.to_here, rref.rpc_async().get_when_released())[1])
    kill(world, 1)

    def body() -> None:
        with pytest.raises(OwnerLostError, match="its owner 'worker1' is lost"):
            answer.wait(PATIENCE_S)
        for use in (rref.to_here, rref.rpc_sync().get, rref.remote().get):
            with pytest.raises(OwnerLostError, match="its owner 'worker1' is lost"):
                use()

    on_first(world, body)


def test_reference_whose_owner_was_lost_cannot_be_passed_on(world: World) -> None:
    rref = on_first(world, lambda: rpc.remote(1, Value))
    kill(world, 1)

    def body() -> None:
        def refused() -> bool:
            try:
                rpc.rpc_sync(2, give_back, (rref,))
            except OwnerLostError:
                return True
            return False

        wait_until(refused)

    on_first(world, body)


def wander(rank: int, seed: int) -> int:
    """Create, pass, relay and drop at random; return how often a value answered."""
    choices, answers = random.Random(seed * 100 + rank), 0
    rrefs = [rpc.RRef(Value(rank))]
    for _ in range(60):
        rref, other = choices.choice(rrefs), choices.randrange(4)
        match choices.randrange(6):
            case 0:
                rrefs.append(rpc.remote(other, Value, (other,)))
            case 1:
                rrefs.append(rpc.rpc_sync(other, give_back, (rref,)))
            case 2:
                rrefs += rpc.rpc_sync(other, give_back, ([rref, *choices.sample(rrefs, 1)],))
            case 3:
                route = [choices.randrange(4) for _ in range(3)]
                assert rpc.rpc_sync(other, relay, (rref, route)) == rref.owner().id
                answers += 1
            case 4:
                rrefs.append(rpc.rpc_sync(other, make, (other,)))
            case 5 if len(rrefs) > 3:
                rrefs = choices.sample(rrefs, 2)
    return answers


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_on_all_workers_free_everything(world: World, seed: int) -> None:
    assert sum(world.run(wander, seed)) > 0
    check_all_freed(world)


def test_random_programs_over_processes_free_everything() -> None:
    with World(3, transport="unix") as world:
        world.run(wander_in_a_process)
        world.run(check_own_books)


def wander_in_a_process(rank: int) -> None:
    choices = random.Random(rank)
    for _ in range(40):
        rref = rpc.remote(choices.randrange(3), Value, (rank,))
        back = rpc.rpc_sync(choices.randrange(3), give_back, (rref,))
        assert back.rpc_sync().get() == rank


def check_own_books(rank: int) -> None:
    wait_until(lambda: not counters(), counters)
