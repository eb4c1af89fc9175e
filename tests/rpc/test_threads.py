"""Threads of a worker: depth, starvation, blocked waiters, few processors."""

import gc
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from distgrad import rpc
from distgrad.rpc.future import Future
from distgrad.testing import World

CALLS = int(os.environ.get("DISTGRAD_TEST_CALLS", "20000"))


@rpc.expose
def echo(value):
    return value


@rpc.expose
def bounce(depth):
    """Call back and forth between workers 0 and 1; return how deep it went."""
    if depth == 0:
        return 0
    return 1 + rpc.rpc_sync(1 - rpc.get_worker_info().id, bounce, (depth - 1,))


@rpc.expose
def block_and_call_back(caller, depth, pause):
    time.sleep(pause)
    if depth == 0:
        return 0
    own = rpc.get_worker_info().id
    return 1 + rpc.rpc_sync(caller, block_and_call_back, (own, depth - 1, pause))


def call_very_deep(rank):
    return rpc.rpc_sync(1 - rank, bounce, (1000,))


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_calls_nested_a_thousand_deep_never_starve(transport):
    with World(2, transport=transport) as world:
        assert world.run(call_very_deep) == [1000, 1000]


@rpc.expose
def fan_out(depth):
    """Call the other worker three times at once, each of which does the same."""
    if depth == 0:
        return 1
    other = 1 - rpc.get_worker_info().id
    return sum(rpc.wait_all([rpc.rpc_async(other, fan_out, (depth - 1,)) for _ in range(3)]))


def call_with_one_thread(rank):
    deep = rpc.rpc_sync(1 - rank, bounce, (200,), timeout=30)
    return deep, rpc.rpc_sync(1 - rank, fan_out, (4,), timeout=30)


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_calls_nested_deeper_than_there_are_threads_do_not_starve(transport):
    with World(2, transport=transport, num_worker_threads=1) as world:
        assert world.run(call_with_one_thread) == [(200, 81)] * 2


def call_blocking_both_ways(rank):
    futures = [rpc.rpc_async(1 - rank, block_and_call_back, (rank, 5, 0.002)) for _ in range(64)]
    return rpc.wait_all(futures, 50)


@pytest.mark.parametrize("transport", ["inproc", "unix", "tcp"])
def test_64_blocking_handlers_that_call_back_five_deep_do_not_deadlock(transport):
    with World(2, transport=transport) as world:
        assert world.run(call_blocking_both_ways) == [[5] * 64] * 2


def wait_elsewhere_for_callback(rank):
    called = threading.Event()
    rpc.rpc_async(1 - rank, echo, (1,)).add_done_callback(lambda _: called.set())
    return called.wait(20)  # not a wait of ours: nobody polls on behalf of this thread


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_callback_runs_while_the_only_user_thread_is_blocked(transport):
    with World(2, transport=transport) as world:
        assert world.run(wait_elsewhere_for_callback) == [True, True]


def wait_while_callback_blocks(rank):
    released, seen = threading.Event(), []
    future = rpc.rpc_async(1 - rank, echo, (7,))
    ended = threading.Event()

    def callback(future):
        seen.append(released.wait(20))
        ended.set()

    future.add_done_callback(callback)
    value = future.wait(20)  # must not wait for the callback, which waits for us
    released.set()
    return value, ended.wait(20), seen


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_wait_returns_though_a_callback_blocks(transport):
    with World(2, transport=transport) as world:
        assert world.run(wait_while_callback_blocks) == [(7, True, [True])] * 2


def use_little_time(rank):
    for _ in range(50):
        rpc.rpc_sync(1 - rank, echo, (1,))
    before = time.process_time()
    threading.Event().wait(1.0)
    return time.process_time() - before


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_idle_workers_burn_no_processor_time(transport):
    with World(2, transport=transport) as world:
        world.run(use_little_time)
        assert max(world.run(use_little_time)) < 0.2


@pytest.fixture
def one_cpu():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def call_everybody(rank):
    start = time.process_time()
    futures = [rpc.rpc_async(to, echo, (rank,)) for to in range(6) for _ in range(100)]
    assert rpc.wait_all(futures, 50) == [rank] * 600
    values = [rpc.rpc_sync(to, echo, (i,)) for i in range(30) for to in range(6)]
    return len(values), time.process_time() - start


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_six_workers_on_one_processor_neither_burn_nor_starve(one_cpu, transport):
    with World(6, transport=transport) as world:
        start = time.monotonic()
        counts, spent = zip(*world.run(call_everybody), strict=True)
        assert counts == (180,) * 6
        assert time.monotonic() - start < 30
        assert sum(spent) < 15


@rpc.expose
def process():
    return os.getpid()


