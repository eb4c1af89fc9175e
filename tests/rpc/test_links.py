"""Connections between workers: who makes them, and who must not wait for them."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from distgrad import rpc
from distgrad.config import config
from distgrad.errors import RpcTimeoutError, WorkerLostError
from distgrad.message import Call
from distgrad.rpc.future import Future
from distgrad.rpc.links import Links
from distgrad.rpc.worker import Worker
from distgrad.testing import World
from distgrad.transport._poller import Poller
from distgrad.transport.lanes import Pairing
from distgrad.transport.registry import transport_for
from distgrad.transport.shm import Offer


@rpc.expose
def twice(x):
    """Return 2 x."""
    return 2 * x


def ask_from_the_polling_thread(worker, peer, prepare=lambda: None, count=1):
    """Ask a peer ``count`` times from a tick; return the answers' futures."""
    futures = Future(agent=worker.agent)

    def tick(now):
        worker.agent.ticks.remove(tick)
        prepare()
        call = [Call(f"{__name__}:twice", (i,), None) for i in range(count)]
        try:
            futures.set_result([worker.request(peer, each) for each in call])
        except Exception as error:
            futures.set_exception(error)
        return float("inf")

    worker.agent.ticks.append(tick)
    worker.agent.tick_by(time.monotonic())
    return futures.wait(20)


barrier = multiprocessing.get_context("fork").Barrier(2)


def cross(rank):
    futures = ask_from_the_polling_thread(
        rpc.current_worker(), 1 - rank, prepare=lambda: barrier.wait(20), count=50
    )
    return [future.wait(3) for future in futures]


@pytest.mark.parametrize("transport", ["inproc", "unix", "tcp"])
def test_two_polling_threads_that_connect_to_each_other_do_not_block(transport):
    # Each would wait for a handshake that only the other one can answer.
    with World(2, transport=transport) as world:
        expected = [2 * i for i in range(50)]
        assert world.run(cross) == [expected, expected]


def what_is_lost(act):
    """Return what `on_lost` tells while ``act`` fails for want of worker 2."""
    worker: Worker = rpc.current_worker()
    lost = Future(agent=worker.agent)
    worker.on_lost.append(lambda peer, why: lost.set_result((peer, str(why))))
    with pytest.raises(WorkerLostError, match="cannot reach worker 'worker2'"):
        act(worker)
    return lost.wait(10)


def ask_from_a_tick(rank):
    return what_is_lost(lambda worker: ask_from_the_polling_thread(worker, 2)[0].wait(10))


def ask_by_a_call(rank):
    return what_is_lost(lambda worker: rpc.rpc_sync(2, twice, (1,)))


@pytest.mark.parametrize("ask", [ask_from_a_tick, ask_by_a_call])
def test_worker_that_cannot_be_reached_is_lost_for_everybody(ask):
    with World(3, transport="unix") as world:
        world.kill(2)
        ((peer, why),) = world.run(ask, ranks=[1])
    assert peer == 2
    assert "cannot reach worker 'worker2'" in why


