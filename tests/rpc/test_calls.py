"""Calls between workers, over threads and over processes."""

import threading
import time

import numpy as np
import pytest

from distgrad import rpc
from distgrad.errors import (
    NotExposedError,
    RemoteError,
    RpcTimeoutError,
    SerializationError,
    UnknownWorkerError,
    WorkerLostError,
)
from distgrad.testing import World


@rpc.expose
def echo(value):
    return value


@rpc.expose
def add(a, b=1):
    return a + b


@rpc.expose
def fail(text):
    raise KeyError(text)


class Private(Exception):
    pass


@rpc.expose
def fail_privately():
    raise Private("only known here")


@rpc.expose
def bounce(depth):
    """Call back and forth between workers 0 and 1."""
    if depth == 0:
        return [rpc.get_worker_info().name]
    me = rpc.get_worker_info()
    return [me.name, *rpc.rpc_sync(1 - me.id, bounce, (depth - 1,))]


@rpc.expose
def time_left():
    return rpc.deadline() - time.monotonic()


@rpc.expose
def time_left_one_hop_further():
    return rpc.rpc_sync(0, time_left, timeout=50)


def hidden():
    return 1


gate = threading.Event()


@rpc.expose
def wait_for_gate():
    return gate.wait(20)


@rpc.expose
def open_gate():
    gate.set()


@pytest.fixture(params=["inproc", "unix", "tcp"])
def pair(request):
    gate.clear()
    with World(2, transport=request.param) as world:
        yield world


def call_echo(rank):
    x = np.arange(6.0).reshape(2, 3)
    got = rpc.rpc_sync(1 - rank, echo, (x,))
    got += 1  # the receiver owns it
    return got


def test_rpc_sync_array_arrives_as_own_copy(pair):
    for got in pair.run(call_echo):
        np.testing.assert_array_equal(got, np.arange(6.0).reshape(2, 3) + 1)


def call_with_kwargs(rank):
    return rpc.rpc_sync(f"worker{1 - rank}", add, (3,), {"b": 4})


def test_rpc_sync_keyword_arguments_are_passed(pair):
    assert pair.run(call_with_kwargs) == [7, 7]


def call_self(rank):
    x = [1, 2]
    got = rpc.rpc_sync(rank, echo, (x,))
    return got, got is not x


def test_rpc_sync_to_self_sends_a_copy(pair):
    assert pair.run(call_self) == [([1, 2], True)] * 2


def call_big(rank):
    x = np.arange(3_000_000, dtype=np.float64)
    return bool((rpc.rpc_sync(1 - rank, echo, (x,)) == x).all())


def test_rpc_sync_large_arrays_cross_at_once(pair):
    assert pair.run(call_big) == [True, True]


def call_failing(rank):
    with pytest.raises(KeyError, match="missing") as caught:
        rpc.rpc_sync(1 - rank, fail, ("missing",))
    return caught.value.workers, "in fail" in caught.value.remote_traceback


def test_rpc_sync_builtin_exception_keeps_class_worker_and_traceback(pair):
    assert pair.run(call_failing) == [(("worker1",), True), (("worker0",), True)]


def call_failing_privately(rank):
    with pytest.raises(RemoteError, match=r"Private on worker 'worker\d': only known here"):
        rpc.rpc_sync(1 - rank, fail_privately)
    return True


def test_rpc_sync_unknown_exception_class_is_remote_error(pair):
    assert pair.run(call_failing_privately) == [True, True]


def call_hidden(rank):
    with pytest.raises(NotExposedError) as caught:
        rpc.rpc_sync(1 - rank, hidden)
    return str(caught.value)


def test_rpc_sync_function_not_exposed_names_it_and_the_line_to_add(pair):
    for rank, text in enumerate(pair.run(call_hidden)):
        assert "hidden" in text
        assert f"'worker{1 - rank}'" in text
        assert "@distgrad.rpc.expose" in text


def call_nested(rank):
    return rpc.rpc_sync(1 - rank, bounce, (9,)) if rank == 0 else None


def test_rpc_sync_nested_calls_bounce_between_two_workers(pair):
    assert pair.run(call_nested)[0] == ["worker1", "worker0"] * 5


def call_deep(rank):
    return len(rpc.rpc_sync(1 - rank, bounce, (60,)))


def test_rpc_sync_nested_deeper_than_the_stack_limit_never_starves(pair):
    assert pair.run(call_deep) == [61, 61]


def call_slowly(rank):
    if rank == 1:
        return None
    start = time.monotonic()
    with pytest.raises(RpcTimeoutError, match="wait_for_gate"):
        rpc.rpc_sync(1, wait_for_gate, timeout=0.2)
    took = time.monotonic() - start
    rpc.rpc_sync(1, open_gate)
    return took


def test_rpc_sync_timeout_raises_in_time_and_the_worker_lives_on(pair):
    assert 0.15 < pair.run(call_slowly)[0] < 10


def call_inherited(rank):
    return rpc.rpc_sync(1, time_left_one_hop_further, timeout=2.0) if rank == 0 else None


def test_deadline_is_inherited_by_nested_calls(pair):
    assert 0 < pair.run(call_inherited)[0] <= 2.0