def send_to_stopped_worker(rank):
    """Send to a worker that does not read; it goes on in a second."""
    pid = rpc.rpc_sync(1, process)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(1.0, os.kill, (pid, signal.SIGCONT))
    timer.start()
    start = time.monotonic()
    small = [rpc.rpc_async(1, echo, (i,)) for i in range(3000)]
    took = time.monotonic() - start
    array = np.zeros(4_000_000)
    large = rpc.rpc_async(1, echo, (array,))
    array[:] = 1  # must not reach the other side
    values = rpc.wait_all(small, 30)
    return took, values == list(range(3000)), not large.wait(30).any()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_worker_that_does_not_read_holds_up_no_small_call_and_gets_what_was_sent(transport):
    with World(2, transport=transport) as world:
        ((took, all_small, unchanged),) = world.run(send_to_stopped_worker, ranks=[0])
    assert took < 0.9
    assert all_small
    assert unchanged


def footprint():
    """Bytes of private memory, blocks of Python's allocator, descriptors.

    Not all resident memory: pages of rings and of code are touched late, once each.
    """
    gc.collect()
    with open("/proc/self/status") as file:
        (private,) = [line.split()[1] for line in file if line.startswith("RssAnon:")]
    return int(private) * 1024, sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))


def call_very_often(rank, count):
    x = np.ones(1, np.float32)
    for start in range(0, count, 1000):
        if rank == 0:
            for _ in range(800):
                rpc.rpc_sync(1, echo, (x,))
            rpc.wait_all([rpc.rpc_async(1, echo, (start,)) for _ in range(200)])
    return footprint()


@pytest.mark.deadline(max(60, CALLS // 300))
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_many_calls_keep_memory_and_descriptors_flat(transport):
    with World(2, transport=transport, timeout=max(60, CALLS // 1000)) as world:
        rounds = [world.run(call_very_often, count) for count in (3000, CALLS)]
    for before, after in zip(*rounds, strict=True):
        memory, blocks, descriptors = (b - a for a, b in zip(before, after, strict=True))
        assert memory < 2_000_000
        assert blocks < max(1000, CALLS // 20)  # no call in twenty leaves an object
        assert descriptors < 5  # heartbeats open some for a moment


class NoThread(threading.Thread):
    def start(self):
        raise RuntimeError("can't start new thread")


def ask_much(rank):
    calls = [rpc.rpc_async(1 - rank, echo, (i,)) for i in range(50)]
    return sum(rpc.wait_all(calls, 20)) + rpc.rpc_sync(1 - rank, bounce, (5,))


def test_worker_that_gets_no_more_threads_serves_with_those_it_has(monkeypatch):
    with World(2) as world:
        with monkeypatch.context() as limited:
            here = SimpleNamespace(Thread=NoThread, current_thread=threading.current_thread)
            limited.setattr("distgrad.rpc.crew.threading", here)
            assert world.run(ask_much) == [sum(range(50)) + 5] * 2
        assert world.run(ask_much) == [sum(range(50)) + 5] * 2


def test_thread_that_runs_a_task_of_its_chain_is_given_no_other():
    # The first task may wait, on that thread's stack, for what the second one does.
    with World(1) as world:
        agent = world.run(lambda rank: rpc.current_worker())[0].agent
        chain = agent.new_id()
        awaited = Future(agent=agent, chain=chain)
        second = threading.Event()
        here = []

        def first():
            here.append(threading.current_thread() is threading.main_thread())
            agent.submit(second.set, chain)
            awaited.set_result(second.wait(20))

        def tick(now):
            if threading.current_thread() is not threading.main_thread():
                return now + 0.001
            agent.ticks.remove(tick)
            agent.submit(first, chain)  # to the thread that polls, because it waits
            return float("inf")

        agent.ticks.append(tick)
        agent.tick_by(time.monotonic())
        assert awaited.wait(30)
        assert here == [True]


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, KeyboardInterrupt])
def test_callback_that_raises_to_end_its_thread_is_logged_alone(caplog, kind):
    def callback(_):
        served.append(threading.current_thread())
        raise kind

    served = []
    with World(1) as world:
        agent = world.run(lambda rank: rpc.current_worker())[0].agent
        for _ in range(3):
            future = Future(agent=agent)
            future.add_done_callback(callback)
            future.set_result(None)
            assert rpc.rpc_sync(0, echo, (1,)) == 1
        while len(served) < 3 or not agent.crew.idle:
            rpc.rpc_sync(0, echo, (1,))
        assert all(thread.is_alive() for thread in served)
    assert caplog.text.count("a task of worker") == 3


def wait_in_forked_child(rank):
    pending = rpc.rpc_async(1 - rank, block_and_call_back, (rank, 0, 0.5))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            pending.wait()
        except Exception as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        message = said.read()
    os.waitpid(child, 0)
    return message, pending.wait()


def test_forked_child_does_not_wait_for_answers_to_its_parent():
    with World(2, transport="unix") as world:
        [[message, answer]] = world.run(wait_in_forked_child, ranks=[0])
    assert message.startswith("cannot wait for call")
    assert "forked" in message
    assert answer == 0
