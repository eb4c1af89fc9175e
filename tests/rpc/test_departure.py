"""Leaving together, alone, and when somebody is lost."""

import threading
import time

import pytest

from distgrad import rpc
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
