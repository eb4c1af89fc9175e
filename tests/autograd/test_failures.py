"""Passes that fail: everybody is told why, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import served
from numpy.testing import assert_array_equal

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.errors import (
    BackwardError,
    ContextError,
    RpcTimeoutError,
    TransportError,
    WorkerLostError,
)
from distgrad.testing import World


@rpc.expose
def fickle_behind(x: Any, route: list[int]) -> Any:
    if not route:
        return served.fickle(x)
    return rpc.rpc_sync(route[0], fickle_behind, args=(x * 1.0, route[1:])) * 1.0


def broken_rule(rank: int) -> Any:
    x = dg.tensor([1.0], requires_grad=True)
    rpc.rpc_sync("worker2", served.break_rules, args=(True,))
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", fickle_behind, args=(x, [2])).sum()
        other = rpc.rpc_sync("worker1", served.through, args=(x, [2, 1, 0])).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss + other], retain_graph=True, timeout=20)
        error = caught.value
        assert isinstance(error.__cause__, ZeroDivisionError)
        assert error.__cause__.args == ("this rule is broken",)
        rpc.rpc_sync("worker2", served.break_rules, args=(False,))
        before = {k: g.numpy() * 1.0 for k, g in dist_autograd.get_gradients(context_id).items()}
        dist_autograd.backward(context_id, [loss], timeout=20)
        gained = dist_autograd.get_gradients(context_id)[x].numpy() - before.get(x, 0.0)
        running = [served.counters(*route)["autograd.passes"] for route in ([], [1], [1, 2])]
    left = [served.counters(*route) for route in ([], [1], [1, 2])]
    return error.worker, error.node, error.remote_traceback, str(error), gained, running, left


def test_backward_broken_rule_elsewhere_names_worker_node_and_traceback(trio: World) -> None:
    worker, node, trace, text, gained, running, left = trio.run(broken_rule, ranks=[0])[0]
    assert worker == "worker2"
    assert "Fickle" in node
    assert "raise ZeroDivisionError" in trace
    assert "on worker 'worker2'" in text
    assert "raise ZeroDivisionError" in text
    assert_array_equal(gained, [1.0])
    assert running == [0, 0, 0]
    assert left == [served.NOTHING] * 3


@rpc.expose
def fickle_sum(x: Any) -> Any:
    return fickle_behind(x, [2]).sum()


def broken_rule_of_a_reference(rank: int) -> Any:
    """Worker 1 owns the root, worker 2 the rule that raises."""
    x = dg.tensor([1.0], requires_grad=True)
    rpc.rpc_sync("worker2", served.break_rules, args=(True,))
    with dist_autograd.context() as context_id:
        rref = rpc.remote("worker1", fickle_sum, args=(x,))
        with pytest.raises(BackwardError) as caught:
            rref.backward(int(context_id))
        rpc.rpc_sync("worker2", served.break_rules, args=(False,))
    error = caught.value
    left = [served.counters(*route) for route in ([], [1], [1, 2])]
    return type(error.__cause__), str(error.__cause__), error.worker, error.node, str(error), left


def test_backward_of_a_reference_that_fails_tells_its_user_all(trio: World) -> None:
    cause, words, worker, node, text, left = trio.run(broken_rule_of_a_reference, ranks=[0])[0]
    assert (cause, words) == (ZeroDivisionError, "this rule is broken")
    assert worker == "worker2"
    assert "Fickle" in node
    assert "raise ZeroDivisionError" in text
    assert left == [served.NOTHING] * 3


def broken_at_home(rank: int) -> None:
    x = dg.tensor([1.0], requires_grad=True)
    served.broken.set()
    with dist_autograd.context() as context_id:
        y = served.fickle(x)
        loss = rpc.rpc_sync("worker1", served.scale, args=(y,)).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss], timeout=20)
    served.broken.clear()
    assert caught.value.worker == "worker0"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None
    assert [served.counters(*route) for route in ([], [1])] == [served.NOTHING] * 2


def test_backward_broken_rule_here_keeps_the_exception_itself(trio: World) -> None:
    trio.run(broken_at_home, ranks=[0])


def too_slow(rank: int) -> None:
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.held, args=(x,)).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss], timeout=0.05)
        assert isinstance(caught.value.__cause__, RpcTimeoutError)
        rpc.rpc_sync("worker1", served.let_go)
        again = rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()
        dist_autograd.backward(context_id, [again], timeout=20)
        assert_array_equal(dist_autograd.get_gradients(context_id)[x].numpy(), [3.0])
    assert [served.counters(*route) for route in ([], [1])] == [served.NOTHING] * 2


def test_backward_timeout_fails_the_pass_and_leaves_the_context_usable(trio: World) -> None:
    trio.run(too_slow, ranks=[0])


class Lasting(dg.Function):
    """The identity; by the clock of the passes, its rule takes 1 000 s."""

    clock = SimpleNamespace(offset=0.0, monotonic=lambda: time.monotonic() + Lasting.clock.offset)

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        Lasting.clock.offset += 1000.0
        return grad


def too_slow_at_home(rank: int) -> None:
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = Lasting.apply(rpc.rpc_sync("worker1", served.held, args=(x,))).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss], timeout=500)
        assert isinstance(caught.value.__cause__, RpcTimeoutError)
        rpc.rpc_sync("worker1", served.let_go)
    assert [served.counters(*route) for route in ([], [1])] == [served.NOTHING] * 2


def test_backward_timeout_counts_from_the_call(
    threads: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the root runs before it has told anybody takes of the time as well."""
    monkeypatch.setattr("distgrad.autograd.engine.time", Lasting.clock)
    threads.run(too_slow_at_home, ranks=[0])


