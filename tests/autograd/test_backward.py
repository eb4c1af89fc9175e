"""Backward passes across workers: gradients as on one worker, and every pass ends."""

from __future__ import annotations

import re
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import served
from numpy.testing import assert_array_equal

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.errors import BackwardError, ContextError, GraphError, RpcTimeoutError
from distgrad.testing import World


def on_first(world: World, program: Any) -> Any:
    return world.run(program, ranks=[0])[0]


def leaf(*values: float) -> Any:
    return dg.tensor(list(values), requires_grad=True)


def gradient(context_id: int, tensor: Any) -> Any:
    return dist_autograd.get_gradients(context_id)[tensor].numpy()


def one_call(rank: int) -> Any:
    x = leaf(1.0, 2.0)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.weigh, args=(x,)).sum()
        dist_autograd.backward(context_id, [loss])
        there = rpc.rpc_sync("worker1", served.gradient_of_weight, args=(int(context_id),))
        assert x.grad is None
        return gradient(context_id, x), there


def test_backward_one_call_gives_gradients_on_both_workers(trio: World) -> None:
    here, there = on_first(trio, one_call)
    assert_array_equal(here, [2.0, 3.0])
    assert_array_equal(there, [1.0, 2.0])


def unused_result(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        rpc.rpc_sync("worker1", served.scale, args=(x,))
        rpc.rpc_sync("worker2", served.through, args=(x, [1, 0]))
        loss = rpc.rpc_sync("worker1", served.scale, args=(x, 5.0)).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        return gradient(context_id, x)


def test_backward_unused_results_do_not_keep_it_waiting(trio: World) -> None:
    assert_array_equal(on_first(trio, unused_result), [5.0])


def failed_calls(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        with pytest.raises(KeyError):
            rpc.rpc_sync("worker1", served.fail, args=(x,))
        with pytest.raises(dg.rpc.NotExposedError):
            rpc.rpc_sync("worker1", on_first, args=(x,))
        loss = rpc.rpc_sync("worker1", served.scale, args=(x, 5.0)).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        return gradient(context_id, x)


def test_backward_after_failed_calls_ends(trio: World) -> None:
    assert_array_equal(on_first(trio, failed_calls), [5.0])


def timed_out_call(rank: int) -> Any:
    x = leaf(1.0)
    rpc.rpc_sync("worker1", served.forbid)
    with dist_autograd.context() as context_id:
        with pytest.raises(RpcTimeoutError):
            rpc.rpc_sync("worker1", served.wait_for_permission, args=(x,), timeout=0.05)
        loss = rpc.rpc_sync("worker2", served.scale, args=(x, 5.0)).sum()
        dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=20)
        rpc.rpc_sync("worker1", served.permit)
        dist_autograd.backward(context_id, [loss], timeout=20)
        return gradient(context_id, x)


def test_backward_during_and_after_timed_out_call_ends(trio: World) -> None:
    assert_array_equal(on_first(trio, timed_out_call), [10.0])


def call_in_flight(rank: int) -> Any:
    x = leaf(1.0)
    rpc.rpc_sync("worker1", served.forbid)
    with dist_autograd.context() as context_id:
        late = rpc.rpc_async("worker1", served.wait_for_permission, args=(x,))
        loss = rpc.rpc_sync("worker1", served.scale, args=(x, 5.0)).sum()
        dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=20)
        rpc.rpc_sync("worker1", served.permit)
        dist_autograd.backward(context_id, [late.wait().sum()], timeout=20)
        return gradient(context_id, x)


def test_backward_with_call_in_flight_leaves_it_out_and_takes_it_next_time(trio: World) -> None:
    assert_array_equal(on_first(trio, call_in_flight), [6.0])


def nested(rank: int) -> Any:
    x = leaf(1.0, -1.0)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.bounce, args=(x, 9)).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        part = dist_autograd.retrieve_context(context_id)
        return gradient(context_id, x), len(part.send_functions), len(part.recv_functions)


def test_backward_nested_calls_back_and_forth(trio: World) -> None:
    found, sends, recvs = on_first(trio, nested)
    assert_array_equal(found, [4.0**9] * 2)
    assert (sends, recvs) == (9, 9)


