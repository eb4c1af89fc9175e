"""Sockets below the contract: odd chunks, bad bytes, descriptors, files, options."""

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad._codec import Frame, decode
from distgrad.config import config
from distgrad.errors import AuthenticationError, ProtocolError, TransportError
from distgrad.testing.transport_pair import Pair, handshakes, message, polling
from distgrad.transport._poller import Poller
from distgrad.transport._stream import StreamConnection
from distgrad.transport.base import Listener, Transport
from distgrad.transport.stream import TcpTransport, UnixTransport

PATIENCE_S = 20.0


def wire(value: Any) -> bytes:
    """The bytes of a message."""
    return b"".join(bytes(part) for part in message(value).parts())


class Raw:
    """A connection whose peer is a bare socket in the hands of the test."""

    def __init__(self) -> None:
        self.socket, mine = socket.socketpair()
        self.socket.settimeout(PATIENCE_S)
        self.poller = Poller()
        self.connection = StreamConnection(
            self.poller, mine.detach(), scheme="unix", peer_address="test", identity=None
        )
        self.events: list[Any] = []

    def poll_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.events
            self.events += [item for _, item in self.poller.poll(0.01, False)]

    def values(self) -> list[Any]:
        return [decode(item) for item in self.events if isinstance(item, Frame)]

    def ended(self) -> bool:
        return any(not isinstance(item, Frame) for item in self.events)

    def close(self) -> None:
        self.poller.close()
        self.socket.close()


@pytest.fixture
def raw() -> Iterator[Raw]:
    raw = Raw()
    yield raw
    raw.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- output


