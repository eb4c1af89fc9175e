"""Calls whose end comes in an unusual way: workers that die on the way, answers that come late."""

import os
import signal
import threading
import time

import pytest

from distgrad import rpc
from distgrad.errors import RpcTimeoutError, WorkerLostError
from distgrad.testing import World

runs = []
gate = threading.Event()


@rpc.expose
def own_pid():
    return os.getpid()


@rpc.expose
def pass_on(route, depth):
    """Go round a route of workers, and wait at its end for somebody to die."""
    if depth == 0:
        gate.wait(60)
        return "nobody died"
    return rpc.rpc_sync(route[0], pass_on, (route[1:] + route[:1], depth - 1))


def lose_the_middle_of_a_chain(rank, victim):
    pid = rpc.rpc_sync(victim, own_pid)
    answers = [rpc.rpc_async(1, pass_on, ([2, 3, 1], depth)) for depth in (2, 5, 8)]
    with pytest.raises(RpcTimeoutError):
        answers[-1].wait(0.2)  # until all of them wait at their ends
    os.kill(pid, signal.SIGKILL)
    ends = [answer.exception(20) for answer in answers]
    living = [worker for worker in (1, 2, 3) if worker != victim]
    return ends, [rpc.rpc_sync(worker, own_pid, timeout=20) > 0 for worker in living]


@pytest.mark.parametrize("victim", [1, 2, 3])
def test_worker_that_dies_in_the_middle_of_a_chain_ends_it_at_once(victim):
    with World(4, transport="unix") as world:
        try:
            ((ends, others),) = world.run(lose_the_middle_of_a_chain, victim, ranks=[0])
        finally:
            world.kill(victim)
    assert all(isinstance(end, WorkerLostError) for end in ends)
    assert all(f"'worker{victim}'" in str(end) for end in ends)
    assert others == [True, True]


@rpc.expose
def note(value, seconds=0.0):
    time.sleep(seconds)
    runs.append(value)
    return value


@rpc.expose
def notes():
    return list(runs)


@pytest.fixture(params=["inproc", "unix", "tcp"])
def pair(request):
    runs.clear()
    with World(2, transport=request.param) as world:
        yield world


def give_up_early(rank):
    outcomes = []
    for timeout in (1e-9, 1e-6, 1e-5, 1e-4, 1e-3):
        late = rpc.rpc_async(1, note, (timeout, 0.02), timeout=timeout)
        with pytest.raises(RpcTimeoutError, match=f"no answer within {timeout:g} s"):
            late.wait(20)
        outcomes.append(late.done())
    unlimited = rpc.rpc_sync(1, note, ("unlimited", 0.05), timeout=0)
    known = rpc.rpc_sync(1, notes)
    return outcomes, unlimited, known, rpc.debug_info()["rpc.calls_pending"]


def test_timeouts_from_nanoseconds_up_end_calls_and_late_answers_are_dropped(pair):
    ((outcomes, unlimited, known, pending),) = pair.run(give_up_early, ranks=[0])
    assert outcomes == [True] * 5
    assert unlimited == "unlimited"
    assert len(known) == len(set(known))  # what ran, ran once
    assert known[-1] == "unlimited"
    assert pending == 0
