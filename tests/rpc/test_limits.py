"""A message that its receiver would refuse is refused where it is made, and nobody is lost."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.config import config
from distgrad.errors import BackwardError, SerializationError
from distgrad.rpc import lifecycle, payload
from distgrad.testing import World

LIMITS = {
    "max_payload_bytes": 100_000,
    "max_meta_bytes": 20_000,
    "max_items": 500,
    "max_depth": 20,
    "max_buffers": 4,
}


@rpc.expose
def echo(value: Any) -> Any:
    return value


@rpc.expose
def make(what: str) -> Any:
    return value_beyond(what)


def value_beyond(setting: str, size: int = 2) -> Any:
    """Return what is ``size`` times larger than worker ``small`` takes."""
    limit = LIMITS[setting] * size
    if setting == "max_payload_bytes":
        return np.ones(limit, np.uint8)
    if setting == "max_meta_bytes":
        return "x" * limit
    if setting == "max_items":
        return list(range(limit))
    if setting == "max_buffers":
        return [np.ones(3000, np.uint8) for _ in range(limit)]
    value: list[Any] = []
    for _ in range(limit):
        value = [value]
    return value


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    """Two workers, of which one has small limits."""

    def apply() -> tuple[int, ...]:
        if multiprocessing.current_process().name == "small":
            for setting, limit in LIMITS.items():
                setattr(config, setting, limit)
        return payload.apply_limits()

    monkeypatch.setattr(lifecycle, "apply_limits", apply)
    with World(2, transport=request.param, names=["large", "small"]) as world:
        yield world


both = pytest.mark.parametrize("world", ["unix", "tcp"], indirect=True)


def failure_of(to: str, function: Any, *args: Any) -> str:
    with pytest.raises(SerializationError) as caught:
        rpc.rpc_sync(to, function, args, timeout=20)
    return str(caught.value)


def check(text: str, setting: str) -> None:
    assert "cannot send " in text
    assert str(LIMITS[setting]) in text
    assert "the limit of worker 'small'" in text
    assert f"raise {setting} on worker 'small'" in text


def send_too_much(rank: int) -> None:
    for setting in LIMITS:
        text = failure_of("small", echo, {"arg": value_beyond(setting)})
        assert "args[0]['arg']" in text
        check(text, setting)
        assert rpc.rpc_sync("small", echo, (setting,), timeout=20) == setting
    text = failure_of("small", echo, value_beyond("max_payload_bytes"))
    assert "they have 200000 or more" in text
    text = failure_of("small", echo, value_beyond("max_meta_bytes"))
    assert int(text.partition("it has ")[2].partition(" ")[0]) >= 40_000


@both
def test_limits_a_call_beyond_those_of_the_callee_is_refused_and_the_next_one_runs(
    world: World,
) -> None:
    world.run(send_too_much, ranks=[0])
    assert world.run(call_back, ranks=[1]) == ["still here"]


def call_back(rank: int) -> Any:
    return rpc.rpc_sync("large", echo, ("still here",), timeout=20)


def ask_too_much(rank: int) -> None:
    for setting in LIMITS:
        check(failure_of("large", make, setting), setting)
        assert rpc.rpc_sync("large", echo, (setting,), timeout=20) == setting


@both
def test_limits_an_answer_beyond_those_of_the_caller_is_an_error(world: World) -> None:
    world.run(ask_too_much, ranks=[1])


def exceed_own(rank: int) -> None:
    text = failure_of("large", echo, value_beyond("max_payload_bytes"))
    assert "the limit of" not in text
    assert "raise max_payload_bytes on all workers" in text
    assert rpc.rpc_sync("large", echo, (value_beyond("max_items", 1),), timeout=20)


@pytest.mark.parametrize("world", ["unix"], indirect=True)
def test_limits_of_the_sender_hold_as_before(world: World) -> None:
    world.run(exceed_own, ranks=[1])


leaf = dg.Tensor(np.ones(7500), requires_grad=True)  # 60 000 bytes


@rpc.expose
def twice_leaf() -> Any:
    return leaf * 2.0


def differentiate(rank: int) -> None:
    with dist_autograd.context() as context_id:
        parts = [rpc.rpc_sync("small", twice_leaf, timeout=20) for _ in range(2)]
        loss = (parts[0] * parts[1]).sum()
        with pytest.raises(BackwardError) as caught:  # both gradients go back in one message
            dist_autograd.backward(context_id, [loss])
    check(str(caught.value.__cause__), "max_payload_bytes")
    assert rpc.rpc_sync("small", echo, ("still here",), timeout=20) == "still here"


@pytest.mark.parametrize("world", ["unix"], indirect=True)
def test_limits_of_gradients_fail_the_pass_and_nothing_else(world: World) -> None:
    world.run(differentiate, ranks=[0])