@pytest.mark.parametrize("array", [np.zeros(3_000), np.zeros(2_000_000)], ids=["small", "large"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("transport", [UnixTransport, TcpTransport])
def test_poll_returns_when_all_is_sent_that_somebody_waits_for(
    monkeypatch: pytest.MonkeyPatch,
    transport: Callable[[], Transport],
    shared: bool,
    array: np.ndarray[Any, Any],
) -> None:
    monkeypatch.setattr(config, "shared_memory", shared)
    pair = Pair(transport())
    connection = pair.connect()
    for _ in range(12_000_000 // array.nbytes + 3):
        connection.send(message(array))
    with polling(pair.far):
        while not connection.flushed():
            pair.near.poll(float("inf"))
    pair.close()


# --- input


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.data())
def test_messages_cut_anywhere_arrive_equal(sizes: list[int], data: st.DataObject) -> None:
    values = [
        None,
        "text" * 30,
        np.arange(700.0),
        [np.ones(300, np.float32), "x", np.zeros(1000, np.int64)],
        "meta" * 500,
    ]
    stream = b"".join(map(wire, values))
    raw = Raw()
    try:
        position = 0
        while position < len(stream):
            size = data.draw(st.sampled_from(sizes)) ** 2
            raw.socket.sendall(stream[position : position + size])
            position += size
            raw.events += [item for _, item in raw.poller.poll(0.0, True)]
        raw.poll_until(lambda: len(raw.events) == len(values))
        for sent, received in zip(values, raw.values(), strict=True):
            assert repr(sent) == repr(received)
    finally:
        raw.close()


def test_message_byte_by_byte_arrives_equal(raw: Raw) -> None:
    for byte in wire({"a": [1, 2.0]}) + wire("next"):
        raw.socket.send(bytes([byte]))
        raw.events += [item for _, item in raw.poller.poll(0.0, False)]
    raw.poll_until(lambda: len(raw.events) == 2)
    assert raw.values() == [{"a": [1, 2.0]}, "next"]


def test_end_after_whole_messages_is_orderly(raw: Raw) -> None:
    raw.socket.sendall(wire(1) + wire(2))
    raw.socket.close()
    raw.poll_until(raw.ended)
    assert raw.values() == [1, 2]
    assert raw.events[2:] == [None]
    assert raw.connection.closed


@pytest.mark.parametrize("cut", [1, 63, 64, 70, -1])
def test_end_inside_a_message_is_an_error_after_the_whole_ones(raw: Raw, cut: int) -> None:
    raw.socket.sendall(wire(1) + wire(np.ones(5000))[:cut])
    raw.socket.close()
    raw.poll_until(raw.ended)
    assert raw.values() == [1]
    assert isinstance(raw.events[1], TransportError)
    assert "in the middle of a message" in str(raw.events[1])
    assert len(raw.events) == 2


@pytest.mark.parametrize("position", [0, 1, 3, 5, 20, 46, 56, 60, 64, 70])
def test_message_with_a_changed_byte_ends_the_connection(raw: Raw, position: int) -> None:
    changed = bytearray(wire("some text that is long enough"))
    changed[position] ^= 0x55
    raw.socket.sendall(wire(1) + bytes(changed) + wire(2))
    raw.socket.shutdown(socket.SHUT_WR)  # for a length that grew: nothing more comes
    raw.poll_until(raw.ended)
    assert raw.values() == [1]  # never resynchronises
    assert isinstance(raw.events[1], (ProtocolError, TransportError))
    assert raw.connection.closed
    with pytest.raises(TransportError, match="cannot send"):
        raw.connection.send(message(1))


def test_message_announced_larger_than_the_limit_is_refused_unread(raw: Raw) -> None:
    changed = bytearray(wire("x"))
    changed[4:8] = (2**32 - 1).to_bytes(4, "little")
    raw.socket.sendall(bytes(changed))
    raw.poll_until(raw.ended)
    assert isinstance(raw.events[0], ProtocolError)


def test_bad_bytes_on_one_connection_leave_the_others_alone(raw: Raw) -> None:
    other, mine = socket.socketpair()
    with other:
        second = StreamConnection(
            raw.poller, mine.detach(), scheme="unix", peer_address="other", identity=None
        )
        raw.socket.sendall(os.urandom(1000))
        other.sendall(wire("fine"))
        raw.poll_until(lambda: len(raw.events) == 2)
        assert raw.values() == ["fine"]
        assert not second.closed
        assert second.send(message("still"))


# --- output


def test_queue_is_sent_by_polling_as_the_peer_reads(raw: Raw) -> None:
    array = np.arange(1_000_000.0)
    assert not raw.connection.send(message(array))
    assert not raw.connection.send(message("after"))
    assert not raw.connection.flushed()
    expected = wire(array) + wire("after")
    received = bytearray()

    def read() -> None:
        while len(received) < len(expected):
            received.extend(raw.socket.recv(1 << 16))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    raw.poll_until(raw.connection.flushed)
    thread.join(PATIENCE_S)
    assert received == expected


def test_queued_array_is_kept_alive(raw: Raw) -> None:
    raw.connection.send(message(np.full(1_000_000, 7.0)))
    noise = [np.zeros(1_000_000) for _ in range(3)]
    thread = threading.Thread(target=lambda: raw.poll_until(raw.connection.flushed))
    thread.start()
    received = bytearray()
    while len(received) < 8_000_000:
        received.extend(raw.socket.recv(1 << 16))
    thread.join(PATIENCE_S)
    assert np.all(np.frombuffer(received[-8_000_000:], np.float64) == 7.0)
    del noise


def test_send_to_a_closed_socket_raises_and_ends_after_the_input(raw: Raw) -> None:
    raw.socket.sendall(wire("last words"))
    raw.socket.close()
    with pytest.raises(TransportError, match="Broken pipe"):
        raw.connection.send(message("hello?"))
    assert raw.connection.closed
    raw.poll_until(raw.ended)
    assert raw.values() == ["last words"]
    assert "Broken pipe" in str(raw.events[1])


def test_queue_that_cannot_be_sent_ends_the_connection(raw: Raw) -> None:
    raw.connection.send(message(np.zeros(1_000_000)))
    raw.socket.close()
    raw.poll_until(raw.ended)
    assert isinstance(raw.events[0], TransportError)
    assert raw.connection.flushed()


# --- descriptors


def test_descriptors_are_closed_with_the_connection() -> None:
    before = descriptors()
    for _ in range(20):
        raw = Raw()
        raw.connection.close()
        raw.poll_until(raw.ended)
        raw.close()
    del raw
    assert descriptors() == before


def test_descriptors_of_a_poller_that_is_closed_are_closed() -> None:
    before = descriptors()
    raw = Raw()
    raw.close()
    assert raw.connection.closed
    del raw
    assert descriptors() == before


def test_descriptors_are_not_passed_to_programs(raw: Raw) -> None:
    listener = UnixTransport().listen(
        raw.poller, handshakes(1, connecting=False), lambda c, i: None, secure=True
    )
    for name in os.listdir("/proc/self/fd"):
        if Path(f"/proc/self/fd/{name}").exists() and int(name) > 2:
            kind = os.readlink(f"/proc/self/fd/{name}")
            if "socket" in kind or "eventpoll" in kind or "eventfd" in kind:
                assert not os.get_inheritable(int(name)), kind
    listener.close()


# --- listening


def test_unix_socket_is_in_a_private_directory_that_is_removed() -> None:
    poller = Poller()
    listener = UnixTransport().listen(
        poller, handshakes(1, connecting=False), lambda c, i: None, secure=False
    )
    directory = Path(listener.address.removeprefix("unix://")).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    listener.close()
    assert not directory.exists()
    poller.close()


def test_unix_listen_on_a_host_raises() -> None:
    poller = Poller()
    with pytest.raises(TransportError, match="this host only"):
        UnixTransport().listen(
            poller,
            handshakes(1, connecting=False),
            lambda c, i: None,
            host="example.org",
            secure=True,
        )
    poller.close()


def test_unix_handshake_knows_the_user_on_both_sides() -> None:
    uids: list[int | None] = []

    class Knowing(UnixTransport):
        def peer_uid(self, sock: socket.socket) -> int | None:
            uids.append(super().peer_uid(sock))
            return uids[-1]

    pair = Pair(Knowing())
    pair.connect()
    pair.close()
    assert uids == [os.getuid()] * 2


def test_tcp_listen_without_secret_raises() -> None:
    poller = Poller()
    for host in (None, "127.0.0.1", "0.0.0.0"):
        with pytest.raises(AuthenticationError, match="there is no secret"):
            TcpTransport().listen(
                poller, handshakes(1, connecting=False), lambda c, i: None, host=host, secure=False
            )
    poller.close()


@pytest.mark.parametrize(
    ("host", "shown"), [(None, "127.0.0.1"), ("0.0.0.0", socket.gethostname()), ("::1", "[::1]")]
)
def test_tcp_listens_where_it_was_told(host: str | None, shown: str) -> None:
    poller = Poller()
    try:
        listener = TcpTransport().listen(
            poller, handshakes(1, connecting=False), lambda c, i: None, host=host, secure=True
        )
    except TransportError:
        pytest.skip(f"this machine cannot listen on {host}")
    assert listener.address.startswith(f"tcp://{shown}:")
    listener.close()
    poller.close()


def test_tcp_listen_on_a_host_that_is_not_here_raises() -> None:
    poller = Poller()
    with pytest.raises(TransportError, match=r"cannot listen on tcp://192\.0\.2\.1"):
        TcpTransport().listen(
            poller,
            handshakes(1, connecting=False),
            lambda c, i: None,
            host="192.0.2.1",
            secure=True,
        )
    poller.close()


@pytest.mark.parametrize(
    ("transport", "address"),
    [
        (UnixTransport(), "unix:///nowhere/s"),
        (UnixTransport(), "unix://" + "x" * 200),
        (TcpTransport(), "tcp://127.0.0.1:1"),
        (TcpTransport(), "tcp://127.0.0.1"),
    ],
)
def test_connect_to_nobody_raises(transport: Transport, address: str) -> None:
    poller = Poller()
    with pytest.raises(TransportError, match="cannot"):
        transport.connect(address, poller, handshakes(2, connecting=True), 5.0)
    poller.close()


@pytest.mark.parametrize("transport", [UnixTransport(), TcpTransport()])
def test_connect_to_somebody_silent_gives_up_in_time(transport: Transport) -> None:
    poller = Poller()
    listener: Listener = transport.listen(
        poller, handshakes(1, connecting=False), lambda c, i: None, secure=True
    )
    start = time.monotonic()
    with pytest.raises(TransportError, match="in time"):
        transport.connect(listener.address, poller, handshakes(2, connecting=True), 0.1)
    assert time.monotonic() - start < 2.0
    listener.close()
    poller.close()


def test_tcp_connection_sends_small_messages_at_once() -> None:
    pair = Pair(TcpTransport())
    options: list[int] = []

    class Looking(TcpTransport):
        def adopt(self, sock: socket.socket, *args: Any, **more: Any) -> StreamConnection:
            options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            options.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            return super().adopt(sock, *args, **more)

    pair.transport = Looking()
    pair.connect()
    pair.close()
    assert all(options)
    assert len(options) == 2
