"""Contexts: what they know, whom they follow, and that nothing stays of them."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest
import served
from numpy.testing import assert_array_equal

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.autograd.context import ContextPart
from distgrad.autograd.part import Run
from distgrad.config import config
from distgrad.errors import ContextError
from distgrad.testing import World


def leaf(*values: float) -> Any:
    return dg.tensor(list(values), requires_grad=True)


def on_first(world: World, program: Any) -> Any:
    return world.run(program, ranks=[0])[0]


@rpc.expose
def context_here() -> int | None:
    """Return the id of the context in which the callee serves this call."""
    try:
        return int(dist_autograd.current_context())
    except ContextError:
        return None


@rpc.expose
@rpc.functions.async_execution
def context_later() -> Any:
    future = rpc.rpc_async("worker2", context_here)
    return future.then(lambda f: [f.wait(), context_here()])


@rpc.expose
async def context_on_loop() -> Any:
    there = await rpc.rpc_async("worker2", context_here)
    task = asyncio.create_task(inner_task())
    return [there, context_here(), await task]


async def inner_task() -> int | None:
    return context_here()


def look_around(rank: int) -> Any:
    assert context_here() is None
    with dist_autograd.context() as context_id:
        seen = [
            rpc.rpc_sync("worker1", context_here),
            *rpc.rpc_sync("worker1", context_later),
            *rpc.rpc_sync("worker1", context_on_loop),
            rpc.rpc_async("worker1", context_here).then(lambda f: context_here()).wait(),
            rpc.remote("worker1", context_here).to_here(),
        ]
        assert rpc.rpc_sync("worker1", served.counters)["autograd.contexts"] == 1
    assert context_here() is None
    assert rpc.rpc_sync("worker1", context_here) is None
    return int(context_id), seen


def test_context_follows_calls_callbacks_and_tasks_without_tensors(trio: World) -> None:
    context_id, seen = on_first(trio, look_around)
    assert seen == [context_id] * 8


def known(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        rpc.rpc_sync("worker1", served.through, args=(x, [2]))
        part = dist_autograd.current_context()
        assert part == context_id == part.context_id
        assert type(part.context_id) is int
        rpc.rpc_sync("worker2", context_here)
        ids = [*part.send_functions, *part.recv_functions]
        (send,) = part.send_functions.values()
        (recv,) = part.recv_functions.values()
        assert (send.peer, recv.peer) == (1, 1)
        assert send.next_functions[0][0].variable is x
        send.set_grads([None])
        assert send.get_grads() == (None,)
        return int(context_id), ids, part.known_worker_ids, repr(part)


def test_context_ids_have_worker_and_counter(trio: World) -> None:
    context_id, ids, known_worker_ids, text = on_first(trio, known)
    assert context_id >> 48 == 0
    assert [i >> 48 for i in ids] == [0, 1]
    assert ids[0] & (1 << 48) - 1 == 1
    assert known_worker_ids == {1, 2}
    assert text == f"<DistAutogradContext {context_id} of worker 0>"


def nested_contexts(rank: int) -> None:
    x = leaf(1.0)
    with dist_autograd.context() as outer:
        loss = rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()
        with dist_autograd.context() as inner:
            assert context_here() == inner != outer
            other = rpc.rpc_sync("worker1", served.scale, args=(x, 7.0)).sum()
            dist_autograd.backward(outer, [loss])
            inner.backward(other)
            assert_array_equal(inner.gradient(x).numpy(), [7.0])
        assert context_here() == outer
        assert_array_equal(outer.gradients()[x].numpy(), [3.0])
        assert outer.gradient(leaf(0.0)) is None


@rpc.expose
def gradient_total(context_id: int) -> float:
    return float(sum(g.numpy().sum() for g in dist_autograd.get_gradients(context_id).values()))


def ask_by_context(rank: int) -> tuple[float, float]:
    x = leaf(1.0, 2.0)
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [(x * 3.0).sum()])
        return rpc.rpc_sync(rank, gradient_total, args=(context_id,)), gradient_total(context_id)


def test_context_as_an_argument_arrives_as_its_number(trio: World) -> None:
    assert on_first(trio, ask_by_context) == (6.0, 6.0)


def test_context_inside_another_is_apart(trio: World) -> None:
    on_first(trio, nested_contexts)


def finished(rank: int) -> Any:
    with dist_autograd.context() as context_id:
        assert dist_autograd.is_valid_context(context_id)
    assert not dist_autograd.is_valid_context(context_id)
    texts = []
    for use in (
        lambda: dist_autograd.backward(context_id, [leaf(1.0)]),
        lambda: dist_autograd.get_gradients(context_id),
        lambda: dist_autograd.retrieve_context(context_id),
        lambda: context_id.gradients(),
        context_id.__enter__,
        lambda: context_id.use().__enter__(),
        lambda: dist_autograd.get_gradients(987),
        dist_autograd.current_context,
    ):
        with pytest.raises(ContextError) as caught:
            use()
        texts.append(str(caught.value))
    return texts


def test_context_errors_tell_finished_from_unknown(trio: World) -> None:
    texts = on_first(trio, finished)
    assert all("it was finished" in text and "'worker0'" in text for text in texts[:4])
    assert "it is finished already" in texts[4]
    assert "it was finished" in texts[5]
    assert "worker 'worker0' has not heard of it" in texts[6]
    assert "with distgrad.autograd.context():" in texts[7]


def fail_inside(x: Any) -> None:
    with dist_autograd.context():
        rpc.rpc_sync("worker1", served.through, args=(x, [2, 0, 1]))
        rpc.rpc_sync("worker1", served.fail, args=(x,))


def leave_with_error(rank: int) -> Any:
    with pytest.raises(KeyError):
        fail_inside(leaf(1.0))
    return [served.counters(*route) for route in ([], [1], [1, 2])]


def test_context_left_by_an_error_is_released_everywhere(trio: World) -> None:
    assert on_first(trio, leave_with_error) == [served.NOTHING] * 3


def leave_with_calls_in_flight(rank: int) -> Any:
    x = leaf(1.0)
    rpc.rpc_sync("worker1", served.forbid)
    with dist_autograd.context():
        late = rpc.rpc_async("worker1", wait_and_pass_on, args=(x,))
        rpc.rpc_sync("worker1", served.scale, args=(x,))
    rpc.rpc_sync("worker1", served.permit)
    late.wait()
    return [served.counters(*route) for route in ([], [1], [1, 2])]


@rpc.expose
def wait_and_pass_on(x: Any) -> Any:
    y = served.wait_for_permission(x)
    return y + rpc.rpc_sync("worker2", served.scale, args=(x,))


def test_context_late_messages_do_not_bring_it_back(trio: World) -> None:
    assert on_first(trio, leave_with_calls_in_flight) == [served.NOTHING] * 3


def test_context_many_are_forgotten_within_bounds(threads: World) -> None:
    def program(rank: int) -> Any:
        for _ in range(300):
            with dist_autograd.context():
                rpc.rpc_sync("worker1", context_here)
        return [served.counters(*route) for route in ([], [1])]

    assert on_first(threads, program) == [served.NOTHING] * 2


def test_context_released_leaves_nothing_to_the_garbage_collector(threads: World) -> None:
    def alive() -> int:
        return sum(type(found) in (ContextPart, Run) for found in gc.get_objects())

    def program(rank: int) -> list[int]:
        counts = [alive()]
        for retain in (False, True):
            for _ in range(20):
                with dist_autograd.context() as context_id:
                    x = leaf(1.0, 2.0)
                    y = rpc.rpc_sync("worker1", served.through, args=(x, [2]))
                    loss = rpc.rpc_sync("worker2", served.scale, args=(y,)).sum()
                    dist_autograd.backward(context_id, [loss], retain_graph=retain)
            for route in ([1, 2], [2]):
                served.counters(*route)
            counts.append(alive())
        return counts

    gc.collect()
    gc.disable()
    try:
        before, *after = on_first(threads, program)
    finally:
        gc.enable()
    assert max(after) < before + 10  # of 240


def test_tombstones_forget_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    from distgrad.autograd.tombstones import Tombstones

    monkeypatch.setattr("distgrad.autograd.tombstones._MOST", 10)
    stones = Tombstones()
    for number in range(25):
        stones.add(number)
    assert [n for n in range(25) if n in stones] == list(range(15, 25))
    monkeypatch.setattr(config, "tombstone_s", 0.0)
    stones.add(25)
    assert [n for n in range(26) if n in stones] == [25]


blocks = threading.Event()
late: list[Any] = []


@rpc.expose
def block() -> None:
    blocks.set()
    assert served.may_return.wait(30)


def leave_a_call_that_waits_for_a_thread(rank: int) -> None:
    blocks.clear()
    served.forbid()
    late[:] = [rpc.rpc_async("worker1", block)]
    assert blocks.wait(30)
    with dist_autograd.context():
        late.append(rpc.rpc_async("worker1", context_here))
        late.append(rpc.rpc_async("worker1", served.scale, args=(leaf(1.0),)))


def outlive_contexts(rank: int) -> Any:
    """Forget the others' contexts over those of this worker; then let it serve again."""
    for _ in range(10):
        with dist_autograd.context():
            rpc.rpc_sync("worker0", served.scale, args=(leaf(1.0),))
    served.permit()