def repeated(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.through, args=(x, [2, 0])).sum()
        dist_autograd.backward(context_id, [loss], retain_graph=True)
        once = gradient(context_id, x).copy()
        for _ in range(20):
            dist_autograd.backward(context_id, [loss], retain_graph=True)
        dist_autograd.backward(context_id, [loss])
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss])
        assert isinstance(caught.value.__cause__, GraphError)
        return once, gradient(context_id, x), rpc.rpc_sync("worker1", served.counters)


def test_backward_repeated_accumulates_and_keeps_nothing(trio: World) -> None:
    once, all_passes, left = on_first(trio, repeated)
    assert_array_equal(all_passes, 22 * once)
    assert left["autograd.passes"] == 0


def by_rpc_sync(x: Any) -> Any:
    return rpc.rpc_sync("worker1", served.through, args=(x, [2]))


def by_rpc_async(x: Any) -> Any:
    return rpc.rpc_async("worker1", served.through, args=(x, [2]))


def by_remote(x: Any) -> Any:
    return rpc.remote("worker1", served.through, args=(x, [2])).to_here()


def by_future(x: Any) -> Any:
    return rpc.rpc_sync("worker1", served.through_future, args=(x,))


def by_coroutine(x: Any) -> Any:
    return rpc.rpc_sync("worker1", served.through_coroutine, args=(x,))


def under_no_grad(rank: int, call: Any) -> Any:
    x = leaf(2.0)
    with dist_autograd.context() as context_id:
        with dg.no_grad():
            constant = call(x)
        if isinstance(constant, rpc.Future):  # the mode is that of the call, not of the wait
            constant = constant.wait()
        recorded = [rpc.rpc_sync(to, served.counters) for to in range(3)]
        loss = (rpc.rpc_sync("worker1", served.scale, args=(x,)) * constant).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        nodes = sum(found["autograd.sends"] + found["autograd.recvs"] for found in recorded)
        return nodes, constant.requires_grad, gradient(context_id, x)


@pytest.mark.parametrize("call", [by_rpc_sync, by_rpc_async, by_remote, by_future, by_coroutine])
def test_backward_calls_under_no_grad_record_nothing_anywhere(trio: World, call: Any) -> None:
    nodes, requires_grad, found = on_first(trio, partial(under_no_grad, call=call))
    assert (nodes, requires_grad) == (0, False)
    assert_array_equal(found, [12.0])


def fetched_under_no_grad(rank: int) -> Any:
    """A value that has a history at its owner comes without."""
    x = leaf(2.0)
    with dist_autograd.context() as context_id:
        made = rpc.remote("worker1", served.weigh, args=(x,))
        recorded = made.to_here()
        with dg.no_grad():
            fetched = [made.to_here(), made.rpc_async().clone().wait()]
        loss = (recorded * sum(fetched)).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        part = dist_autograd.retrieve_context(context_id)
        gradients = dist_autograd.get_gradients(context_id)
        return len(part.recv_functions), len(gradients), gradient(context_id, x)


def test_backward_values_fetched_under_no_grad_have_no_history(trio: World) -> None:
    recvs, num_gradients, found = on_first(trio, fetched_under_no_grad)
    assert recvs == 1
    assert_array_equal(found, [2 * 2.0 * (2.0**2 + 3.0**2)])
    assert num_gradients == 1


def recording_again(rank: int) -> Any:
    """The callee may switch recording on for itself; its answer is not recorded."""
    x = leaf(2.0)
    with dist_autograd.context() as context_id:
        with dg.no_grad():
            y = rpc.rpc_sync("worker1", served.gradient_inside, args=(x,))
        part = dist_autograd.retrieve_context(context_id)
        return y.numpy(), len(part.send_functions) + len(part.recv_functions)


def test_backward_callee_under_no_grad_may_record_for_itself(trio: World) -> None:
    found, nodes = on_first(trio, recording_again)
    assert_array_equal(found, [4.0])
    assert nodes == 0


