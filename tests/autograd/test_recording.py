"""What calls record: whatever tensors travel in, however the call is served, wherever it fails."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import served
from numpy.testing import assert_array_equal

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.testing import World


def leaf(values: Any, dtype: str = "float64") -> Any:
    return dg.tensor(np.array(values, dtype), requires_grad=True)


@rpc.expose
def weigh_all(parts: Any) -> Any:
    """Return 2 a + 3 b + 5 c of tensors in nested containers, and the parts in others."""
    (a, b), rest = parts["pair"], parts["rest"]
    c = rest[0]["c"]
    return {"sum": a * 2.0 + b * 3.0 + c * 5.0, "parts": [a, (b, {"c": c})], "plain": "text"}


def containers(rank: int) -> Any:
    a, b, c = leaf([1.0]), leaf([2.0]), leaf([3.0])
    with dist_autograd.context() as context_id:
        answer = rpc.rpc_sync("worker1", weigh_all, args=({"pair": (a, b), "rest": [{"c": c}]},))
        a2, (b2, inner) = answer["parts"]
        loss = (answer["sum"] + a2 * 10.0 + b2 * 20.0 + inner["c"] * 30.0).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        return [context_id.gradient(x).item() for x in (a, b, c)]


def views(rank: int) -> Any:
    """Slices, reversed and transposed views, and one leaf under several of them."""
    x = leaf([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync("worker1", served.multiply, args=(x.T, x.T))
        z = rpc.rpc_sync("worker1", served.scale, args=(x[::-1, ::2],))
        loss = y[0].sum() + (z * np.array([[1.0, 10.0], [100.0, 1000.0]])).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        return context_id.gradient(x).numpy()


def mixed_dtypes(rank: int) -> Any:
    x, y, z = leaf([1.0, 2.0], "float32"), leaf([3.0, 4.0]), leaf([1.0 + 2.0j, 3.0], "complex128")
    with dist_autograd.context() as context_id:
        product = rpc.rpc_sync("worker1", served.multiply, args=(x, y))
        counted = rpc.rpc_sync("worker1", served.multiply, args=(product, np.array([2, 3])))
        turned = rpc.rpc_sync("worker1", served.multiply, args=(z, np.array([2.0, 1.0j])))
        loss = counted.sum() + turned.real.sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        found = [context_id.gradient(t).numpy() for t in (x, y, z)]
        return [str(g.dtype) for g in found], [g.tolist() for g in found]


def test_recording_tensors_in_nested_containers(trio: World) -> None:
    assert trio.run(containers, ranks=[0])[0] == [12.0, 23.0, 35.0]


def test_recording_views_that_are_not_contiguous(trio: World) -> None:
    expected = np.array([[2.0 + 300.0, 0.0, 3000.0], [8.0 + 3.0, 0.0, 30.0]])
    assert_array_equal(trio.run(views, ranks=[0])[0], expected)


def test_recording_mixed_dtypes_keep_those_of_the_leaves(trio: World) -> None:
    dtypes, values = trio.run(mixed_dtypes, ranks=[0])[0]
    assert dtypes == ["float32", "float64", "complex128"]
    assert values[:2] == [[6.0, 12.0], [2.0, 6.0]]
    (a, b) = values[2]
    assert a == 2.0
    assert abs(b) == 1.0
    assert b.real == 0.0


@rpc.expose
@rpc.functions.async_execution
def answered_by_a_thread(x: Any) -> Any:
    """Another thread completes the answer, after this call returned."""
    answer: rpc.Future = rpc.Future()
    y = x * 4.0
    threading.Thread(target=lambda: answer.set_result(y)).start()
    return answer


@rpc.expose
@rpc.functions.async_execution
def answered_by_a_callback(x: Any) -> Any:
    """The call that the callback makes belongs to the context too."""
    first = rpc.rpc_async("worker2", served.scale, args=(x,))
    return first.then(lambda f: f.wait() + rpc.rpc_sync("worker0", served.scale, args=(x, 7.0)))


@rpc.expose
async def answered_on_the_loop(x: Any) -> Any:
    first, second = await asyncio.gather(
        asyncio.ensure_future(ask("worker2", x)), asyncio.ensure_future(ask("worker0", x))
    )
    return first * 2.0 + second


async def ask(peer: str, x: Any) -> Any:
    return await rpc.rpc_async(peer, served.scale, args=(x,))


def answers_later(rank: int) -> Any:
    found = []
    for function in (answered_by_a_thread, answered_by_a_callback, answered_on_the_loop):
        x = leaf([1.0])
        with dist_autograd.context() as context_id:
            loss = rpc.rpc_sync("worker1", function, args=(x,)).sum()
            dist_autograd.backward(context_id, [loss], timeout=20)
            found.append(context_id.gradient(x).item())
    x = leaf([1.0])
    with dist_autograd.context() as context_id:
        future = rpc.rpc_async("worker1", served.scale, args=(x,))
        chained = future.then(lambda f: rpc.rpc_sync("worker2", served.scale, args=(f.wait(),)))
        dist_autograd.backward(context_id, [chained.wait().sum()], timeout=20)
        found.append(context_id.gradient(x).item())
    return found, [served.counters(*route) for route in ([], [1], [1, 2])]


def test_recording_answers_that_come_later_from_elsewhere(trio: World) -> None:
    found, left = trio.run(answers_later, ranks=[0])[0]
    assert found == [4.0, 10.0, 9.0, 9.0]
    assert left == [served.NOTHING] * 3


class Unreadable:
    """A value that can be sent and not be taken in."""


def refuse_to_read(value: Any) -> Any:
    raise ValueError("this value cannot be read")


rpc.register_type(Unreadable, lambda value: 0, refuse_to_read)


@rpc.expose
def answer_unsendable(x: Any) -> Any:
    return x, threading.Lock()


@rpc.expose
def answer_unreadable(x: Any) -> Any:
    return x * 1.0, Unreadable()


@rpc.expose
def fail_after_calls(x: Any) -> Any:
    rpc.rpc_sync("worker2", served.scale, args=(x,))
    raise KeyError("after a call of its own")


#: Where a call fails: its function and arguments besides the tensor.
FAILURES = {
    "encoding": (served.add, (threading.Lock(),), TypeError),
    "decoding": (served.add, (Unreadable(),), TypeError),
    "function": (served.fail, (), KeyError),
    "after calls": (fail_after_calls, (), KeyError),
    "no such function": (leaf, (), PermissionError),
    "answer": (answer_unsendable, (), TypeError),
    "decoding the answer": (answer_unreadable, (), TypeError),
}


def fail_at(rank: int, stage: str) -> Any:
    function, more, error = FAILURES[stage]
    x = leaf([1.0])
    with dist_autograd.context() as context_id:
        with pytest.raises(error):
            rpc.rpc_sync("worker1", function, args=(x, *more), timeout=20)
        loss = rpc.rpc_sync("worker2", served.through, args=(x, [0])).sum()
        for _ in range(2):
            dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=20)
        found = context_id.gradient(x).item()
    return found, [served.counters(*route) for route in ([], [1], [2])]


@pytest.mark.parametrize("stage", FAILURES)
def test_recording_call_that_fails_does_not_keep_passes_waiting(trio: World, stage: str) -> None:
    found, left = trio.run(fail_at, stage, ranks=[0])[0]
    assert found == 4.0
    assert left == [served.NOTHING] * 3
