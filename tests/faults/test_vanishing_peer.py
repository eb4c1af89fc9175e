"""A peer that is killed at any byte: of the handshake, of a message, of an answer it reads.

The peer is a forked process that does exactly so much and then kills itself by SIGKILL, so
that each stage is reached every time.
"""

import gc
import mmap
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from distgrad._codec import Frame, decode
from distgrad.config import config
from distgrad.errors import TransportError
from distgrad.testing.transport_pair import PATIENCE_S, Pair, handshakes, message
from distgrad.transport._arena import memory_file
from distgrad.transport._ring import RING_FILE_NBYTES
from distgrad.transport.handshake import authenticate
from distgrad.transport.lanes import announce, join
from distgrad.transport.stream import TcpTransport, UnixTransport

WORD = b"friend 9"
PAGE, RING = 4096, 512 * 1024
PRODUCED, CONSUMED = 3 * PAGE, PAGE  # control blocks of the connecting side
PRODUCED_DATA = 5 * PAGE + RING

ARRAYS = [np.arange(6000, dtype="u1"), "between", np.arange(3000.0)]
STREAM = b"".join(message(ARRAYS).parts())
HEAD = bytes(message(ARRAYS).parts()[0])
LOAN = np.arange(40_000, dtype="u1")
LOAN_HEAD = bytes(message(LOAN).parts()[0])
RECORD = struct.pack("<B3xIIIQQ32x", 255, 5, 1, 0, 0, LOAN.nbytes)
APART = np.arange(1_000_000, dtype="u1")
APART_HEAD = b"\xfe" + bytes(63) + bytes(message(APART).parts()[0])

lanes: list[socket.socket] = []  # of the process that will be killed

Act = Callable[[socket.socket], object]


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A listener with an honest connection, which must not notice anything."""
    pair = Pair(UnixTransport() if request.param == "unix" else TcpTransport())
    pair.connect()
    before = held()
    yield pair
    pair.far.events.clear()
    del pair.far.connections[1:]
    pair.near.connection.send(message("undisturbed"))
    pair.until(lambda: pair.far.values() == ["undisturbed"])
    pair.until(lambda: no_more_than(before))
    pair.close()


def held() -> tuple[int, int]:
    """Count descriptors, and mappings of shared memory."""
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("memfd:distgrad-" in line for line in maps)


def no_more_than(before: tuple[int, int]) -> bool:
    if any(now > then for now, then in zip(held(), before, strict=True)):
        gc.collect()
    return all(now <= then for now, then in zip(held(), before, strict=True))


def vanish_after(pair: Pair, act: Act) -> None:
    """Have a process connect, act, and be killed; return when it is dead."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(write)
            taken_in.append(read)
            act(dial(pair))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(read)
    told = os.fdopen(write, "wb", buffering=0)
    status: list[int] = []

    def ended() -> bool:
        if len(pair.far.connections) > 1:
            told.close()
        done, how = os.waitpid(pid, os.WNOHANG)
        status.extend([how] if done else [])
        return bool(status)

    with told:
        pair.until(ended)
    assert os.waitstatus_to_exitcode(status[0]) == -signal.SIGKILL


#: In the child: what reads its end once the other side has made a connection of its socket. Who
#: goes before that has given up, and is forgotten.
taken_in: list[int] = []


def dial(pair: Pair) -> socket.socket:
    location = pair.listener.address.partition("://")[2]
    if pair.transport.scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(location)
        return sock
    host, _, port = location.rpartition(":")
    return socket.create_connection((host, int(port)))


def enter(sock: socket.socket) -> None:
    """Prove who this is."""
    handshake = handshakes(9, connecting=True)(None)
    authenticate(sock, handshake, time.monotonic() + PATIENCE_S, "test")
    sock.settimeout(PATIENCE_S)


