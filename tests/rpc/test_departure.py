"""Leaving together, alone, and when somebody is lost."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

import distgrad as dg
from distgrad import autograd, rpc
from distgrad.errors import RpcTimeoutError, WorkerLostError
from distgrad.rpc.lifecycle import leave
from distgrad.testing import World

finished = []


@rpc.expose
def work_on(steps):
    """Leave a trail of asynchronous calls that outlive their callers."""
    if steps:
        rpc.rpc_async((rpc.get_worker_info().id + 1) % 3, work_on, (steps - 1,))
    else:
        finished.append(True)


def test_shutdown_waits_for_calls_made_by_calls():
    finished.clear()
    with World(3) as world:
        world.run(lambda rank: rpc.rpc_async((rank + 1) % 3, work_on, (20,)) and None)
    assert len(finished) == 3


def test_shutdown_others_that_do_not_come_time_out():
    with World(2) as world:

        def depart(rank):
            with pytest.raises(RpcTimeoutError, match="every worker must call shutdown"):
                rpc.shutdown(timeout=0.2)

        world.run(depart, ranks=[0])


def test_shutdown_lost_worker_is_named():
    with World(2) as world:
        started = time.monotonic()

        def depart(rank):
            threading.Timer(0.2, world.kill, (1,)).start()
            with pytest.raises(WorkerLostError, match="worker1"):
                rpc.shutdown(timeout=20)

        world.run(depart, ranks=[0])
        assert time.monotonic() - started < 10


def test_shutdown_twice_is_harmless():
    with World(1) as world:
        worker = world.run(lambda rank: rpc.current_worker())[0]
        leave(worker)
        leave(worker)
        assert worker.closed


def test_shutdown_leaves_no_threads():
    before = {t.name for t in threading.enumerate()}
    with World(4) as world:
        world.run(lambda rank: rpc.rpc_sync((rank + 1) % 4, work_on, (0,)))
    until = time.monotonic() + 5
    while {t.name for t in threading.enumerate()} - before and time.monotonic() < until:
        threading.Event().wait(0.01)
    assert {t.name for t in threading.enumerate()} <= before


def test_shutdown_while_another_worker_is_lost_ends():
    with World(1) as world:
        worker = world.run(lambda rank: rpc.current_worker())[0]
        links = worker.agent.links
        links.lost[1] = WorkerLostError("gone before")
        links._tidy = lambda peer: links.lost.setdefault(2, WorkerLostError("gone meanwhile"))
        leave(worker, graceful=False)
        assert set(links.lost) == {1, 2}


@rpc.expose
class Kept:
    """Something that worker 1 makes for worker 0."""

    def is_there(self):
        return True


@rpc.expose
def double(x):
    return x * 2.0


made = weakref.WeakSet()


@rpc.expose
def make():
    kept = Kept()
    made.add(kept)
    return kept


def hold_on(rank):
    """Leave a reference and a context open; what this returns keeps them so."""
    context = autograd.context()
    context.__enter__()
    rref = rpc.remote("worker1", make)
    assert rref.rpc_sync().is_there()
    return rref, rpc.rpc_sync("worker1", double, (dg.ones(1, requires_grad=True),)), context


def test_shutdown_lets_go_of_what_the_worker_kept_for_others():
    with World(2) as world:
        left_open = world.run(hold_on, ranks=[0])
        worker = world.run(lambda rank: rpc.current_worker())[1]
        assert len(made) == len(worker.extensions["autograd"].parts) == 1
        leave(worker, graceful=False)
        gc.collect()
        assert list(made) == []
        assert worker.extensions["autograd"].parts == {}
        del left_open


@rpc.expose
@rpc.functions.async_execution
def never():
    return rpc.Future()


def give_up_on_an_answer_that_never_comes(rank):
    if rank == 0:
        with pytest.raises(RpcTimeoutError):
            rpc.rpc_sync(1, never, timeout=0.05)
        rpc.rpc_async(1, never).cancel()


@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_shutdown_does_not_wait_for_answers_that_were_given_up(transport):
    with World(2, transport=transport) as world:
        world.run(give_up_on_an_answer_that_never_comes)
    # leaving the block shuts down together, and raises if that does not end


AT_EXIT = """
import atexit
import numpy as np
from distgrad import rpc
rpc.init_rpc("alone", rank=0, world_size=1)
atexit.register(rpc.shutdown)
atexit.register(lambda: print(rpc.rpc_sync("alone", np.add, (1, 2), timeout=10)))
"""


def test_first_call_and_shutdown_at_the_exit_of_the_interpreter():
    script = [sys.executable, "-c", AT_EXIT]
    done = subprocess.run(script, capture_output=True, text=True, timeout=30, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