def wait_for_late_calls(rank: int) -> Any:
    _, context_id, scaled = (call.wait() for call in late)
    late.clear()
    return context_id, scaled.detach().numpy()


def counters_once_they_are(expected: Any, world: World) -> Any:
    pause = threading.Event()
    for _ in range(500):
        found = world.run(lambda rank: served.counters())
        if found == expected:
            break
        pause.wait(0.01)
    return found


def test_context_that_is_forgotten_and_comes_back_is_released_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distgrad.autograd.tombstones._MOST", 4)
    with World(2, num_worker_threads=1) as world:
        on_first(world, leave_a_call_that_waits_for_a_thread)
        world.run(outlive_contexts, ranks=[1])
        context_id, scaled = on_first(world, wait_for_late_calls)
        assert context_id is not None  # the call brought it back
        assert_array_equal(scaled, [3.0])
        assert counters_once_they_are([served.NOTHING] * 2, world) == [served.NOTHING] * 2


def hold_a_context_and_use_it_late(rank: int) -> Any:
    x = leaf(2.0)
    with dist_autograd.context() as context_id:
        for _ in range(10):
            with dist_autograd.context():
                rpc.rpc_sync("worker1", context_here)
        seen = rpc.rpc_sync("worker1", context_here)
        loss = rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()
        dist_autograd.backward(context_id, [loss])
        return seen == context_id, dist_autograd.get_gradients(context_id)[x].numpy()