def slots(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        _, second = rpc.rpc_sync("worker1", served.pair_of, args=(x,))
        both = rpc.rpc_sync("worker1", served.multiply, args=(x, x))
        part = dist_autograd.retrieve_context(context_id)
        widths = [node.num_inputs for node in part.send_functions.values()]
        dist_autograd.backward(context_id, [second.sum(), both.sum()])
        return widths, gradient(context_id, x)


def test_backward_one_tensor_twice_is_one_slot_and_unused_outputs_are_none(trio: World) -> None:
    widths, found = on_first(trio, slots)
    assert widths == [1, 1]
    assert_array_equal(found, [7.0])


def own_worker(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker0", served.through, args=(x, [0, 1])).sum()
        rpc.rpc_sync("worker0", served.scale, args=(x,))
        dist_autograd.backward(context_id, [loss], timeout=20)
        return gradient(context_id, x)


def test_backward_calls_to_oneself(trio: World) -> None:
    assert_array_equal(on_first(trio, own_worker), [3.0])


def explicit_gradients(rank: int) -> Any:
    x = leaf(1.0, 2.0)
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync("worker1", served.weigh, args=(x,))
        with pytest.raises(GraphError, match="one element"):
            dist_autograd.backward(context_id, [y])
        dist_autograd.backward(
            context_id, [y, y.sum()], grads=[[10.0, 100.0], None], accumulate_into="grad"
        )
        assert dist_autograd.get_gradients(context_id) == {}
    return x.grad.numpy(), rpc.rpc_sync("worker1", served.stored_gradient_of_weight)


def test_backward_explicit_gradients_into_grad_everywhere(trio: World) -> None:
    here, there = on_first(trio, explicit_gradients)
    assert_array_equal(here, [22.0, 303.0])
    assert_array_equal(there, [11.0, 202.0])


def references(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        rref = rpc.remote("worker1", served.scale, args=(x,))
        loss = rpc.rpc_sync("worker2", fetch_and_add, args=(rref, x)).sum()
        dist_autograd.backward(context_id, [loss], timeout=20)
        return gradient(context_id, x)


@rpc.expose
def fetch_and_add(rref: Any, x: Any) -> Any:
    return rref.to_here() + x


def test_backward_through_remote_references(trio: World) -> None:
    assert_array_equal(on_first(trio, references), [4.0])


def started_elsewhere(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        rpc.rpc_sync("worker1", lose_there, args=(int(context_id), x))
        rref = rpc.remote("worker2", served.scale, args=(x,))
        rref.backward(int(context_id))
        return gradient(context_id, x)


@rpc.expose
def lose_there(context_id: int, x: Any) -> None:
    dist_autograd.backward(context_id, [(x * 7.0).sum()])


def test_backward_started_by_others_than_the_creator(trio: World) -> None:
    assert_array_equal(on_first(trio, started_elsewhere), [10.0])


def at_once(rank: int) -> Any:
    x = leaf(1.0)
    totals = []

    def train(context: Any, factor: float) -> None:
        worker_activity.set(mine)
        with context.use():
            loss = rpc.rpc_sync("worker1", served.through, args=(x * factor, [2, 1])).sum()
            dist_autograd.backward(context, [loss], timeout=30)

    from distgrad.rpc.activity import activity as worker_activity

    mine = worker_activity.get()
    with dist_autograd.context() as first, dist_autograd.context() as second:
        contexts = [first, second] * 4
        workers = [
            threading.Thread(target=train, args=(context, 10.0**number))
            for number, context in enumerate(contexts)
        ]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join(40)
        totals = [gradient(context, x) for context in (first, second)]
    return totals


def test_backward_many_threads_two_contexts_all_exact(trio: World) -> None:
    """Each pass adds its own digit; what is lost or twice there shows."""
    first, second = on_first(trio, at_once)
    assert_array_equal(first, [3 * 1010101.0])
    assert_array_equal(second, [3 * 10101010.0])


def hooked(rank: int) -> Any:
    x = leaf(1.0)
    seen = []
    x.register_hook(lambda g: seen.append("leaf") or g * 2.0)
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync("worker1", served.scale, args=(x,))
        y.register_hook(lambda g: seen.append("received") or g + 1.0)
        (send,) = dist_autograd.retrieve_context(context_id).send_functions.values()
        name = send.name()  # a hook that refers to its own node would keep it alive
        send.register_hook(lambda inputs, outputs: seen.append(name))
        dist_autograd.backward(context_id, [y.sum()])
        return seen, gradient(context_id, x)


def test_backward_runs_hooks_in_order(trio: World) -> None:
    seen, found = on_first(trio, hooked)
    assert seen == ["received", "SendRpcBackward", "leaf"]
    assert_array_equal(found, [12.0])


def stray(y: dg.Tensor) -> str:
    """Return the error of a pass of a new context that leads to a tensor of another one."""
    with dist_autograd.context() as context_id, pytest.raises(BackwardError) as caught:
        dist_autograd.backward(context_id, [y.sum()])
    assert isinstance(caught.value.__cause__, ContextError)
    assert f"context {context_id:d} on worker 'worker0'" in str(caught.value)
    return str(caught.value)


def outside(rank: int) -> tuple[int, str, str]:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync("worker1", served.scale, args=(x,))
        while_open = stray(y)
    return int(context_id), while_open, stray(y)


def test_backward_of_tensor_received_in_another_context_names_it(trio: World) -> None:
    context_id, while_open, afterwards = on_first(trio, outside)
    sent = f"a tensor that worker 'worker1' sent in context {context_id}, which "
    assert sent + "is another one" in while_open
    assert re.search(sent + "was finished .* ago", afterwards)


@pytest.mark.parametrize(
    ("roots", "error"),
    [([], ValueError), (None, TypeError), ([1.0], TypeError), (np.ones(1), TypeError)],
)
def test_backward_wrong_roots_raise(threads: World, roots: Any, error: type[Exception]) -> None:
    def wrong(rank: int) -> None:
        with dist_autograd.context() as context_id, pytest.raises(error):
            dist_autograd.backward(context_id, roots)

    threads.run(wrong, ranks=[0])


def test_backward_create_graph_is_refused_clearly(threads: World) -> None:
    def program(rank: int) -> None:
        x = leaf(1.0)
        with dist_autograd.context() as context_id:
            with pytest.raises(NotImplementedError, match=r"Tensor\.backward"):
                dist_autograd.backward(context_id, [x.sum()], create_graph=True)
            with pytest.raises(ValueError, match="'context' or 'grad'"):
                dist_autograd.backward(context_id, [x.sum()], accumulate_into="leaf")

    threads.run(program, ranks=[0])


def test_backward_of_this_worker_alone_refuses_what_came_from_another(threads: World) -> None:
    def act(rank: int) -> None:
        if rank:
            return
        x = dg.tensor(np.ones(3), requires_grad=True)
        with dist_autograd.context():
            loss = rpc.rpc_sync(1, np.multiply, (x, 2.0)).sum()
            with pytest.raises(GraphError, match="leads to another worker"):
                loss.backward()
        with pytest.raises(ContextError, match=r"was finished .* ago") as caught:
            loss.backward()
        assert "a tensor that worker 1 sent in that context" in caught.value.__notes__[0]
        assert x.grad is None

    threads.run(act)


@rpc.expose
def slope_at_callee(x: Any) -> Any:
    """Return what local passes find at a worker in the middle of a chain of calls."""
    weight = leaf(5.0)
    hidden = x * weight
    further = rpc.rpc_sync("worker2", served.scale, args=(hidden,))
    found = dg.grad((hidden * hidden * x.sum()).sum(), [hidden, x, weight], retain_graph=True)
    with pytest.raises(GraphError, match="leads to another worker"):
        dg.grad((further * hidden).sum(), [hidden])
    return [gradient.item() for gradient in found]


def local_passes(rank: int) -> Any:
    x, other = leaf(2.0), leaf(7.0)
    with dist_autograd.context():
        before = rpc.rpc_sync("worker1", served.scale, args=(leaf(1.0),))
        y = rpc.rpc_sync("worker1", served.scale, args=(x,))
        programs = [
            lambda: dg.grad(y.sum(), [x]),
            lambda: dg.grad((y * x).sum(), [x]),
            lambda: dg.grad(y.sum(), [x], allow_unused=True),
            lambda: dg.grad((y * other).sum(), [other, x], allow_unused=True),
            lambda: y.sum().backward(inputs=[x]),
            lambda: dg.functional.value_and_grad(called_on_first)(x),
            lambda: dg.functional.jacobian(called_on_first)(x),
        ]
        hints = []
        for program in programs:
            with pytest.raises(
                GraphError, match=r"find the gradients .* leads to another"
            ) as caught:
                program()
            hints.append("get_gradients(context_id)" in caught.value.hint)
        assert x.grad is None
        partial_ones = [
            dg.grad((y * other).sum(), [other], retain_graph=True)[0].item(),
            dg.grad((before * x).sum(), [x])[0].item(),
            dg.grad((y * y).sum(), [y], retain_graph=True)[0].item(),
        ]
        return hints, partial_ones, rpc.rpc_sync("worker1", slope_at_callee, args=(x,))


def called_on_first(x: Any) -> Any:
    return rpc.rpc_sync("worker1", served.scale, args=(x,)).sum()


def test_backward_of_this_worker_alone_finds_no_gradient_that_other_workers_are_part_of(
    trio: World,
) -> None:
    hints, partial_ones, at_callee = on_first(trio, local_passes)
    assert hints == [True] * 7
    assert partial_ones == [6.0, 3.0, 12.0]
    assert at_callee == [40.0, 300.0, 80.0]


REPEATED = {
    "all": lambda y: y.sum(),
    "rows": lambda y: (y.sum(axis=0) * np.arange(1000.0)).sum(),
    "mean": lambda y: (y * 3.0).mean(),
    "fortran": lambda y: (y.T.sum(axis=1) * np.arange(1000.0)).sum(),
    "added": lambda y: y.sum() + (y.sum(axis=1) * np.arange(500.0)).sum(),
}


def repeated_gradients(rank: int) -> Any:
    x = dg.tensor(np.arange(500_000.0).reshape(500, 1000), requires_grad=True)
    found = {}
    for name, reduced in REPEATED.items():
        with dist_autograd.context() as context_id:
            y = rpc.rpc_sync("worker1", served.scale, args=(x,))
            z = rpc.rpc_sync("worker1", served.through, args=(y, [2]))
            before = rpc.debug_info()["rpc.bytes_sent"]
            dist_autograd.backward(context_id, [reduced(z)], timeout=20)
            sent = rpc.debug_info()["rpc.bytes_sent"] - before
            found[name] = sent, gradient(context_id, x)
    x.grad = None
    for name, reduced in REPEATED.items():
        y = x * 3.0
        z = y + y * 1.0
        reduced(z).backward()
        assert_array_equal(found[name][1], np.asarray(x.grad), err_msg=name)
        x.grad = None
    return {name: sent for name, (sent, _) in found.items()}


def test_backward_gradient_that_repeats_is_sent_once(trio: World) -> None:
    for name, sent in on_first(trio, repeated_gradients).items():
        assert sent < 4_000_000 / 10, name


def independent_gradients(rank: int) -> Any:
    x, y, z = (dg.tensor(np.ones(shape), requires_grad=True) for shape in ((2, 3), (3, 2), (6,)))
    given = np.arange(6.0)
    with dist_autograd.context() as context_id:
        root = x.reshape(-1) + y.T.reshape(-1) + z.reshape(2, 3).reshape(-1)
        dist_autograd.backward(context_id, [root], grads=[given])
        for changed in (x, y, z):
            others = [t for t in (x, y, z) if t is not changed]
            before = [gradient(context_id, t).copy() for t in others]
            gradient(context_id, changed)[...] = -1.0
            for tensor, old in zip(others, before, strict=True):
                assert_array_equal(gradient(context_id, tensor), old)
        return given


def test_gradients_of_leaves_share_no_memory(trio: World) -> None:
    assert_array_equal(on_first(trio, independent_gradients), np.arange(6.0))


def odd_timeouts(rank: int) -> Any:
    x = leaf(1.0)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.scale, args=(x, 5.0)).sum()
        for timeout, kind in ((-1, ValueError), (float("nan"), ValueError), ("3", TypeError)):
            with pytest.raises(kind, match="timeout="):
                dist_autograd.backward(context_id, [loss], timeout=timeout)
        dist_autograd.backward(context_id, [loss], timeout=0)  # none, as for calls
        return gradient(context_id, x)


def test_backward_refuses_timeouts_that_are_no_time(trio: World) -> None:
    assert_array_equal(on_first(trio, odd_timeouts), [5.0])
