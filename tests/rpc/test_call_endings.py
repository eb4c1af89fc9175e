"""How calls end other than by a value: errors across workers, deadlines, cancellation."""

import asyncio
import threading
import time

import pytest

from distgrad import rpc
from distgrad.errors import RemoteError, RpcTimeoutError
from distgrad.testing import World

gate = threading.Event()
runs = []


@rpc.expose
def fail(text):
    raise KeyError(text)


class Private(Exception):
    pass


@rpc.expose
def fail_privately():
    raise Private("deep down")


@rpc.expose
def relay(route, function):
    """Pass a call on along a route of worker ids; the last one runs the function."""
    if len(route) == 1:
        return rpc.rpc_sync(route[0], FUNCTIONS[function][0], FUNCTIONS[function][1])
    return rpc.rpc_sync(route[0], relay, (route[1:], function))


FUNCTIONS = {"fail": (fail, ("lost",)), "fail_privately": (fail_privately, ())}


@rpc.expose
def time_left():
    return rpc.deadline() - time.monotonic()


@rpc.expose
def time_left_along(route):
    return rpc.rpc_sync(route[0], time_left_along, (route[1:],)) if route else time_left()


@pytest.fixture(params=["inproc", "unix"])
def three(request):
    with World(3, transport=request.param) as world:
        yield world


def fail_along_a_chain(rank):
    with pytest.raises(KeyError, match="lost") as caught:
        rpc.rpc_sync(1, relay, ((2,), "fail"))
    error = caught.value
    text = error.remote_traceback
    return error.workers, "in fail" in text, "in relay" in text, str(error.args)


def test_exception_across_three_workers_tells_the_whole_way(three):
    ((workers, origin, between, args),) = three.run(fail_along_a_chain, ranks=[0])
    assert workers == ("worker2", "worker1")
    assert origin
    assert between
    assert args == "('lost',)"


def fail_privately_along_a_chain(rank):
    with pytest.raises(RemoteError, match="Private on worker 'worker2': deep down") as caught:
        rpc.rpc_sync(1, relay, ((2, 1, 2), "fail_privately"))
    return caught.value.workers, "in fail_privately" in caught.value.remote_traceback


def test_unknown_exception_across_workers_names_its_origin(three):
    ((workers, origin),) = three.run(fail_privately_along_a_chain, ranks=[0])
    assert workers == ("worker2", "worker1", "worker2", "worker1")
    assert origin


def inherit_along_a_route(rank):
    return rpc.rpc_sync(1, time_left_along, ((2, 0, 1),), timeout=3.0)


def test_deadline_is_inherited_over_many_hops(three):
    assert 0 < three.run(inherit_along_a_route, ranks=[0])[0] < 3.0


@rpc.expose
def wait_for_gate():
    return gate.wait(20)


@rpc.expose
def open_gate_in(seconds):
    threading.Timer(seconds, gate.set).start()


@rpc.expose
def mark(value):
    runs.append(value)


@rpc.expose
def marks():
    return list(runs)


def give_up_before_it_starts(rank):
    blocked = [rpc.rpc_async(1, wait_for_gate) for _ in range(2)]  # all threads of the callee
    late = rpc.rpc_async(1, mark, ("late",), timeout=0.05)
    with pytest.raises(RpcTimeoutError):
        late.wait(10)
    cancelled = rpc.rpc_async(1, mark, ("cancelled",))
    assert cancelled.cancel()
    assert not cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        cancelled.wait()
    rpc.wait_all(blocked, 20)
    return rpc.rpc_sync(1, marks)


def block_threads_for(rank, seconds):
    gate.clear()
    runs.clear()
    open_gate_in(seconds)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_call_given_up_before_it_starts_never_runs(transport):
    with World(2, transport=transport, num_worker_threads=2) as world:
        world.run(block_threads_for, 1.0)
        assert world.run(give_up_before_it_starts, ranks=[0]) == [[]]


@rpc.expose
class Later:
    """Functions of a class that answer later."""

    @staticmethod
    @rpc.functions.async_execution
    def static(value):
        return rpc.rpc_async(rpc.get_worker_info().id, add, (value, 1)).then(lambda f: f.wait())

    @classmethod
    @rpc.functions.async_execution
    def of_class(cls, value):
        future = rpc.Future()
        threading.Timer(0.01, future.set_result, ([cls.__name__, value],)).start()
        return future

    @staticmethod
    @rpc.functions.async_execution
    def failing(value):
        future = rpc.Future()
        future.set_exception(KeyError(value))
        return future

    @staticmethod
    @rpc.functions.async_execution
    def no_future(value):
        return value


@rpc.expose
def add(a, b):
    return a + b


def call_methods_that_answer_later(rank):
    peer = 1 - rank
    with pytest.raises(KeyError, match="broken") as caught:
        rpc.rpc_sync(peer, Later.failing, ("broken",))
    with pytest.raises(TypeError, match="returns a Future, not int"):
        rpc.rpc_sync(peer, Later.no_future, (1,))
    return (
        rpc.rpc_sync(peer, Later.static, (4,)),
        rpc.rpc_sync(peer, Later.of_class, (5,)),
        caught.value.workers == (f"worker{peer}",),
    )


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_methods_decorated_with_async_execution_answer_later(transport):
    with World(2, transport=transport) as world:
        assert world.run(call_methods_that_answer_later) == [(5, ["Later", 5], True)] * 2


@rpc.expose
async def add_remotely(worker, value):
    first = await rpc.rpc_async(worker, add, (value, 1))
    await asyncio.sleep(0.001)
    return await rpc.rpc_async(worker, add, (first, rpc.deadline() is not None))