def call_unsendable(rank):
    with pytest.raises(SerializationError):
        rpc.rpc_sync(1 - rank, echo, ([threading.Lock()],))
    return rpc.rpc_sync(1 - rank, echo, (5,))


def test_rpc_sync_unsendable_argument_raises_before_anything_is_sent(pair):
    assert pair.run(call_unsendable) == [5, 5]


@rpc.expose
def give_lock():
    return threading.Lock()


def call_for_unsendable(rank):
    with pytest.raises(SerializationError):
        rpc.rpc_sync(1 - rank, give_lock)
    return True


def test_rpc_sync_unsendable_result_is_an_error_of_the_call(pair):
    assert pair.run(call_for_unsendable) == [True, True]


def call_unknown(rank):
    with pytest.raises(UnknownWorkerError, match="nobody"):
        rpc.rpc_sync("nobody", echo, (1,))
    with pytest.raises(UnknownWorkerError):
        rpc.rpc_sync(7, echo, (1,))
    with pytest.raises(TypeError):
        rpc.rpc_sync(1.5, echo, (1,))
    return True


def test_rpc_sync_unknown_worker_raises_at_the_call(pair):
    assert pair.run(call_unknown) == [True, True]


def call_many(rank):
    futures = [rpc.rpc_async(1 - rank, add, (i,)) for i in range(500)]
    return sum(rpc.wait_all(futures))


def test_rpc_async_many_in_flight_all_arrive(pair):
    assert pair.run(call_many) == [sum(range(1, 501))] * 2


def call_from_threads(rank):
    totals = []

    def body():
        totals.append(sum(rpc.rpc_sync(1 - rank, add, (i,)) for i in range(50)))

    threads = [threading.Thread(target=body) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return totals


def test_rpc_sync_from_many_threads_at_once(pair):
    assert pair.run(call_from_threads) == [[sum(range(1, 51))] * 8] * 2


@rpc.expose
def block_and_call_back(caller, depth):
    return (
        0
        if depth == 0
        else 1 + rpc.rpc_sync(caller, block_and_call_back, (rpc.get_worker_info().id, depth - 1))
    )


def call_blocking_handlers(rank):
    futures = [rpc.rpc_async(1 - rank, block_and_call_back, (rank, 5)) for _ in range(32)]
    return rpc.wait_all(futures)


def test_blocking_handlers_calling_back_both_ways_do_not_deadlock(pair):
    assert pair.run(call_blocking_handlers) == [[5] * 32] * 2


@rpc.expose
@rpc.functions.async_execution
def later(value):
    future = rpc.Future()
    threading.Timer(0.01, lambda: future.set_result(value)).start()
    return future


@rpc.expose
async def coroutine(value):
    return value * 2


@rpc.expose
def future_by_mistake():
    return rpc.Future()


def call_async_functions(rank):
    values = (rpc.rpc_sync(1 - rank, later, (4,)), rpc.rpc_sync(1 - rank, coroutine, (4,)))
    with pytest.raises(SerializationError, match="async_execution"):
        rpc.rpc_sync(1 - rank, future_by_mistake)
    return values


def test_functions_that_answer_later_answer(pair):
    assert pair.run(call_async_functions) == [(4, 8), (4, 8)]


def call_ufunc(rank):
    return rpc.rpc_sync(1 - rank, np.add, (np.ones(3), 2.0)).tolist()


def test_numpy_ufuncs_may_be_called(pair):
    assert pair.run(call_ufunc) == [[3.0] * 3] * 2


def call_doomed(rank):
    if rank == 1:
        return rpc.rpc_sync(0, echo, (1,))
    return rpc.rpc_sync(1, echo, (1,))


@rpc.expose
def block_for_ever():
    threading.Event().wait(30)


def call_then_be_left(rank):
    start = time.monotonic()
    with pytest.raises(WorkerLostError, match="worker1"):
        rpc.rpc_sync(1, block_for_ever, timeout=25)
    with pytest.raises(WorkerLostError, match="worker1"):
        rpc.rpc_sync(1, echo, (1,))
    return time.monotonic() - start


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_killed_worker_fails_its_calls_at_once(transport):
    with World(2, transport=transport) as world:
        world.run(call_doomed)
        timer = threading.Timer(0.3, world.kill, (1,))
        timer.start()
        assert world.run(call_then_be_left, ranks=[0])[0] < 10
        timer.join()


def test_world_reports_the_first_failure_with_worker_and_traceback():
    with (
        pytest.raises(ZeroDivisionError) as caught,
        World(2) as world,
    ):
        world.run(lambda rank: 1 // rank)
    assert "worker0" in "".join(caught.value.__notes__)


def test_limits_of_config_reach_the_codec(monkeypatch):
    monkeypatch.setattr("distgrad.config.config.max_items", 10)
    with World(2) as world:

        def send_too_many(rank):
            with pytest.raises(SerializationError, match="10"):
                rpc.rpc_sync(1 - rank, echo, (list(range(100)),))

        world.run(send_too_many)
    monkeypatch.undo()
    with World(1) as world:
        assert len(world.run(lambda rank: rpc.rpc_sync(0, echo, (list(range(100)),)))[0]) == 100