DIES = """
import os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print(flush=True)
peer, _ = server.accept()
peer.recv(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def ask_who_dies_in_the_handshake(rank, path):
    world = rpc.current_worker().world
    addresses_of = world.addresses_of
    world.addresses_of = lambda peer: [f"unix://{path}"] if peer == 2 else addresses_of(peer)
    command = [sys.executable, "-c", DIES, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        lost = what_is_lost(lambda worker: rpc.rpc_sync(2, twice, (1,)))
    return process.returncode, lost


def test_worker_that_dies_in_the_handshake_is_lost_and_the_error_says_why(tmp_path):
    with World(3, transport="unix") as world:
        [(code, (peer, why))] = world.run(
            ask_who_dies_in_the_handshake, str(tmp_path / "s"), ranks=[0]
        )
        world.kill(2)  # nobody waits for it any more
    assert code == -signal.SIGKILL
    assert peer == 2
    assert "it went away in the handshake" in why


def end_at_once(ask):
    """Return what ``ask`` fails with when the connection it makes ends before it is in use."""
    worker: Worker = rpc.current_worker()
    links = worker.agent.links
    reach = links._reach

    def reach_and_end(peer):
        connection = reach(peer)
        connection.abort()
        return connection

    links._reach = reach_and_end
    with pytest.raises(WorkerLostError) as caught:
        ask(worker)
    del links._reach
    return str(caught.value)


def lose_it_in_a_tick(rank):
    return end_at_once(lambda worker: ask_from_the_polling_thread(worker, 1)[0].wait(10))


def lose_it_in_a_call(rank):
    return end_at_once(lambda worker: rpc.rpc_sync(1, twice, (1,), timeout=10))


@pytest.mark.parametrize("transport", ["inproc", "unix", "tcp"])
@pytest.mark.parametrize("ask", [lose_it_in_a_tick, lose_it_in_a_call])
def test_connection_that_ends_before_it_is_in_use_is_a_loss(ask, transport):
    with World(2, transport=transport) as world:
        (why,) = world.run(ask, ranks=[0])
        world.kill(1)
    assert "'worker1' is lost" in why


def connect_again_and_again(rank):
    worker = rpc.current_worker()
    assert rpc.rpc_sync(0, twice, (1,)) == 2
    (where,) = worker.world.addresses_of(0)
    made = [
        transport_for(where.partition("://")[0]).connect(
            where,
            worker.agent.links._poller,
            lambda uid: worker.world.handshake(connecting=True, peer_uid=uid),
            20,
        )
        for _ in range(10)
    ]
    deadline = time.monotonic() + 20
    while sum(not connection.closed for connection in made) > 3:
        assert time.monotonic() < deadline
    assert rpc.rpc_sync(0, twice, (2,)) == 4
    return sum(not connection.closed for connection in made)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_peer_that_connects_again_and_again_has_few_connections(transport):
    with World(3, transport=transport, secret="s3cret") as world:
        assert world.run(connect_again_and_again, ranks=[1]) == [3]
        world.kill(1)


def ask_too_often(rank):
    worker = rpc.current_worker()
    reach, asked = worker.agent.links._reach, threading.Event()

    def reach_later(peer):
        asked.wait(20)
        return reach(peer)

    def tick(now):
        worker.agent.ticks.remove(tick)
        try:
            for number in range(50):
                futures.append(worker.request(1, Call(f"{__name__}:twice", (number,), None)))
        except WorkerLostError as error:
            refused.set_result(str(error))
        return float("inf")

    futures, refused = [], Future(agent=worker.agent)
    worker.agent.links._reach = reach_later
    worker.agent.ticks.append(tick)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        worker.agent.tick_by(time.monotonic())
        why = refused.wait(20)
        asked.set()
        for future in futures:  # nobody waits for an answer that cannot come
            with pytest.raises(WorkerLostError):
                future.wait(10)
    # The call that is refused has failed with the others before it is: who made it knows.
    assert [str(warning.message) for warning in warned] == []
    return why


def test_too_many_messages_for_a_connection_that_is_being_made_are_a_loss(monkeypatch):
    monkeypatch.setattr(config, "max_peer_bytes", 10 * 1024)
    with World(2) as world:
        (why,) = world.run(ask_too_often, ranks=[0])
        world.kill(1)
    assert "does not read what waits for it" in why


def test_tick_that_fails_harms_nobody(caplog):
    with World(1) as world:
        worker = world.run(lambda rank: rpc.current_worker())[0]
        done = Future(agent=worker.agent)

        def tick(now):
            worker.agent.ticks.remove(tick)
            done.set_result(None)
            raise PermissionError("not today")

        worker.agent.ticks.append(tick)
        worker.agent.tick_by(time.monotonic())
        done.wait(10)
        assert world.run(lambda rank: rpc.rpc_sync(0, twice, (21,))) == [42]
    assert "not today" in caplog.text


def test_tick_that_fails_is_called_again():
    with World(1) as world:
        worker = world.run(lambda rank: rpc.current_worker())[0]
        done = Future(agent=worker.agent)
        times = []

        def tick(now):
            times.append(now)
            if len(times) == 1:
                raise PermissionError("not yet")
            worker.agent.ticks.remove(tick)
            done.set_result(None)
            return float("inf")

        worker.agent.ticks.append(tick)
        worker.agent.tick_by(time.monotonic())
        done.wait(10)


def hold_the_gil_or_ask(rank, act):
    barrier.wait(20)
    if rank == 1:
        ctypes.PyDLL(None).usleep(1_200_000)  # PyDLL does not let go of the GIL
        return None
    threading.Event().wait(0.1)  # that the other one holds it
    return act()


def ask_three_ways():
    later = [rpc.rpc_async(1, twice, (i,)) for i in range(5)]
    large = rpc.rpc_sync(1, twice, (np.ones(2**20),))
    return [future.wait() for future in later], float(large.sum())


def ask_with_little_patience():
    array = np.ones(2**20)
    for arguments in ((1,), (array,)):
        with pytest.raises(RpcTimeoutError):
            rpc.rpc_sync(1, twice, arguments, timeout=0.1)
    array[:] = 2.0
    return rpc.rpc_sync(1, twice, (1,))


@pytest.mark.parametrize(
    ("act", "expected"),
    [(ask_three_ways, ([0, 2, 4, 6, 8], 2.0 * 2**20)), (ask_with_little_patience, 2)],
)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_worker_that_is_asked_first_while_it_computes_is_not_lost(
    transport, act, expected, monkeypatch
):
    monkeypatch.setattr(config, "handshake_timeout", 0.3)
    with World(2, transport=transport) as world:
        assert world.run(hold_the_gil_or_ask, act) == [expected, None]


def compute_once(cls, name, first):
    """Have this process compute for a while, once, before or after it calls a method."""
    method, turns = getattr(cls, name), [lambda: ctypes.PyDLL(None).usleep(800_000)]

    def slow(*args):
        turn = turns.pop() if turns else lambda: None
        if first:
            turn()
        result = method(*args)
        if not first:
            turn()
        return result

    setattr(cls, name, slow)


def shake_hands_slowly(rank):
    if rank == 1:
        compute_once(Offer, "send", first=False)  # it has the answer when it goes on
        compute_once(Pairing, "take", first=True)  # and here the peer has given up
    barrier.wait(20)
    return rpc.rpc_sync(1, twice, (1,)) if rank == 0 else None


def ask_each_other(rank):
    return rpc.rpc_sync(1 - rank, twice, (rank,))


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_workers_are_not_lost_when_one_computes_in_the_middle_of_a_handshake(
    transport, monkeypatch
):
    monkeypatch.setattr(config, "handshake_timeout", 0.3)
    with World(2, transport=transport) as world:
        assert world.run(shake_hands_slowly) == [2, None]
        assert world.run(ask_each_other) == [0, 2]


def ask_a_stopped_worker(rank, pid):
    os.kill(pid, signal.SIGSTOP)
    return what_is_lost(lambda worker: rpc.rpc_sync(2, twice, (1,)))


def test_worker_that_is_asked_first_while_it_is_stopped_is_lost(monkeypatch):
    monkeypatch.setattr(config, "handshake_timeout", 0.3)
    with World(3, transport="unix") as world:
        pid = world.run(own_pid)[2]
        try:
            ((peer, why),) = world.run(ask_a_stopped_worker, pid, ranks=[0])
        finally:
            world.kill(2)
    assert peer == 2
    assert "no answer" in why


def ask_a_stopped_worker_with_little_patience(rank, pid):
    os.kill(pid, signal.SIGSTOP)
    array = np.ones(2**20)
    for arguments in ((1,), (array,)):
        with pytest.raises(RpcTimeoutError, match=r"call .*twice on worker 'worker1'.* 0\.1 s"):
            rpc.rpc_sync(1, twice, arguments, timeout=0.1)
    assert rpc.rpc_async(1, twice, (1,), timeout=0.1).cancel()
    reference = rpc.remote(1, twice, (1,), timeout=0.1)
    with pytest.raises(RpcTimeoutError):
        reference.to_here(timeout=0.1)
    os.kill(pid, signal.SIGCONT)
    return rpc.rpc_sync(1, twice, (1,), timeout=50)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_time_of_a_call_is_over_although_the_first_connection_takes_longer(transport, monkeypatch):
    monkeypatch.setattr(config, "handshake_timeout", 600)  # the test fails before
    with World(2, transport=transport, heartbeat_interval=0) as world:
        pid = world.run(own_pid)[1]
        assert world.run(ask_a_stopped_worker_with_little_patience, pid, ranks=[0]) == [2]


def own_pid(rank):
    return os.getpid()


class NoticedLock:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self, noticed):
        self.lock = threading.Lock()
        self.noticed = noticed

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.noticed.set()
            self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


class Link:
    """A connection that runs something when it is asked for its peer."""

    closed = False

    def __init__(self, peer, on_look=lambda: None):
        self._peer, self._on_look = peer, on_look

    @property
    def peer(self):
        self._on_look()
        return self._peer

    def close(self):
        pass

    abort = close


def test_connection_that_ends_while_its_worker_closes_all_of_them_is_taken_out():
    closing, go_on, out_of_the_way = threading.Event(), threading.Event(), threading.Event()

    def say_farewell(peer):
        closing.set()
        assert go_on.wait(20)

    def close():
        links.close(say_farewell)
        out_of_the_way.set()

    def let_close_go_on():
        go_on.set()
        assert out_of_the_way.wait(20)

    world = SimpleNamespace(name_of=str, addresses_of=lambda peer: ())
    links = Links(world, Poller(), lambda: True, lambda peer, why: None)
    links._adopting = NoticedLock(out_of_the_way)
    ended = Link(1)
    links.routes[2] = Link(2)
    links._open = {ended, links.routes[2], *(Link(3, let_close_go_on) for _ in range(5))}
    closer = threading.Thread(target=close)
    closer.start()
    assert closing.wait(20)
    assert links.drop(ended, None)[0] == 1
    closer.join(20)
    assert not links.connections