def join_plainly(sock: socket.socket) -> None:
    """Become a worker that shares no memory."""
    enter(sock)
    if sock.family == socket.AF_UNIX:
        sock.recv(33, socket.MSG_WAITALL)
        sock.sendall(b"\0")
    else:
        lanes.append(join(announce(sock), time.monotonic() + PATIENCE_S, "test", another(sock)))
    os.read(taken_in[0], 1)


def another(sock: socket.socket) -> Callable[[], socket.socket]:
    """Return what opens a second socket to the same place."""

    def open_socket() -> socket.socket:
        lane = socket.create_connection(sock.getpeername())
        enter(lane)
        return lane

    return open_socket


def join_in_memory(sock: socket.socket) -> mmap.mmap:
    """Become a worker that shares memory; return the memory."""
    enter(sock)
    offer, fds, _, _ = socket.recv_fds(sock, 33, 1)
    memory = mmap.mmap(fds[0], RING_FILE_NBYTES)
    memory[32:64] = offer[1:]
    sock.sendall(b"\1")
    os.read(taken_in[0], 1)
    return memory


def write(memory: mmap.mmap, sock: socket.socket, data: bytes) -> None:
    """Write to a fresh ring."""
    memory[PRODUCED_DATA : PRODUCED_DATA + len(data)] = data
    memory[PRODUCED : PRODUCED + 8] = struct.pack("<Q", len(data))
    sock.send(b"\1")


# -- of the handshake ----------------------------------------------------------------------

PACKED = struct.pack("<H", len(WORD)) + WORD
HANDSHAKE: dict[str, Act] = {
    "connected": lambda sock: None,
    **{
        f"{nbytes} bytes": lambda sock, nbytes=nbytes: sock.sendall(PACKED[:nbytes])
        for nbytes in (1, 2, 3, len(PACKED) - 1, len(PACKED))
    },
    "answered": enter,
    "offered": lambda sock: (enter(sock), sock.recv_into(bytearray(1))),
}


@pytest.mark.parametrize("stage", list(HANDSHAKE))
def test_peer_killed_in_the_handshake_is_forgotten(pair: Pair, stage: str) -> None:
    if stage == "offered" and pair.transport.scheme == "tcp":
        pytest.skip("there is no offer")
    vanish_after(pair, HANDSHAKE[stage])
    pair.settle()
    frames = [item for _, item in pair.far.events if isinstance(item, Frame)]
    assert frames == []


# -- of a message --------------------------------------------------------------------------

CUTS = sorted(
    {0, 1, 63, 64, 65, len(HEAD) - 1, len(HEAD), len(HEAD) + 1, len(STREAM) // 2}
    | {len(STREAM) - 1, len(STREAM)}
)


def check_end(pair: Pair, cut: int, whole: int, value: Any) -> None:
    """A message that is not whole is none; who went between two messages just went."""
    pair.until(lambda: bool(pair.far.ends()))
    [end] = pair.far.ends()
    messages = [decode(item) for _, item in pair.far.events if isinstance(item, Frame)]
    assert repr(messages) == repr([value] if cut == whole else [])
    if cut in (0, whole):
        assert end is None
    else:
        assert "in the middle of a message" in str(end)
    with pytest.raises(TransportError):
        pair.far.connections[1].send(message("anybody there?"))


@pytest.mark.parametrize("cut", CUTS)
def test_peer_killed_at_a_byte_of_its_message_is_an_end(pair: Pair, cut: int) -> None:
    def act(sock: socket.socket) -> None:
        join_plainly(sock)
        sock.sendall(STREAM[:cut])

    vanish_after(pair, act)
    check_end(pair, cut, len(STREAM), ARRAYS)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("pair", ["unix"], indirect=True)
def test_peer_killed_at_a_byte_of_its_ring_is_an_end(pair: Pair, cut: int) -> None:
    vanish_after(pair, lambda sock: write(join_in_memory(sock), sock, STREAM[:cut]))
    check_end(pair, cut, len(STREAM), ARRAYS)


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 127, 128, 129, len(RECORD + LOAN_HEAD)])
@pytest.mark.parametrize("pair", ["unix"], indirect=True)
def test_peer_killed_in_the_middle_of_a_loan_is_an_end(pair: Pair, cut: int, passed: bool) -> None:
    def act(sock: socket.socket) -> None:
        memory = join_in_memory(sock)
        if passed:
            fd = memory_file("distgrad-arena", 2**20)
            mmap.mmap(fd, 2**20)[: LOAN.nbytes] = LOAN.tobytes()
            socket.send_fds(sock, [b"\2"], [fd])
        write(memory, sock, (RECORD + LOAN_HEAD)[:cut])

    vanish_after(pair, act)
    if passed or cut < len(RECORD):
        check_end(pair, cut, len(RECORD + LOAN_HEAD), LOAN)
    else:
        pair.until(lambda: bool(pair.far.ends()))
        assert "is not known" in str(pair.far.ends()[0])