@rpc.expose
async def fail_in_coroutine():
    await asyncio.sleep(0)
    raise KeyError("coroutine")


def call_coroutines(rank):
    with pytest.raises(KeyError, match="coroutine") as caught:
        rpc.rpc_sync(1 - rank, fail_in_coroutine)
    futures = [rpc.rpc_async(1 - rank, add_remotely, (rank, i)) for i in range(50)]
    return rpc.wait_all(futures, 20), "in fail_in_coroutine" in caught.value.remote_traceback


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_coroutine_handlers_run_together_and_may_call_further(transport):
    with World(2, transport=transport) as world:
        assert world.run(call_coroutines) == [([i + 2 for i in range(50)], True)] * 2


def await_futures(rank):
    async def one(value):
        return await rpc.rpc_async(1 - rank, add, (value, 1))

    async def main():
        with pytest.raises(KeyError):
            await rpc.rpc_async(1 - rank, fail, ("awaited",))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(one_blocked(), 0.1)
        return await asyncio.gather(*(one(i) for i in range(100)))

    async def one_blocked():
        await rpc.Future()

    return asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_futures_of_calls_are_awaited_from_asyncio(transport):
    with World(2, transport=transport) as world:
        assert world.run(await_futures) == [list(range(1, 101))] * 2


def leave_a_failure_unseen(peer):
    future = rpc.rpc_async(peer, fail, ("unseen",))
    settled = threading.Event()
    future.add_done_callback(lambda _: settled.set(), inline=True)
    assert settled.wait(20)
    del future
    rpc.rpc_sync(peer, add, (1, 1))  # whoever took the answer in has let go of it


def watch_for_a_warning(rank):
    with pytest.warns(RuntimeWarning, match="never looked at: KeyError"):
        leave_a_failure_unseen(1 - rank)
    return True


def test_failure_that_nobody_looks_at_warns_when_it_is_freed():
    with World(2, transport="unix") as world:
        assert world.run(watch_for_a_warning, ranks=[0]) == [True]


@rpc.expose
def deadline_here():
    return rpc.deadline()


def long_timeouts(rank):
    if rank == 0:
        left = rpc.rpc_sync(1, deadline_here, timeout=4000.0) - time.monotonic()
        assert 3900.0 < left <= 4000.0
        for longer in (7200.0, float("inf")):
            assert rpc.rpc_sync(1, deadline_here, timeout=longer) is None


def test_deadline_too_far_away_to_be_told_is_not_told_as_a_nearer_one():
    with World(2) as world:
        world.run(long_timeouts)


class Grave(BaseException):
    """Not an Exception, and known to one side only as a name."""


GRAVE = {kind.__name__: kind for kind in (KeyboardInterrupt, SystemExit, GeneratorExit, Grave)}


@rpc.expose
def raise_grave(kind):
    raise GRAVE[kind]("at the callee")


@rpc.expose
@rpc.functions.async_execution
def raise_grave_later(kind):
    me = rpc.get_worker_info()
    return rpc.rpc_async(me, answer_from_a_coroutine).then(lambda _: raise_grave(kind))


@rpc.expose
async def raise_grave_in_a_coroutine(kind):
    raise_grave(kind)


@rpc.expose
async def answer_from_a_coroutine():
    return "still here"


@rpc.expose
class Thrower:
    def raise_grave(self, kind):
        raise_grave(kind)


@rpc.expose
def make_thrower_when_told():
    assert gate.wait(30)
    return Thrower()


def ask_for_grave(to, kind):
    """Yield what raises an exception of a kind on a worker, in all ways."""
    for function in (raise_grave, raise_grave_later, raise_grave_in_a_coroutine):
        yield lambda: rpc.rpc_sync(to, function, (kind,), timeout=20)  # noqa: B023
    yield rpc.remote(to, raise_grave, (kind,)).to_here
    gate.clear()
    thrower = rpc.remote(to, make_thrower_when_told)
    waiting = thrower.rpc_async().raise_grave(kind)
    gate.set()
    yield waiting.wait
    yield lambda: thrower.rpc_sync().raise_grave(kind)


def provoke(rank, kind):
    told = []
    for to in (1, 0):  # to oneself as well
        for ask in ask_for_grave(to, kind):
            with pytest.raises(RemoteError) as caught:
                ask()
            told.append(str(caught.value))
        assert rpc.rpc_sync(to, answer_from_a_coroutine, timeout=20) == "still here"
    return told


@pytest.mark.parametrize("kind", GRAVE)
def test_exception_that_would_end_a_thread_fails_the_call_alone(kind, monkeypatch):
    ended = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    with World(2) as world:
        (told,) = world.run(provoke, kind, ranks=[0])
    assert ended == []
    assert len(told) == 12
    assert all(f".{kind} on worker" in text for text in told)


@rpc.expose
def ask_back(kind):
    return rpc.rpc_sync(0, raise_grave, (kind,))


def provoke_on_the_thread_that_waits(rank, kind):
    """A call of the same chain runs on the stack of the main thread, which waits here."""
    try:
        rpc.rpc_sync(1, ask_back, (kind,), timeout=20)
    except RemoteError as error:
        return " <- ".join(error.workers)
    except BaseException as error:
        return type(error).__name__


@pytest.mark.parametrize("kind", GRAVE)
def test_exception_that_would_end_the_program_does_not_unless_it_is_an_interrupt(kind):
    with World(2, transport="unix") as world:
        (outcome,) = world.run(provoke_on_the_thread_that_waits, kind, ranks=[0])
    expected = "KeyboardInterrupt" if kind == "KeyboardInterrupt" else "worker0 <- worker1"
    assert outcome == expected
