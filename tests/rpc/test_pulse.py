"""A peer that was stopped is noticed; one that computes is left alone: real processes."""

import ctypes
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distgrad import rpc
from distgrad.config import config
from distgrad.errors import WorkerLostError
from distgrad.rpc.pulse import Doors, Rounds
from distgrad.testing import World
from distgrad.transport._poller import Poller

INTERVAL_S = 0.2
LARGE = 64 * 2**20


@rpc.expose
def own_pid():
    return os.getpid()


@rpc.expose
def hold_gil(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL does not let go of the GIL
    return "done"


@rpc.expose
def sleep(seconds):
    time.sleep(seconds)


@pytest.fixture(params=["unix", "tcp"])
def world(request):
    with World(3, transport=request.param, heartbeat_interval=INTERVAL_S) as world:
        yield world


def wait_for_a_stopped_peer(rank):
    pid = rpc.rpc_sync(1, own_pid)
    answer = rpc.rpc_async(1, sleep, (600,), timeout=0)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(
            WorkerLostError, match=r"'worker1'.*no sign of life for 0\.6 s"
        ) as caught:
            answer.wait(30)
    finally:
        os.kill(pid, signal.SIGKILL)
    return str(caught.value), rpc.rpc_sync(2, own_pid) > 0


def test_stopped_peer_is_lost_and_others_are_not(world):
    try:
        ((text, others_live),) = world.run(wait_for_a_stopped_peer, ranks=[0])
    finally:
        world.kill(1)
    assert others_live
    assert "sleep" in text


def wait_for_a_busy_peer(rank):
    return rpc.rpc_sync(1, hold_gil, (6 * INTERVAL_S,))


def test_peer_that_holds_its_gil_for_long_is_not_lost(world):
    assert world.run(wait_for_a_busy_peer, ranks=[0]) == ["done"]


def be_busy_oneself(rank):
    rpc.rpc_sync(1, own_pid)
    answer = rpc.rpc_async(1, sleep, (7 * INTERVAL_S,))
    hold_gil(6 * INTERVAL_S)
    return answer.wait()


def test_worker_that_was_busy_itself_does_not_judge(world):
    assert world.run(be_busy_oneself, ranks=[0]) == [None]


def wait_for_a_peer_that_pauses(rank):
    pid = rpc.rpc_sync(1, own_pid)
    answer = rpc.rpc_async(1, sleep, (6 * INTERVAL_S,))
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(INTERVAL_S, os.kill, (pid, signal.SIGCONT)).start()
    return answer.wait()


def test_peer_that_was_stopped_for_a_moment_is_not_lost(world):
    assert world.run(wait_for_a_peer_that_pauses, ranks=[0]) == [None]


def pids(rank):
    return rpc.rpc_sync(1, own_pid), rpc.rpc_sync(2, own_pid)


def ask_across_a_pause(rank):
    """Ask all others, from before everybody is stopped until after that."""
    answers = [rpc.rpc_async(peer, sleep, (4 * INTERVAL_S,)) for peer in (1, 2) if peer != rank]
    return [answer.wait() for answer in answers] + [rpc.rpc_sync(0, own_pid) > 0]


@pytest.mark.parametrize("pause", [2.6, 3.4])  # in intervals; one ends when patience does
def test_peers_that_go_on_after_who_asks_them_are_not_lost(world, pause):
    """They were stopped, then asked, and then who asked was stopped too."""
    judge = world.run(own_pid_of, ranks=[0])[0]
    others = world.run(pids, ranks=[0])[0]
    moment = threading.Event()
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        moment.wait(1.2 * INTERVAL_S)  # it asks both meanwhile
        os.kill(judge, signal.SIGSTOP)
        moment.wait(pause * INTERVAL_S)
        os.kill(judge, signal.SIGCONT)
        moment.wait(0.3 * INTERVAL_S)  # the time that the others may come later
    finally:
        for pid in (judge, *others):
            os.kill(pid, signal.SIGCONT)
    assert world.run(pids, ranks=[0])[0] == others


def own_pid_of(rank):
    return os.getpid()


def test_workers_that_were_all_stopped_go_on_in_any_order(extent):
    orders = list(itertools.permutations(range(3)))
    with World(3, transport="tcp", heartbeat_interval=INTERVAL_S) as world:
        processes = world.run(own_pid_of)
        for order in orders if extent(0, 1) else (orders[0], orders[-1]):
            found, moment = [], threading.Event()
            asking = threading.Thread(
                target=lambda found=found: found.extend(world.run(ask_across_a_pause))
            )
            asking.start()
            for pid in processes:
                os.kill(pid, signal.SIGSTOP)
            moment.wait(3.5 * INTERVAL_S)
            for rank in order:
                os.kill(processes[rank], signal.SIGCONT)
                moment.wait(0.3 * INTERVAL_S)
            asking.join(30)
            assert [answers[-1] for answers in found] == [True] * 3


@rpc.expose
def nbytes_of(array):
    return array.nbytes


def send_what_does_not_fit_into_the_kernel(rank):
    return rpc.rpc_sync(1, nbytes_of, (np.zeros(LARGE // 8),))


def test_peer_that_takes_nothing_while_the_sender_is_stopped_too_is_not_lost(monkeypatch):
    monkeypatch.setattr(config, "stall_timeout", 0.6)
    moment, found = threading.Event(), []
    with World(2, transport="tcp", heartbeat_interval=0) as world:
        sender, receiver = world.run(own_pid_of)
        world.run(pids_of_two, ranks=[0])
        os.kill(receiver, signal.SIGSTOP)
        sending = threading.Thread(
            target=lambda: found.extend(
                world.run(send_what_does_not_fit_into_the_kernel, ranks=[0])
            )
        )
        try:
            sending.start()
            moment.wait(0.3)
            os.kill(sender, signal.SIGSTOP)
            moment.wait(1.2)
            os.kill(sender, signal.SIGCONT)
            moment.wait(0.1)
        finally:
            os.kill(sender, signal.SIGCONT)
            os.kill(receiver, signal.SIGCONT)
        sending.join(30)
    assert found == [LARGE]


def pids_of_two(rank):
    return rpc.rpc_sync(1, own_pid)


def knock(address):
    scheme, _, location = address.partition("://")
    with socket.socket(socket.AF_UNIX if scheme == "unix" else socket.AF_INET) as sock:
        host, _, port = location.rpartition(":")
        sock.connect(f"\0{location}" if scheme == "unix" else (host, int(port)))
        sock.settimeout(10)
        return sock.recv(10)


def test_doors_answer_until_they_are_closed():
    doors = Doors(["unix", "tcp"], None)
    doors.attend("test")
    addresses = list(doors.addresses)
    assert [address.partition("://")[0] for address in addresses] == ["unix", "tcp"]
    for address in addresses * 20:
        assert knock(address) == b"\1"
    doors.close()
    doors.close()
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            knock(address)


DOOR_WITHOUT_DESCRIPTORS = """
import resource, sys
from distgrad.rpc.pulse import Doors
doors = Doors(["unix"], None)
doors.attend("test")
print(doors.addresses[0], doors._thread.native_id, flush=True)
for line in sys.stdin:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(line), hard))
    print("limit", flush=True)
doors.close()
"""


def times_slept(task):
    for line in (task / "status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise AssertionError("the system does not tell")


@pytest.mark.parametrize("most", [0, 3])
def test_door_of_a_process_without_descriptors_waits_for_some_and_answers(most):
    command = [sys.executable, "-c", DOOR_WITHOUT_DESCRIPTORS]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        address, thread = process.stdout.readline().split()
        assert knock(address) == b"\1"

        def limit(count):
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "limit\n"

        limit(most)  # not even the spare one can be used
        sock.connect("\0" + address.removeprefix("unix://"))
        task = Path(f"/proc/{process.pid}/task/{thread}")
        before, deadline = times_slept(task), time.monotonic() + 20
        while times_slept(task) < before + 3:  # who asks again and again does not sleep
            assert time.monotonic() < deadline
        limit(256)
        sock.settimeout(20)
        assert sock.recv(10) == b"\1"
        assert knock(address) == b"\1"
        process.stdin.close()
        assert process.wait(20) == 0


def test_doors_that_cannot_be_opened_leave_no_descriptor():
    gc.collect()
    before = os.listdir("/proc/self/fd")
    idle = Doors((), None)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with pytest.raises(OSError, match="assign"):
        Doors(["unix", "tcp"], "192.0.2.1")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    idle.attend("test")
    idle.close()


def test_heartbeat_interval_that_is_no_time_is_refused():
    for interval in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="heartbeat_interval"):
            rpc.RpcBackendOptions(heartbeat_interval=interval)


class Worker:
    """As much of a worker as its rounds see: who it is connected to."""

    def __init__(self, peers):
        self.crew = SimpleNamespace(poller=Poller())
        routes = dict.fromkeys(peers, SimpleNamespace(scheme="tcp"))
        self.links = SimpleNamespace(connected=list(peers), routes=routes)


@pytest.mark.parametrize("nonsense", ["tcp://here", "tcp://1.2.3.4:99999", f"tcp://{300 * 'ä'}:80"])
def test_doors_that_are_none_keep_nobody_from_asking_others(nonsense):
    worker = Worker([1, 2])
    with socket.create_server(("127.0.0.1", 0)) as door:
        addresses = {1: [f"tcp://127.0.0.1:{door.getsockname()[1]}"], 2: [nonsense]}
        rounds = Rounds(worker, addresses.get, 1.0)
        later = time.monotonic()
        for _ in range(2):
            later += 1.0
            assert rounds.tick(later) > later
        door.settimeout(20)
        door.accept()[0].close()
    rounds.close()
    worker.crew.poller.close()