def name_the_lane(nbytes: int) -> Act:
    """Open the second socket and say so many bytes of what it is for."""

    def act(sock: socket.socket) -> None:
        enter(sock)
        token = announce(sock)
        another(sock)().sendall((b"\1" + token)[:nbytes])

    return act


@pytest.mark.parametrize("nbytes", [0, 1, 32, 33])
@pytest.mark.parametrize("pair", ["tcp"], indirect=True)
def test_peer_killed_as_its_second_socket_is_made_is_forgotten(
    pair: Pair, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "handshake_timeout", 0.5)  # the first one waits as long
    vanish_after(pair, name_the_lane(nbytes))
    pair.settle()
    assert [item for _, item in pair.far.events if isinstance(item, Frame)] == []


@pytest.mark.parametrize("cut", [1, 64, len(APART_HEAD) - 1, len(APART_HEAD)])
@pytest.mark.parametrize("brought", [0, 1, len(APART) - 1, len(APART)])
@pytest.mark.parametrize("pair", ["tcp"], indirect=True)
def test_peer_killed_at_a_byte_of_its_lane_is_an_end(pair: Pair, cut: int, brought: int) -> None:
    def act(sock: socket.socket) -> None:
        join_plainly(sock)
        sock.sendall(APART_HEAD[:cut])
        lanes[-1].settimeout(0.2 if cut < len(APART_HEAD) else PATIENCE_S)
        with suppress(TimeoutError):  # who reads knows of no payload
            lanes[-1].sendall(APART[:brought])

    vanish_after(pair, act)
    check_end(pair, cut + brought, len(APART_HEAD) + len(APART), APART)


# -- of what it reads ----------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 64, 100_000])
def test_peer_killed_while_it_reads_is_an_end(pair: Pair, cut: int, share: bool) -> None:
    if share and pair.transport.scheme == "tcp":
        pytest.skip("no memory to share")
    go, told = os.pipe()

    def act(sock: socket.socket) -> None:
        memory = join_in_memory(sock) if share else join_plainly(sock)
        os.read(go, 1)
        if memory is not None:
            memory[CONSUMED + 128 : CONSUMED + 136] = struct.pack("<Q", cut)
        elif cut:
            sock.recv(cut, socket.MSG_WAITALL)
            for lane in lanes:
                lane.recv(cut, socket.MSG_WAITALL)

    def speak(connection: Any, identity: Any) -> None:
        pair.far.connections.append(connection)
        for _ in range(3):
            connection.send(message(np.ones(10_000_000, np.uint8)))
        connection.send(message("x" * 900_000))  # more than a ring holds
        os.write(told, b"!")

    pair.listener._on_connection = speak  # type: ignore[attr-defined]
    vanish_after(pair, act)
    os.close(go)
    os.close(told)
    pair.until(lambda: bool(pair.far.ends()))
    assert len(pair.far.ends()) == 1
    assert pair.far.connections[1].closed
    assert pair.far.connections[1].flushed()
