"""Remote references: making them, asking for their values, what they say of themselves."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from distgrad import rpc
from distgrad.errors import (
    DistgradError,
    NotExposedError,
    RpcTimeoutError,
    SerializationError,
)
from distgrad.testing import World

release = threading.Event()


@rpc.expose
def add(a: Any, b: Any) -> Any:
    return a + b


@rpc.expose
def fail(text: str) -> None:
    raise LookupError(text)


@rpc.expose
def make_when_released() -> str:
    assert release.wait(30)
    return "made"


@rpc.expose
@rpc.functions.async_execution
def make_later() -> rpc.Future:
    return rpc.rpc_async(0, add, (20, 3))


@rpc.expose
async def make_on_loop() -> int:
    await asyncio.sleep(0)
    return 42


def hidden() -> None:
    """Not exposed."""


def on_first(world: World, body: Any) -> Any:
    """Run ``body()`` on worker 0 and return its result."""
    return world.run(lambda rank: body(), ranks=[0])[0]


@pytest.fixture
def world() -> Any:
    release.clear()
    with World(2) as running:
        yield running


def fetch_twice(rank: int) -> list[float]:
    """Change a fetched value, and return what is fetched afterwards."""
    if rank != 0:
        return []
    rref = rpc.remote("worker1", add, (np.arange(3.0), 1), timeout=30)
    assert not rref.is_owner()
    assert rref.owner() == rpc.WorkerInfo("worker1", 1)
    rref.to_here()[0] = -1
    return [float(x) for x in rref.to_here(timeout=30)]


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_remote_value_arrives_as_a_copy(transport: str) -> None:
    with World(2, transport=transport) as world:
        assert world.run(fetch_twice)[0] == [1.0, 2.0, 3.0]


def test_remote_on_the_own_worker_is_owned_here(world: World) -> None:
    def body() -> None:
        rref = rpc.remote("worker0", add, (1, 2))
        assert rref.is_owner()
        assert rref.confirmed_by_owner()
        assert rref.to_here() == rref.local_value() == 3

    on_first(world, body)


def test_rref_of_a_value_is_that_value(world: World) -> None:
    def body() -> None:
        value = object()
        rref = rpc.RRef(value)
        assert rref.is_owner()
        assert rref.owner_name() == "worker0"
        assert rref.local_value() is value
        assert rref.to_here() is value

    on_first(world, body)


def test_local_value_on_a_user_is_refused(world: World) -> None:
    def body() -> None:
        rref = rpc.remote(1, add, (1, 2))
        with pytest.raises(DistgradError, match="'worker0' is not its owner, 'worker1' is"):
            rref.local_value()

    on_first(world, body)


@pytest.mark.parametrize(
    ("function", "value"), [(make_later, 23), (make_on_loop, 42)], ids=["future", "coroutine"]
)
def test_remote_function_that_answers_later_keeps_its_result(
    world: World, function: Any, value: int
) -> None:
    assert on_first(world, lambda: rpc.remote(1, function).to_here()) == value


def test_to_here_waits_for_the_function(world: World) -> None:
    def body() -> None:
        rref = rpc.remote(1, make_when_released)
        with pytest.raises(RpcTimeoutError, match=r"cannot finish fetch RRef 0x0 .*'worker1'"):
            rref.to_here(timeout=0.05)
        release.set()
        assert rref.to_here() == "made"
        assert rref.confirmed_by_owner()

    on_first(world, body)


def test_to_here_on_the_owner_waits_within_its_timeout(world: World) -> None:
    def body() -> None:
        rref = rpc.remote(0, make_when_released)
        with pytest.raises(RpcTimeoutError):
            rref.to_here(timeout=0.05)
        release.set()
        assert rref.local_value() == "made"

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1])
def test_remote_failure_is_raised_when_the_value_is_asked_for(world: World, owner: int) -> None:
    def body() -> None:
        rref = rpc.remote(owner, fail, ("no such thing",))
        for _ in range(2):
            with pytest.raises(LookupError, match="no such thing"):
                rref.to_here()

    on_first(world, body)


def test_remote_function_that_is_not_exposed_fails_the_value(world: World) -> None:
    def body() -> None:
        with pytest.raises(NotExposedError, match=r"test_rref_values.*hidden.*'worker1'"):
            rpc.remote(1, hidden).to_here()

    on_first(world, body)


def test_remote_argument_that_cannot_be_sent_is_refused_at_once(world: World) -> None:
    def body() -> None:
        with pytest.raises(SerializationError, match="no form on the wire"):
            rpc.remote(1, add, (object(), 1))
        assert rpc.debug_info()["rref.user_rrefs"] == 0

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1])
def test_rref_can_be_awaited(world: World, owner: int) -> None:
    def body() -> Any:
        async def fetch() -> Any:
            return await rpc.remote(owner, add, (2, 3))

        return asyncio.run(fetch())

    assert on_first(world, body) == 5


def test_rref_text_names_its_ids(world: World) -> None:
    def body() -> tuple[str, str]:
        return str(rpc.RRef(1)), repr(rpc.remote(1, add, (1, 2)))

    owner, user = on_first(world, body)
    assert owner == "OwnerRRef(GloballyUniqueId(created_on=0, local_id=0))"
    assert user == (
        "UserRRef(RRefId = GloballyUniqueId(created_on=0, local_id=1), "
        "ForkId = GloballyUniqueId(created_on=0, local_id=2))"
    )


def test_rref_copied_is_the_same_and_pickled_is_refused(world: World) -> None:
    def body() -> None:
        rref = rpc.remote(1, add, (1, 2))
        assert copy.copy(rref) is copy.deepcopy(rref) is rref
        with pytest.raises(SerializationError, match="cannot pickle"):
            pickle.dumps(rref)

    on_first(world, body)


def test_rref_of_another_worker_of_the_process_is_refused(world: World) -> None:
    first, _ = world.run(lambda rank: rpc.RRef(rank))

    def body() -> None:
        with pytest.raises(SerializationError, match="belongs to worker 'worker0'"):
            rpc.rpc_sync(0, add, (first, 1))

    world.run(lambda rank: body(), ranks=[1])


def test_rref_without_a_worker_is_refused() -> None:
    with pytest.raises(DistgradError, match="cannot find the current worker"):
        rpc.RRef(1)
