"""Strangers at a listener, and garbage from a peer: nobody else notices (T3, T6)."""

import gc
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distgrad._codec import Frame, decode
from distgrad.config import config
from distgrad.errors import AuthenticationError, TransportError
from distgrad.rpc.auth import HmacHandshake
from distgrad.testing.transport_pair import Pair, handshakes, message, polling
from distgrad.transport.base import Handshake
from distgrad.transport.handshake import authenticate
from distgrad.transport.lanes import announce
from distgrad.transport.lanes import join as enter_lane
from distgrad.transport.stream import TcpTransport, UnixTransport

PATIENCE_S = 20.0
lanes: list[socket.socket] = []
SECRET = b"the secret of this world"


@pytest.fixture(params=[UnixTransport, TcpTransport])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A listener with one authenticated connection, on the real handshake."""
    pair = Pair(request.param())
    pair.listener.close()
    pair.listener = pair.transport.listen(
        pair.far.poller, hmac_handshakes(1, connecting=False), pair._accept, secure=True
    )
    try:
        join(pair)
        yield pair
        while lanes:
            lanes.pop().close()
        pair.near.connection.send(message("undisturbed"))
        pair.until(lambda: pair.far.values()[-1:] == ["undisturbed"])
    finally:
        pair.close()


def hmac_handshakes(
    number: int, *, connecting: bool, secret: bytes = SECRET
) -> Callable[[int | None], Handshake]:
    return lambda uid: HmacHandshake(
        secret, connecting=connecting, identity=(number, 1), peer_uid=uid, world="faults"
    )


def join(pair: Pair, number: int = 2, secret: bytes = SECRET) -> None:
    """Connect as a worker that knows ``secret``."""
    wanted = len(pair.far.connections) + 1
    with polling(pair.far):
        connection = pair.transport.connect(
            pair.listener.address,
            pair.near.poller,
            hmac_handshakes(number, connecting=True, secret=secret),
            PATIENCE_S,
        )
    pair.near.connections.append(connection)
    pair.until(lambda: len(pair.far.connections) == wanted)


def stranger(pair: Pair) -> socket.socket:
    """Connect a bare socket to the listener."""
    location = pair.listener.address.partition("://")[2]
    if pair.transport.scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(location)
    else:
        host, _, port = location.rpartition(":")
        sock = socket.create_connection((host, int(port)))
    sock.settimeout(PATIENCE_S)
    return sock


def authenticated(pair: Pair) -> socket.socket:
    """Connect a bare socket as worker 7, handshake done."""
    deadline = time.monotonic() + PATIENCE_S

    def introduced() -> socket.socket:
        sock = stranger(pair)
        authenticate(sock, hmac_handshakes(7, connecting=True)(None), deadline, "test")
        return sock

    with polling(pair.far):
        sock = introduced()
        if pair.transport.scheme == "unix":  # declines to share memory
            assert len(sock.recv(33, socket.MSG_WAITALL)) == 33
            sock.sendall(b"\0")
        else:
            lanes.append(enter_lane(announce(sock), deadline, "test", introduced))
    pair.until(lambda: len(pair.far.connections) == 2)
    return sock


def until_dropped(pair: Pair, sock: socket.socket, data: bytes = b"") -> bytes:
    """Send ``data``, poll until the listener has closed the socket; return its answers."""
    deadline = time.monotonic() + PATIENCE_S
    sock.setblocking(False)
    answers, rest = bytearray(), memoryview(data)
    while time.monotonic() < deadline:
        pair.far.poll(0.001)
        try:
            if rest:
                rest = rest[sock.send(rest, socket.MSG_NOSIGNAL) :]
            received = sock.recv(4096)
        except BlockingIOError:
            continue
        except ConnectionError:
            received = b""
        if not received:
            sock.close()
            return bytes(answers)
        answers += received
    raise AssertionError("the listener keeps the stranger")


def packed(data: bytes) -> bytes:
    return len(data).to_bytes(2, "little") + data


@pytest.mark.parametrize("seed", range(5))
def test_stranger_with_random_bytes_is_dropped(pair: Pair, seed: int) -> None:
    with stranger(pair) as sock:
        assert until_dropped(pair, sock, random.Random(seed).randbytes(1 << 20)) == b""
    assert len(pair.far.connections) == 1


@pytest.mark.parametrize("length", [0, 513, 65535])
def test_stranger_with_a_length_out_of_range_is_dropped_at_once(pair: Pair, length: int) -> None:
    with stranger(pair) as sock:
        start = time.monotonic()
        assert until_dropped(pair, sock, length.to_bytes(2, "little")) == b""
        assert time.monotonic() - start < config.handshake_timeout / 2


def test_stranger_with_another_secret_learns_nothing(pair: Pair) -> None:
    with pytest.raises(AuthenticationError, match="refused in the handshake"):
        join(pair, 3, b"guess")
    assert len(pair.far.connections) == 1


def test_listener_that_dies_in_the_handshake_has_not_refused_it() -> None:
    near, far = socket.socketpair()
    far.close()
    handshake = HmacHandshake(
        SECRET, connecting=True, identity=(5, 1), peer_uid=None, world="faults"
    )
    with near, pytest.raises(TransportError, match="it went away in the handshake"):
        authenticate(near, handshake, time.monotonic() + PATIENCE_S, "there")


def test_stranger_who_replays_an_overheard_handshake_is_dropped(pair: Pair) -> None:
    own = HmacHandshake(SECRET, connecting=True, identity=(5, 1), peer_uid=None, world="faults")
    hello = own.start() or b""
    with stranger(pair) as sock:
        sock.sendall(packed(hello))
        answer = bytearray()
        sock.setblocking(False)
        while len(answer) < 2 + len(hello):
            pair.far.poll(0.001)
            try:
                answer += sock.recv(4096)
            except BlockingIOError:
                continue
        proof, _ = own.receive(bytes(answer[2:]))
    with stranger(pair) as sock:  # the same words again meet another nonce
        until_dropped(pair, sock, packed(hello) + packed(proof or b""))
    assert len(pair.far.connections) == 1


def test_stranger_who_echoes_is_dropped(pair: Pair) -> None:
    with stranger(pair) as sock:
        hello = HmacHandshake(
            SECRET, connecting=True, identity=(5, 1), peer_uid=None, world="faults"
        ).start()
        sock.sendall(packed(hello or b""))
        sock.setblocking(False)
        answer = b""
        while not answer:
            pair.far.poll(0.001)
            try:
                answer = sock.recv(4096)
            except BlockingIOError:
                continue
        until_dropped(pair, sock, answer)
    assert len(pair.far.connections) == 1


def test_stranger_who_is_silent_is_dropped_in_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "handshake_timeout", 0.1)
    with stranger(pair) as sock:
        start = time.monotonic()
        until_dropped(pair, sock)
        assert 0.08 < time.monotonic() - start < 2.0


def test_stranger_who_drips_bytes_is_dropped_in_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "handshake_timeout", 0.2)
    with stranger(pair) as sock:
        start = time.monotonic()
        gone = False
        sock.sendall((500).to_bytes(2, "little"))
        while not gone and time.monotonic() - start < PATIENCE_S:
            pair.far.poll(0.01)
            try:
                sock.send(b"x", socket.MSG_NOSIGNAL)
            except ConnectionError:
                gone = True
        assert gone
        assert time.monotonic() - start < 2.0


def test_strangers_in_number_do_not_keep_a_worker_out(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "handshake_timeout", 0.2)
    monkeypatch.setattr(config, "max_half_open", 4)
    strangers = [stranger(pair) for _ in range(8)]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        pair.far.poll(0.001)
    assert len(os.listdir("/proc/self/fd")) == before + 4
    join(pair, 3)
    assert len(pair.far.connections) == 2
    for sock in strangers:
        sock.close()


def test_stranger_who_goes_away_is_forgotten(pair: Pair) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        stranger(pair).close()
    join(pair, 3)
    pair.settle()
    sockets = 2 if pair.transport.scheme == "unix" else 4  # TCP has a lane beside it
    assert len(os.listdir("/proc/self/fd")) == before + sockets


def test_stranger_half_open_is_dropped_when_the_listener_closes(pair: Pair) -> None:
    with stranger(pair) as sock:
        pair.settle()
        pair.listener.close()
        assert sock.recv(1) == b""


def test_listener_without_descriptors_recovers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distgrad.transport.listener._NO_DESCRIPTOR_PAUSE_S", 0.05)
    real, failures = socket.socket.accept, [1, 1]

    def failing(self: socket.socket) -> Any:
        if failures:
            failures.pop()
            raise OSError(24, "Too many open files")
        return real(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    join(pair, 3)
    assert not failures
    assert "no file descriptor left" in caplog.text


def test_strangers_are_logged_without_their_bytes(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), stranger(pair) as sock:
        until_dropped(pair, sock, packed(b"\x1b[31mfake log line\n"))
    assert "refused a connection" in caplog.text
    assert "fake" not in caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_peer_with_random_bytes_ends_its_own_connection_only(pair: Pair, seed: int) -> None:
    """The handshake passes; what follows is not a message."""
    sock = authenticated(pair)
    until_dropped(pair, sock, random.Random(seed).randbytes(1 << 20))
    pair.until(lambda: bool(pair.far.ends()))
    pair.settle()
    [(connection, error)] = pair.far.events
    assert connection.identity == (7, 1)
    assert isinstance(error, Exception)


def test_peer_whose_messages_are_good_until_they_are_not(pair: Pair) -> None:
    sock = authenticated(pair)
    good = b"".join(bytes(part) for part in message("good").parts())
    until_dropped(pair, sock, good * 3 + b"\xff" * 200 + good)
    items = [item for _, item in pair.far.events]
    assert [decode(item) for item in items if isinstance(item, Frame)] == ["good"] * 3
    assert isinstance(items[3], Exception)
    assert len(items) == 4


def test_worker_of_another_protocol_is_told_nothing() -> None:
    """Even the accepting side's hello waits for a hello that makes sense."""
    pair = Pair(TcpTransport())
    with stranger(pair) as sock:
        assert until_dropped(pair, sock, b"GET / HTTP/1.1\r\n\r\n") == b""
    with pytest.raises((AuthenticationError, TransportError)), polling(pair.far):
        pair.transport.connect(
            pair.listener.address, pair.near.poller, hmac_handshakes(2, connecting=True), 5.0
        )
    assert handshakes(1, connecting=True)(None).start() is not None
    pair.close()
