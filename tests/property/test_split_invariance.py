"""The same program on one worker and cut over several gives the same values and gradients.

Programs are random graphs of operations on small integer-valued arrays, so that every sum is
exact in any order. Each operation runs on a worker of its own choice; its arguments travel
there and its result stays there until somebody fetches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.testing import World

WORKERS = 4
LEAVES = 3

OPERATIONS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b * 0.5,
    "double": lambda a, b: a * 2.0,
    "sum": lambda a, b: (a.sum() + b).sum() * dg.ones(2),
    "swap": lambda a, b: a[::-1] + b,
    "drop": lambda a, b: a.detach() + b,
    "write": lambda a, b: write(a, b),
}


def write(a: Any, b: Any) -> Any:
    result = a.clone()
    result[0] = b[1]
    return result


@dataclass(frozen=True)
class Step:
    """One operation: its arguments are results of earlier steps, or leaves."""

    operation: str
    first: int
    second: int
    worker: int
    by_reference: bool  # the result is kept where it was computed, and fetched from there


@st.composite
def programs(draw: Any) -> tuple[list[Step], list[int]]:
    steps = []
    for number in range(draw(st.integers(1, 12))):
        earlier = st.integers(0, LEAVES + number - 1)
        operation = draw(st.sampled_from(sorted(OPERATIONS)))
        worker = draw(st.integers(0, WORKERS - 1))
        steps.append(Step(operation, draw(earlier), draw(earlier), worker, draw(st.booleans())))
    results = st.integers(LEAVES, LEAVES + len(steps) - 1)
    return steps, draw(st.lists(results, min_size=1, max_size=3))


@rpc.expose
def compute(operation: str, a: Any, b: Any) -> Any:
    a, b = (value.to_here() if isinstance(value, rpc.RRef) else value for value in (a, b))
    return OPERATIONS[operation](a, b)


def leaves() -> list[Any]:
    return [dg.tensor([k + 1.0, 2.0 - k], requires_grad=True) for k in range(LEAVES)]


def alone(steps: list[Step], roots: list[int]) -> tuple[float, list[Any]]:
    own = leaves()
    values = list(own)
    for step in steps:
        values.append(OPERATIONS[step.operation](values[step.first], values[step.second]))
    loss = sum(values[root].sum() for root in roots)
    if not loss.requires_grad:
        return loss.item(), [None] * LEAVES
    loss.backward()
    return loss.item(), [None if x.grad is None else x.grad.numpy() for x in own]


def split(steps: list[Step], roots: list[int]) -> tuple[float, list[Any], list[Any]]:
    own = leaves()
    values: list[Any] = list(own)
    with dist_autograd.context() as context_id:
        for step in steps:
            args = (step.operation, values[step.first], values[step.second])
            call = rpc.remote if step.by_reference else rpc.rpc_sync
            values.append(call(step.worker, compute, args=args))
        fetched = [v.to_here() if isinstance(v, rpc.RRef) else v for v in values]
        loss = sum(fetched[root].sum() for root in roots)
        if not loss.requires_grad:
            return loss.item(), [None] * LEAVES, [None] * LEAVES
        dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=20)
        once = [gradient_or_none(context_id, x) for x in own]
        dist_autograd.backward(context_id, [loss], timeout=20)
        return loss.item(), once, [gradient_or_none(context_id, x) for x in own]


def gradient_or_none(context_id: int, x: Any) -> Any:
    found = dist_autograd.get_gradients(context_id).get(x)
    return None if found is None else found.numpy().copy()


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(0.0 if a is None else a, 0.0 if b is None else b)


@pytest.fixture(scope="module")
def world() -> Any:
    with World(WORKERS) as world:
        yield world


@pytest.mark.deadline(300)
@settings(max_examples=60)
@given(program=programs())
def test_split_over_workers_same_values_and_gradients(
    world: World, program: tuple[list[Step], list[int]]
) -> None:
    value, expected = alone(*program)
    loss, once, twice = world.run(lambda rank: split(*program), ranks=[0])[0]
    assert loss == value
    assert_same(once, expected)
    assert_same(twice, [None if g is None else 2 * g for g in expected])


@rpc.expose
def mix(x: Any, seed: int) -> Any:
    weights = np.random.default_rng(seed).normal(size=(64, 64))
    return np.tanh(x @ weights) * x


def fan_out(rank: int) -> bytes:
    """Send one tensor to all workers at once; its gradient is a sum of 8 contributions."""
    x = dg.tensor(np.random.default_rng(0).normal(size=64), requires_grad=True)
    with dist_autograd.context() as context_id:
        calls = [rpc.rpc_async(k % WORKERS, mix, args=(x, k)) for k in range(8)]
        loss = sum(call.wait() for call in calls).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        return gradient_or_none(context_id, x).tobytes()


def test_split_over_workers_repeats_to_the_bit(world: World) -> None:
    """Contributions are added in the order of the graph, not of their arrival."""
    assert len({world.run(fan_out, ranks=[0])[0] for _ in range(25)}) == 1
