"""Calls of methods of remote values."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from distgrad import rpc
from distgrad.errors import DistgradError, NotExposedError, RpcTimeoutError
from distgrad.testing import World

release = threading.Event()


@rpc.expose
class Account:
    """A value with methods of every kind."""

    def __init__(self, balance: int = 0) -> None:
        self.balance = balance

    def add(self, amount: int, *, times: int = 1) -> int:
        self.balance += amount * times
        return self.balance

    def fail(self) -> None:
        raise KeyError("empty")

    def worker(self) -> str:
        return rpc.get_worker_info().name

    def wait_for_release(self) -> str:
        assert release.wait(30)
        return "released"

    @rpc.functions.async_execution
    def add_later(self, amount: int) -> rpc.Future:
        return rpc.rpc_async(0, twice, (amount,)).then(lambda doubled: self.add(doubled.wait()))

    async def add_on_loop(self, amount: int) -> int:
        await asyncio.sleep(0)
        return self.add(amount)

    def _secret(self) -> None:
        """Not public."""


@rpc.expose
def twice(value: int) -> int:
    return 2 * value


@rpc.expose
def open_when_released() -> Account:
    assert release.wait(30)
    return Account(1)


class Hidden:
    """Not exposed."""

    def get(self) -> int:
        return 1


@rpc.expose
def make_hidden() -> Any:
    return Hidden()


@pytest.fixture
def world() -> Iterator[World]:
    release.clear()
    with World(2) as running:
        yield running
        release.set()


def on_first(world: World, body: Any) -> Any:
    return world.run(lambda rank: body(), ranks=[0])[0]


@pytest.mark.parametrize("owner", [0, 1])
def test_proxy_methods_run_on_the_value(world: World, owner: int) -> None:
    def body() -> None:
        account = rpc.remote(owner, Account, (10,))
        assert account.rpc_sync().worker() == f"worker{owner}"
        assert account.rpc_sync().add(1) == 11
        assert account.rpc_async().add(2, times=3).wait() == 17
        assert account.remote().add(amount=3).to_here() == 20

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("method", ["add_later", "add_on_loop"])
def test_proxy_method_that_answers_later_is_followed(world: World, owner: int, method: str) -> None:
    def body() -> None:
        account = rpc.remote(owner, Account)
        expected = 0
        for call in (
            lambda: getattr(account.rpc_sync(), method)(1),
            lambda: getattr(account.rpc_async(), method)(1).wait(),
            lambda: getattr(account.remote(), method)(1).to_here(),
        ):
            expected += 2 if method == "add_later" else 1
            assert call() == expected

    on_first(world, body)


def test_proxy_call_costs_one_round_trip(world: World) -> None:
    def body() -> None:
        account = rpc.remote(1, Account)
        account.rpc_sync().add(1)
        before = rpc.debug_info()["rpc.calls_issued"]
        proxy = account.rpc_sync()
        for _ in range(5):
            proxy.add(1)
        assert rpc.debug_info()["rpc.calls_issued"] == before + 5

    on_first(world, body)


def test_proxy_waits_for_a_value_that_is_still_made(world: World) -> None:
    def body() -> None:
        account = rpc.remote(1, open_when_released)
        answer, made = account.rpc_async().add(1), account.remote().add(10)
        assert not answer.done()
        release.set()
        assert {answer.wait(), made.to_here()} in ({2, 12}, {11, 12})

    on_first(world, body)


def test_proxy_timeout_counts_for_the_call(world: World) -> None:
    def body() -> None:
        account = rpc.remote(1, Account)
        with pytest.raises(RpcTimeoutError, match="cannot finish call RRef 0x0"):
            account.rpc_sync(timeout=0.05).wait_for_release()
        with pytest.raises(RpcTimeoutError):
            account.rpc_async(timeout=0.05).wait_for_release().wait()

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1])
def test_proxy_failure_of_the_method_is_raised(world: World, owner: int) -> None:
    def body() -> None:
        account = rpc.remote(owner, Account)
        with pytest.raises(KeyError, match="empty"):
            account.rpc_sync().fail()
        with pytest.raises(KeyError, match="empty"):
            account.rpc_async().fail().wait()
        with pytest.raises(KeyError, match="empty"):
            account.remote().fail().to_here()

    on_first(world, body)


def test_proxy_method_that_does_not_exist_is_named(world: World) -> None:
    def body() -> None:
        account = rpc.remote(1, Account)
        with pytest.raises(AttributeError, match="no attribute 'subtract'"):
            account.rpc_sync().subtract(1)

    on_first(world, body)


def test_proxy_private_method_is_refused(world: World) -> None:
    def body() -> None:
        account = rpc.remote(1, Account)
        with pytest.raises(NotExposedError, match=r"Account\._secret"):
            account.rpc_sync()._secret()
        with pytest.raises(AttributeError, match="__len__"):
            account.rpc_sync().__len__()

    on_first(world, body)


def test_proxy_of_a_class_that_is_not_exposed_is_refused(world: World) -> None:
    def body() -> None:
        hidden = rpc.remote(1, make_hidden)
        with pytest.raises(NotExposedError, match=r"Hidden\.get on worker 'worker1'"):
            hidden.rpc_sync().get()
        with pytest.raises(NotExposedError, match=r"Hidden\.get on worker 'worker1'"):
            hidden.remote().get().to_here()

    on_first(world, body)


def test_backward_without_context_is_for_the_owner(world: World) -> None:
    def body() -> None:
        with pytest.raises(DistgradError, match="a local pass runs on the owner only"):
            rpc.remote(1, twice, (2,)).backward()

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1])
def test_backward_from_another_value_than_a_tensor_is_refused(world: World, owner: int) -> None:
    def body() -> None:
        rref = rpc.remote(owner, twice, (2,))
        with pytest.raises(DistgradError, match="its value is int, not a Tensor"):
            rref.backward(dist_autograd_ctx_id=1)

    on_first(world, body)
