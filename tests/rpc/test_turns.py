"""More threads that wait than there are processors: each rouses the next."""

import math
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from references import wait_until

from distgrad import rpc
from distgrad.config import config
from distgrad.errors import RpcTimeoutError
from distgrad.rpc.crew import Crew
from distgrad.rpc.future import Future
from distgrad.testing import World
from distgrad.transport._poller import Poller

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


def test_nobody_is_left_ready_while_another_polls():
    # One poll brings what two threads wait for; the one that polled then waits for the other.
    # A third one is handed the role by a serving thread, and nothing more comes to be polled.
    with World(1, heartbeat_interval=60.0) as world:
        agent = world.run(lambda rank: rpc.current_worker())[0].agent
        polled, ready, never = (Future(agent=agent) for _ in range(3))
        roused, serving = threading.Event(), threading.Event()

        def serve():
            serving.set()
            while not polled.done():
                os.sched_yield()
            agent.crew.backlog.append(lambda: None)  # for this thread: no other is called

        def lead():
            polled.wait(30)
            return roused.wait(10)

        def follow():
            ready.wait(30)
            roused.set()

        with ThreadPoolExecutor(THREADS) as pool:
            leader = pool.submit(lead)
            wait_until(lambda: agent.crew.awaits(polled), collect=False)
            for _ in range(THREADS - 2):
                pool.submit(never.wait, 30)
            wait_until(lambda: len(agent.crew.followers) == THREADS - 2, collect=False)
            pool.submit(follow)  # the last who would inherit the role
            wait_until(lambda: len(agent.crew.followers) == THREADS - 1, collect=False)
            agent.submit(serve)
            assert serving.wait(20)
            wait_until(lambda: agent.crew.watched, collect=False)

            def tick(now):
                agent.ticks.remove(tick)
                ready.set_result(1)
                polled.set_result(1)
                return math.inf

            agent.ticks.append(tick)
            agent.tick_by(time.monotonic())
            assert leader.result(20)
            never.set_result(None)


def make_all_ready(first, then, turn_grace_s=1e-3):
    """Have one poll make all threads ready; the one that polled goes on with ``first(crew)``."""
    poller = Poller()

    def take_in(events):
        while events:
            events.pop()[1]()

    crew = Crew("ready", poller, take_in, lambda now: math.inf, 4)
    crew.turn_grace_s = turn_grace_s
    crew.start()
    agent = SimpleNamespace(crew=crew)
    futures = [Future(agent=agent) for _ in range(THREADS)]

    def wait(future, after, *args):
        future.wait()
        after(*args)

    with ThreadPoolExecutor(THREADS) as pool:
        waits = [pool.submit(wait, futures[0], first, crew)]
        wait_until(lambda: crew.awaits(futures[0]), collect=False)
        waits += [pool.submit(wait, future, then) for future in futures[1:]]
        wait_until(lambda: len(crew.followers) == THREADS - 1 and crew.watched, collect=False)
        poller.post("all", lambda: [future.set_result(None) for future in reversed(futures)])
        for waiting in waits:
            waiting.result(30)
    poller.close()


def test_ready_threads_do_not_wait_for_a_long_grace_period(monkeypatch):
    monkeypatch.setattr(config, "grace_us", 1e12)
    roused = threading.Event()

    def go_elsewhere(crew):
        try:
            assert roused.wait(20)
        finally:
            crew.close(0.0)

    make_all_ready(go_elsewhere, roused.set)


def test_crew_that_is_closed_leaves_nobody_ready():
    make_all_ready(lambda crew: crew.close(0.0), lambda: None)


def test_thread_that_steps_aside_rouses_the_next(monkeypatch):
    monkeypatch.setattr(config, "grace_us", 1e12)  # no watcher steps in
    roused = threading.Event()

    def step_aside(crew):
        crew.step_aside()
        try:
            assert roused.wait(20)
        finally:
            crew.close(0.0)

    make_all_ready(step_aside, roused.set, turn_grace_s=1e6)


def chatter(rank):
    """Two threads rouse each other without end, more wait for ever; this one calls."""
    agent = rpc.current_worker().agent
    balls = [Future(agent=agent), Future(agent=agent)]
    over, never = threading.Event(), Future(agent=agent)

    def play(side):
        while not over.is_set():
            balls[side].wait(20)
            balls[side] = Future(agent=agent)
            balls[1 - side].set_result(None)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(THREADS - 2):
            pool.submit(never.wait, 50)
        wait_until(lambda: len(agent.crew.followers) >= THREADS - 3, collect=False)
        players = [pool.submit(play, side) for side in range(2)]
        balls[0].set_result(None)
        try:
            return [rpc.rpc_sync(1, echo, (i,), timeout=20) for i in range(200)]
        finally:
            over.set()
            never.set_result(None)
            for player in players:
                player.result(30)


def test_threads_that_rouse_each_other_do_not_keep_all_from_polling():
    with World(2, transport="unix") as world:
        assert world.run(chatter, ranks=[0]) == [list(range(200))]


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
