"""Remote references and autograd: contexts travel with them, and passes start from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad._core import Tensor
from distgrad.errors import DistgradError, GraphError
from distgrad.testing import World

weights: dict[int, Tensor] = {}


@rpc.expose
def weighted_sum(x: Any) -> Any:
    """Multiply with the weight of the worker that is called."""
    return (weights[rpc.get_worker_info().id] * x).sum()


@rpc.expose
def gradient(context_id: int) -> Any:
    own = weights[rpc.get_worker_info().id]
    found = dist_autograd.get_gradients(context_id).get(own)
    return None if found is None else found.data


@rpc.expose
class Layer:
    """A part of a model behind an RRef."""

    def forward(self, x: Any) -> Any:
        return weighted_sum(x)


@pytest.fixture
def world() -> Iterator[World]:
    for rank in range(3):
        weights[rank] = Tensor(np.full(2, float(rank + 1)), requires_grad=True)
    with World(3) as running:
        yield running


def on_first(world: World, body: Any) -> Any:
    return world.run(lambda rank: body(), ranks=[0])[0]


def leaf() -> Tensor:
    return Tensor(np.array([2.0, 5.0]), requires_grad=True)


def check_gradients(context_id: int, x: Tensor, owner: int, times: int = 1) -> None:
    own = dist_autograd.get_gradients(context_id)[x]
    np.testing.assert_array_equal(own.data, np.full(2, times * (owner + 1.0)))
    remote = rpc.rpc_sync(owner, gradient, (int(context_id),))
    np.testing.assert_array_equal(remote, times * x.data)


@pytest.mark.parametrize("owner", [0, 1])
def test_context_travels_with_remote_and_to_here(world: World, owner: int) -> None:
    def body() -> None:
        x = leaf()
        with dist_autograd.context() as context_id:
            loss = rpc.remote(owner, weighted_sum, (x,)).to_here()
            dist_autograd.backward(context_id, [loss])
            check_gradients(context_id, x, owner)

    on_first(world, body)


@pytest.mark.parametrize("kind", ["rpc_sync", "rpc_async", "remote"])
@pytest.mark.parametrize("owner", [0, 1])
def test_context_travels_with_proxies(world: World, owner: int, kind: str) -> None:
    def body() -> None:
        x, layer = leaf(), rpc.remote(owner, Layer)
        with dist_autograd.context() as context_id:
            answer = getattr(layer, kind)().forward(x)
            loss = {
                "rpc_sync": lambda: answer,
                "rpc_async": lambda: answer.wait(),
                "remote": lambda: answer.to_here(),
            }[kind]()
            dist_autograd.backward(context_id, [loss])
            check_gradients(context_id, x, owner)

    on_first(world, body)


@pytest.mark.parametrize("owner", [0, 1])
def test_backward_starts_at_the_owner(world: World, owner: int) -> None:
    def body() -> None:
        x = leaf()
        with dist_autograd.context() as context_id:
            loss = rpc.remote(owner, weighted_sum, (x,))
            loss.backward(context_id, retain_graph=True)
            check_gradients(context_id, x, owner)
            loss.backward(context_id)
            check_gradients(context_id, x, owner, times=2)

    on_first(world, body)


def test_backward_by_a_third_worker_starts_at_the_owner(world: World) -> None:
    def body() -> None:
        x = leaf()
        with dist_autograd.context() as context_id:
            loss = rpc.remote(1, weighted_sum, (x,))
            rpc.rpc_sync(2, run_backward, (loss, int(context_id)))
            check_gradients(context_id, x, 1)

    on_first(world, body)


@rpc.expose
def run_backward(loss: Any, context_id: int) -> None:
    loss.backward(context_id)


def test_backward_without_context_fills_grad_and_heeds_retain_graph(world: World) -> None:
    def body() -> None:
        x = leaf()
        loss = rpc.RRef((x * x).sum())
        loss.backward(retain_graph=True)
        loss.backward()
        assert x.grad is not None
        np.testing.assert_array_equal(x.grad.data, 4 * x.data)
        with pytest.raises(GraphError):
            loss.backward()

    on_first(world, body)


def test_backward_failure_at_the_owner_is_raised(world: World) -> None:
    def body() -> None:
        with dist_autograd.context() as context_id:
            loss = rpc.remote(1, weighted_sum, (np.ones(2),))
            loss.backward(context_id)
            with pytest.raises(DistgradError):
                loss.backward(context_id)

    on_first(world, body)