def lose_a_worker(rank: int) -> Any:
    """Worker 0 runs a pass that waits for worker 2, which is killed meanwhile."""
    if rank == 1:
        return rpc.rpc_sync("worker2", served.wait_for_start)
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.held_behind, args=(x,)).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss], timeout=30)
        assert isinstance(caught.value.__cause__, WorkerLostError)
        again = rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()
        dist_autograd.backward(context_id, [again], timeout=20)
        found = dist_autograd.get_gradients(context_id)[x].numpy()
    return found, [served.counters(*route) for route in ([], [1])]


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_backward_worker_killed_during_the_pass_fails_it_at_once(transport: str) -> None:
    served.started.clear()
    with World(3, transport=transport) as world:
        outcome: list[Any] = []
        root = threading.Thread(
            target=lambda: outcome.append(world.run(lose_a_worker, ranks=[0])[0])
        )
        root.start()
        if transport == "inproc":
            assert served.started.wait(30)
        else:
            wait_until_started(world)
        world.kill(2)
        root.join(40)
        served.may_go_on.set()
        ((found, left),) = outcome
        assert_array_equal(found, [3.0])
        assert left == [served.NOTHING] * 2


def wait_until_started(world: World) -> None:
    assert world.run(lose_a_worker, ranks=[1]) == [True]


def call_until_lost(name: str, x: Any) -> None:
    """A worker is lost when its connection is seen to end, soon after it ended."""
    while True:
        try:
            rpc.rpc_sync(name, served.scale, args=(x,))
        except WorkerLostError:
            return
        except TransportError:
            continue


def test_backward_after_a_worker_was_lost_goes_on_with_the_others() -> None:
    def program(rank: int) -> Any:
        x = dg.tensor([1.0], requires_grad=True)
        with dist_autograd.context() as context_id:
            first = rpc.rpc_sync("worker2", served.scale, args=(x,))
            world.kill(2)
            call_until_lost("worker2", x)
            loss = rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()
            dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=20)
            found = dist_autograd.get_gradients(context_id)[x].numpy()
            with pytest.raises(BackwardError) as caught:
                dist_autograd.backward(context_id, [loss + first.sum()], timeout=20)
            assert isinstance(caught.value.__cause__, WorkerLostError)
        return found, [served.counters(*route) for route in ([], [1])]

    with World(3) as world:
        found, left = world.run(program, ranks=[0])[0]
    assert_array_equal(found, [3.0])
    assert left == [served.NOTHING] * 2


def test_backward_context_released_meanwhile_fails_the_pass(threads: World) -> None:
    context_ids: list[Any] = []

    def create(rank: int) -> None:
        x = dg.tensor([1.0], requires_grad=True)
        with dist_autograd.context() as context_id:
            rref = rpc.remote("worker1", served.scale, args=(x,))
            rpc.rpc_sync("worker2", prepare, args=(rref,))
            context_ids.append(int(context_id))
            may_leave.wait(30)

    def run_pass(rank: int) -> None:
        while not context_ids:
            rpc.rpc_sync("worker0", served.counters)
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_ids[0], [prepared.pop()], timeout=30)
        assert isinstance(caught.value.__cause__, ContextError)

    may_leave = threading.Event()
    served.started.clear()
    creator = threading.Thread(target=lambda: threads.run(create, ranks=[0]))
    creator.start()
    runner = threading.Thread(target=lambda: failures.extend(threads.run(run_pass, ranks=[2])))
    failures: list[Any] = []
    runner.start()
    assert served.started.wait(30)
    may_leave.set()
    creator.join(30)
    served.may_go_on.set()
    runner.join(30)
    assert failures == [None]


