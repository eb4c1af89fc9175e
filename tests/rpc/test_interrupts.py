"""Ctrl-C in every wait: real processes, real signals."""

import os
import random
import signal
import threading
import time

import pytest
from references import wait_until

from distgrad import rpc
from distgrad.errors import DistgradError
from distgrad.testing import World

gate = threading.Event()


@rpc.expose
def echo(value):
    return value


@rpc.expose
def wait_for_gate():
    return gate.wait(30)


@rpc.expose
def open_gate():
    gate.set()


@pytest.fixture(params=["unix", "tcp"])
def pair(request):
    gate.clear()
    with World(2, transport=request.param) as world:
        yield world


def interrupt_soon():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def is_interrupted(wait):
    timer = interrupt_soon()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait()
    timer.join()
    assert time.monotonic() - start < 10
    return True


def interrupt_leader(rank):
    assert is_interrupted(lambda: rpc.rpc_sync(1, wait_for_gate))
    rpc.rpc_sync(1, open_gate)
    return rpc.rpc_sync(1, echo, (3,))


def test_interrupt_of_thread_that_polls_leaves_a_worker_that_works(pair):
    assert pair.run(interrupt_leader, ranks=[0]) == [3]


def interrupt_follower(rank):
    blocked = rpc.rpc_async(1, wait_for_gate)
    leader = threading.Thread(target=blocked.wait)
    leader.start()
    assert is_interrupted(lambda: blocked.wait(30))
    rpc.rpc_sync(1, open_gate)
    leader.join(10)
    return rpc.rpc_sync(1, echo, (4,)), leader.is_alive()


def test_interrupt_of_thread_that_follows_leaves_a_worker_that_works(pair):
    assert pair.run(interrupt_follower, ranks=[0]) == [(4, False)]


def interrupt_own_future(rank):
    assert is_interrupted(rpc.Future().wait)
    return rpc.rpc_sync(1, echo, (5,))


def test_interrupt_of_wait_for_own_future_leaves_a_worker_that_works(pair):
    assert pair.run(interrupt_own_future, ranks=[0]) == [5]


def shoot(times, begin):
    pause, dice = threading.Event(), random.Random(1)
    begin.wait(10)
    for _ in range(times):
        pause.wait(dice.uniform(0.0005, 0.003))
        os.kill(os.getpid(), signal.SIGINT)


def call_under_fire(rank):
    """Call while interrupts arrive at any moment; what was interrupted is asked for again."""
    hits, answers, future, i = 0, [], None, 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin, over = threading.Event(), False
    shooter = threading.Thread(target=shoot, args=(1000, begin))
    shooter.start()
    while not over:
        try:
            begin.set()
            # An interrupted wait leaves the future as it was: its answer must still come.
            future = future or rpc.rpc_async(1, echo, (i,), timeout=20)
            value = future.wait(10)
            answers.append(value == i)
            future, i = None, i + 1
            over = not shooter.is_alive()
        except KeyboardInterrupt:
            hits += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return all(answers), len(answers) > 50, hits > 50, rpc.rpc_sync(1, echo, ("after",))


def test_interrupts_at_any_moment_lose_no_answer(pair):
    assert pair.run(call_under_fire, ranks=[0]) == [(True, True, True, "after")]


class Fragile:
    def __init__(self, value):
        self.value = value


interruptions = [0]


def decode_fragile(value):
    if interruptions[0] and threading.current_thread() is threading.main_thread():
        interruptions[0] -= 1
        raise KeyboardInterrupt
    return Fragile(value)


rpc.register_type(Fragile, lambda item: item.value, decode_fragile)


@rpc.expose
def give_fragile(value):
    return Fragile(value)


def be_interrupted_while_decoding(rank):
    interruptions[0] = 1
    for _ in range(1000):  # until this thread is the one that decodes
        first = rpc.rpc_async(1, give_fragile, (1,))
        second = rpc.rpc_async(1, give_fragile, (2,))
        try:
            second.wait(10)
        except KeyboardInterrupt:
            return first.wait(10).value, second.wait(10).value
    return "never interrupted"


def test_interrupt_while_an_answer_is_decoded_loses_neither_it_nor_the_next():
    with World(2, transport="unix") as world:
        assert world.run(be_interrupted_while_decoding, ranks=[0]) == [(1, 2)]


def call_in_signal_handler(rank):
    seen = []

    def handle(number, frame):
        try:
            rpc.rpc_sync(1, echo, (5,))
        except DistgradError as error:
            seen.append(str(error))
        rpc.rpc_async(1, open_gate)

    signal.signal(signal.SIGUSR1, handle)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    assert rpc.rpc_sync(1, wait_for_gate)
    timer.join()
    return seen


def test_call_in_a_handler_that_interrupts_the_thread_that_polls_is_refused(pair):
    [[error]] = pair.run(call_in_signal_handler, ranks=[0])
    assert "in a signal handler" in error
    assert "rpc_async" in error


def interrupt_when(condition, handle):
    """Run ``handle()`` in the main thread, as a signal handler, once a condition holds."""

    def shoot_once():
        wait_until(condition, collect=False)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, lambda *_: handle())
    threading.Thread(target=shoot_once).start()


def complete_what_another_waits_for(rank):
    crew = rpc.current_worker().agent.crew
    answer, own = rpc.rpc_async(1, wait_for_gate), rpc.Future()

    def wait_for_own():
        own.wait(20)
        rpc.rpc_sync(1, open_gate)

    other = threading.Thread(target=wait_for_own)

    def other_follows():
        if crew.awaits(answer) and other.ident is None:
            other.start()
        return crew.awaits(answer) and crew.followers

    interrupt_when(other_follows, lambda: own.set_result(1))
    passed = answer.wait(20)
    other.join()
    return passed


def complete_what_is_waited_for(rank):
    crew, own = rpc.current_worker().agent.crew, rpc.Future()
    interrupt_when(lambda: crew.awaits(own), lambda: own.set_result(True))
    return own.wait(20)


@pytest.mark.parametrize("complete", [complete_what_another_waits_for, complete_what_is_waited_for])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_future_completed_in_a_handler_that_interrupts_the_poll_is_noticed(transport, complete):
    gate.clear()
    with World(2, transport=transport, heartbeat_interval=60.0) as world:
        assert world.run(complete, ranks=[0]) == [True]


def call_while_following(rank):
    crew, seen = rpc.current_worker().agent.crew, []
    answer, own = rpc.rpc_async(1, wait_for_gate), rpc.Future()
    leader = threading.Thread(target=answer.wait)
    leader.start()
    wait_until(lambda: crew.awaits(answer), collect=False)

    def handle():
        rpc.rpc_sync(1, open_gate, timeout=20)  # the leader leaves while this waits
        seen.append(rpc.rpc_sync(1, echo, (5,), timeout=20))
        own.set_result(None)

    interrupt_when(lambda: crew.awaits(answer) and crew.followers, handle)
    own.wait(30)
    leader.join()
    return seen


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_call_in_a_handler_that_interrupts_a_follower_is_answered(transport):
    gate.clear()
    with World(2, transport=transport, heartbeat_interval=60.0) as world:
        assert world.run(call_while_following, ranks=[0]) == [[5]]
