"""More threads that wait than there are processors: each rouses the next."""

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from distgrad import rpc
from distgrad.errors import RpcTimeoutError
from distgrad.testing import World

THREADS = 4 * len(os.sched_getaffinity(0)) + 4
BRISK = 30  # calls in a row after which threads surely take turns


@rpc.expose
def echo(value):
    return value


def call_briskly(thread):
    for i in range(BRISK):
        assert rpc.rpc_sync(1, echo, ((thread, i),)) == (thread, i)


def meet_between_calls(rank):
    """Let every thread that was roused wait for all others, and not by means of ours."""
    barrier = threading.Barrier(THREADS)

    def work(thread):
        for _ in range(10):
            call_briskly(thread)
            barrier.wait(20)
        return thread

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


@pytest.mark.parametrize("transport", ["inproc", "unix", "tcp"])
def test_thread_that_has_its_turn_may_wait_for_the_others(transport):
    with World(2, transport=transport) as world:
        assert world.run(meet_between_calls, ranks=[0]) == [sum(range(THREADS))]


_released = threading.Event()
_occupied = threading.Semaphore(0)


@rpc.expose
def occupy():
    """Take a serving thread for as long as the test goes."""
    _occupied.release()
    return _released.wait(50)


@rpc.expose
def send_occupants(to, count):
    # Not waited for here: a thread that waits would serve what comes back.
    for _ in range(count):
        rpc.rpc_async(to, occupy, timeout=0).add_done_callback(lambda future: future.exception())


def meet_without_watcher(rank):
    _released.clear()
    rpc.rpc_sync(1, send_occupants, (0, 3))
    assert _occupied.acquire(timeout=20)
    try:
        return meet_between_calls(rank)
    finally:
        _released.set()


def test_nobody_is_left_ready_where_nobody_watches():
    with World(2, transport="unix", num_worker_threads=1) as world:
        assert world.run(meet_without_watcher, ranks=[0]) == [sum(range(THREADS))]


class Alarm(Exception):
    pass


def wait_interrupted(rank):
    """Wait in many threads, this one interrupted again and again."""

    def interrupt(number, frame):
        raise Alarm

    alarms = 0
    with ThreadPoolExecutor(THREADS) as pool:
        others = [pool.submit(call_briskly, thread) for thread in range(THREADS) for _ in range(10)]
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for i in range(200):
                future = rpc.rpc_async(1, echo, (i,))
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-4))
                    future.wait(20)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Alarm:
                    alarms += 1
                assert future.wait(20) == i
        finally:
            signal.signal(signal.SIGALRM, before)
        for other in others:
            other.result(50)
    return alarms


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_interrupted_thread_leaves_its_turn_to_the_others(transport):
    with World(2, transport=transport) as world:
        (alarms,) = world.run(wait_interrupted, ranks=[0])
        assert alarms > 0
        assert world.run(meet_between_calls, ranks=[0]) == [sum(range(THREADS))]


def wait_impatiently(rank):
    """Wait in many threads, and give up waiting most of the time."""

    def work(thread):
        dice = random.Random(thread)
        for i in range(100):
            future = rpc.rpc_async(1, echo, (i,))
            while True:
                try:
                    assert future.wait(dice.choice([0.0, 1e-5, 1e-4, 1e-3])) == i
                    break
                except RpcTimeoutError:
                    continue
        return thread

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_thread_that_gives_up_waiting_leaves_its_turn_to_the_others(transport):
    with World(2, transport=transport) as world:
        assert world.run(wait_impatiently, ranks=[0]) == [sum(range(THREADS))]
        assert world.run(meet_between_calls, ranks=[0]) == [sum(range(THREADS))]