prepared: list[Any] = []


@rpc.expose
def prepare(rref: Any) -> None:
    served.may_go_on.clear()
    prepared.append(served.Held.apply(rref.to_here()).sum())


@rpc.expose
def hooked(x: Any) -> Any:
    def complain(grad: Any) -> Any:
        raise LookupError("this hook is broken")

    y = x * 1.0
    y.register_hook(complain)
    return y * 1.0


def broken_hook(rank: int) -> Any:
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", hooked, args=(x,)).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss], timeout=20)
        assert isinstance(caught.value.__cause__, LookupError)
        again = rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()
        dist_autograd.backward(context_id, [again], timeout=20)
        gained = dist_autograd.get_gradients(context_id)[x].numpy()
    return caught.value.worker, gained, [served.counters(*route) for route in ([], [1])]


def test_backward_broken_hook_fails_the_pass_and_leaves_the_context_usable(trio: World) -> None:
    worker, gained, left = trio.run(broken_hook, ranks=[0])[0]
    assert worker == "worker1"
    assert_array_equal(gained, [3.0])
    assert left == [served.NOTHING] * 2


def run_beside_a_bystander(rank: int) -> Any:
    x = dg.tensor([1.0], requires_grad=True)
    rpc.rpc_sync("worker2", served.counters)  # it is connected, and has no part in the context
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.held, args=(x,)).sum()
        dist_autograd.backward(context_id, [loss], timeout=30)
        return dist_autograd.get_gradients(context_id)[x].numpy()


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_backward_worker_without_part_in_the_pass_may_die(transport: str) -> None:
    served.started.clear()
    with World(3, transport=transport) as world:
        outcome: list[Any] = []
        root = threading.Thread(
            target=lambda: outcome.append(world.run(run_beside_a_bystander, ranks=[0])[0])
        )
        root.start()
        if transport == "inproc":
            assert served.started.wait(30)
        else:
            assert world.run(start_of_neighbour, ranks=[1]) == [True]
        world.kill(2)
        if transport == "inproc":
            served.may_go_on.set()
        else:
            world.run(let_go_here, ranks=[1])
        root.join(40)
        assert_array_equal(outcome[0], [1.0])


def start_of_neighbour(rank: int) -> bool:
    return served.wait_for_start()


def let_go_here(rank: int) -> None:
    served.may_go_on.set()


def unused_and_dead(rank: int) -> Any:
    """A worker dies that the loss does not use, and nobody has noticed when the pass begins."""
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        rpc.rpc_sync("worker2", served.scale, args=(x,))
        loss = rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()
        killer.set()
        assert killed.wait(30)
        outcomes = []
        for _ in range(20):
            try:
                dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=20)
                outcomes.append("done")
            except BackwardError as error:
                outcomes.append(type(error.__cause__).__name__)
        found = dist_autograd.get_gradients(context_id)[x].numpy()[0]
    return outcomes, found


killer, killed = threading.Event(), threading.Event()


def test_backward_dead_worker_that_is_part_fails_passes_until_its_loss_is_known() -> None:
    """Then the rest goes on without it; none of them waits."""
    killer.clear()
    killed.clear()
    with World(3) as world:
        results: list[Any] = []
        root = threading.Thread(
            target=lambda: results.append(world.run(unused_and_dead, ranks=[0])[0])
        )
        root.start()
        assert killer.wait(30)
        world.kill(2)
        killed.set()
        root.join(50)
    outcomes, found = results[0]
    assert outcomes[-1] == "done"
    assert set(outcomes) <= {"WorkerLostError", "done"}
    assert sorted(outcomes) == outcomes  # lost first, then done
    assert found >= 3.0 * outcomes.count("done")


def open_and_stay(rank: int) -> None:
    """Enter a context that reaches everybody, and do not leave it."""
    x = dg.tensor([1.0], requires_grad=True)
    abandoned.append(dist_autograd.context().__enter__())
    rpc.rpc_sync("worker1", served.through, args=(x, [2, 1, 0, 2]))


abandoned: list[Any] = []


def contexts_here(rank: int) -> int:
    return dist_autograd.debug_info()["autograd.contexts"]


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_backward_contexts_of_a_dead_creator_are_forgotten(transport: str) -> None:
    pause = threading.Event()
    with World(3, transport=transport) as world:
        world.run(open_and_stay, ranks=[0])
        assert world.run(contexts_here, ranks=[1, 2]) == [1, 1]
        world.kill(0)
        for _ in range(1000):
            if not any(world.run(contexts_here, ranks=[1, 2])):
                break
            pause.wait(0.01)
        assert world.run(contexts_here, ranks=[1, 2]) == [0, 0]
    abandoned.clear()
