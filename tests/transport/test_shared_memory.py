"""Peers that write nonsense into shared memory, and what happens to loans."""

import gc
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distgrad._codec import decode
from distgrad.config import config
from distgrad.errors import TransportError
from distgrad.testing.transport_pair import PATIENCE_S, Pair, handshakes, message, polling
from distgrad.transport._ring import RING_FILE_NBYTES
from distgrad.transport.base import Connection
from distgrad.transport.handshake import authenticate
from distgrad.transport.shm import answer_offer
from distgrad.transport.stream import UnixTransport

CONTROL = 4096 + 8192  # block of the direction that the connecting side produces
RING = 4096 + 2 * 8192 + 512 * 1024


def mapped(name: str) -> int:
    """Count the mappings of memory files with a name."""
    with open("/proc/self/maps") as maps:
        return sum(name in line for line in maps)


def send_many(connection: Connection, count: int) -> None:
    for _ in range(count):
        connection.send(message("x" * 1000))


class Hostile:
    """Joins the listener of a pair as an honest peer would, and keeps the memory file."""

    def __init__(self, pair: Pair) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(pair.listener.address.removeprefix("unix://"))
        deadline = time.monotonic() + PATIENCE_S
        kept: list[int] = []
        receive = socket.recv_fds

        def keep(*args: Any) -> Any:
            result = receive(*args)
            kept.extend(os.dup(fd) for fd in result[1])
            return result

        socket.recv_fds = keep  # type: ignore[assignment]
        try:
            with polling(pair.far):
                handshake = handshakes(9, connecting=True)(None)
                authenticate(self.sock, handshake, deadline, "test")
                self.ring = answer_offer(self.sock, deadline, "test")
        finally:
            socket.recv_fds = receive
        self.memory = mmap.mmap(kept[0], RING_FILE_NBYTES)
        os.close(kept[0])
        pair.until(lambda: len(pair.far.connections) == 2)

    def close(self) -> None:
        self.memory.close()
        self.sock.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    one = Pair(UnixTransport())
    one.connect()
    yield one
    one.close()


@pytest.mark.parametrize("seed", range(20))
def test_peer_that_scribbles_ends_its_own_connection_only(pair: Pair, seed: int) -> None:
    choose = random.Random(seed)
    hostile = Hostile(pair)
    length = choose.choice([100, 5000, 512 * 1024])
    hostile.memory[RING : RING + length] = choose.randbytes(length)
    if seed % 2:  # a loan of something
        hostile.memory[RING : RING + 4] = b"\xff\0\0\0"
    tail = choose.choice([length, 64, 2**63, 2**64 - 1])
    hostile.memory[CONTROL : CONTROL + 8] = tail.to_bytes(8, "little")
    hostile.sock.send(b"\1")
    pair.until(lambda: bool(pair.far.ends()))
    assert pair.far.ends() != [None]
    pair.near.connection.send(message("still here"))
    pair.until(lambda: "still here" in pair.far.values())
    hostile.close()


def test_peer_that_scribbles_over_the_consumer_index_ends_its_own_connection(pair: Pair) -> None:
    hostile = Hostile(pair)
    hostile.memory[4096 + 128 : 4096 + 136] = (2**40).to_bytes(8, "little")
    far = pair.far.connections[1]
    with pytest.raises(TransportError, match="cannot send"):
        send_many(far, 20_000)
    pair.until(lambda: bool(pair.far.ends()))
    hostile.close()


def test_peer_with_nonsense_on_the_socket_ends_its_own_connection(pair: Pair) -> None:
    hostile = Hostile(pair)
    hostile.sock.send(b"\x77")
    pair.until(lambda: bool(pair.far.ends()))
    assert "no bell" in str(pair.far.ends()[0])
    hostile.close()


def test_chunk_that_could_shrink_is_refused(pair: Pair) -> None:
    hostile = Hostile(pair)
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 2**20)
    socket.send_fds(hostile.sock, [b"\2"], [fd])
    os.close(fd)
    pair.until(lambda: bool(pair.far.ends()))
    assert "relied on" in str(pair.far.ends()[0])
    hostile.close()


def test_loans_return_and_slabs_are_used_again(pair: Pair) -> None:
    gc.collect()
    descriptors, arenas = len(os.listdir("/proc/self/fd")), mapped("distgrad-arena")
    for number in range(300):
        pair.near.connection.send(message(np.full(1_000_000, number % 100, np.uint8)))
        pair.until(lambda: bool(pair.far.events))
        [array] = pair.far.values()
        assert array.flags.writeable
        assert np.all(array == number % 100)
        pair.far.events.clear()
        del array
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert mapped("distgrad-arena") <= arenas + 4  # two chunks at most, mapped by both sides


def test_loans_outlive_their_connection(pair: Pair) -> None:
    pair.near.connection.send(message(np.arange(100_000)))
    pair.until(lambda: bool(pair.far.events))
    [array] = pair.far.values()
    pair.near.connection.close()
    pair.until(lambda: len(pair.far.events) == 2)
    pair.far.events.clear()
    pair.far.connections.clear()
    gc.collect()
    assert np.array_equal(array, np.arange(100_000))


def test_loans_in_the_child_of_a_fork_are_its_own(pair: Pair) -> None:
    pair.near.connection.send(message(np.arange(100_000)))
    pair.until(lambda: bool(pair.far.events))
    [array] = pair.far.values()
    pid = os.fork()
    if pid == 0:
        array += 1
        os._exit(0 if array[0] == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.array_equal(array, np.arange(100_000))


def test_more_connections_than_attended_rings_all_deliver(pair: Pair) -> None:
    for number in range(10, 60):
        pair.connect(number)
    with polling(pair.far):
        threads = [
            threading.Thread(target=lambda c=c: [c.send(message(n)) for n in range(200)])
            for c in pair.near.connections
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    pair.until(lambda: len(pair.far.events) == 51 * 200)


def test_shared_memory_off_uses_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "shared_memory", False)
    gc.collect()
    before = mapped("distgrad-ring")
    pair = Pair(UnixTransport())
    pair.connect()
    assert mapped("distgrad-ring") == before
    pair.near.connection.send(message(1))
    pair.until(lambda: [decode(item) for _, item in pair.far.events] == [1])
    pair.close()