def test_context_older_than_those_that_are_forgotten_is_a_context_as_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distgrad.autograd.tombstones._MOST", 4)
    with World(2) as world:
        is_same, gradient = on_first(world, hold_a_context_and_use_it_late)
        assert is_same
        assert_array_equal(gradient, [3.0])
        assert counters_once_they_are([served.NOTHING] * 2, world) == [served.NOTHING] * 2


def test_context_used_in_a_second_thread(threads: World) -> None:
    def program(rank: int) -> Any:
        x = leaf(1.0)
        worker = rpc.current_worker()
        with dist_autograd.context() as context_id:

            def compute() -> None:
                from distgrad.rpc.activity import Activity, activity

                activity.set(Activity(worker))
                assert context_here() is None
                with context_id.use():
                    results.append(rpc.rpc_sync("worker1", served.scale, args=(x,)))
                assert context_here() is None

            results: list[Any] = []
            thread = threading.Thread(target=compute)
            thread.start()
            thread.join(30)
            context_id.backward(results[0].sum())
            return context_id.gradient(x).numpy()

    assert_array_equal(on_first(threads, program), [3.0])


def test_context_trace_graph_remembers_call_sites(
    threads: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "trace_graph", True)

    def program(rank: int) -> Any:
        x = leaf(1.0)
        with dist_autograd.context() as context_id:
            rpc.rpc_sync("worker1", served.scale, args=(x,))
            (send,) = context_id.send_functions.values()
            return send.metadata["recorded at"]

    assert "test_context.py:" in on_first(threads, program)
