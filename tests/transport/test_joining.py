"""How the two sockets of a TCP connection find each other: strangers, and peers that go away."""

import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from distgrad.config import config
from distgrad.errors import AuthenticationError, TransportError
from distgrad.testing.transport_pair import (
    Countersign,
    Pair,
    expect,
    handshakes,
    polling,
    unraisable,
)
from distgrad.transport._poller import Poller
from distgrad.transport.base import Transport
from distgrad.transport.handshake import authenticate
from distgrad.transport.lanes import Pairing, announce, join
from distgrad.transport.stream import TcpTransport, UnixTransport

PATIENCE_S = 20.0


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(TcpTransport())
    pair.connect()
    yield pair
    pair.close()


def first_socket(pair: Pair, number: int) -> socket.socket:
    """Connect and authenticate by hand."""
    host, port = pair.listener.address.removeprefix("tcp://").split(":")
    sock = socket.create_connection((host, int(port)), PATIENCE_S)
    handshake = handshakes(number, connecting=True)(None)
    authenticate(sock, handshake, time.monotonic() + PATIENCE_S, "there")
    return sock


def test_lane_of_another_peer_is_refused(pair: Pair) -> None:
    until = time.monotonic() + PATIENCE_S
    with ExitStack() as kept:
        with polling(pair.far):
            token = announce(kept.enter_context(first_socket(pair, 3)))
            with expect(AuthenticationError):
                join(token, until, "there", lambda: first_socket(pair, 4))
            with expect(AuthenticationError):
                join(bytes(32), until, "there", lambda: first_socket(pair, 3))
            kept.enter_context(join(token, until, "there", lambda: first_socket(pair, 3)))
        pair.until(lambda: len(pair.far.connections) == 2)
    assert pair.far.connections[1].identity == 3


def test_refusal_of_the_second_socket_is_one_of_the_peer(pair: Pair) -> None:
    pair.listener._pairing.close()  # type: ignore[attr-defined]  # knows of no first socket
    with (
        polling(pair.far),
        pytest.raises(AuthenticationError, match=r"^cannot connect to \S*: its second socket"),
    ):
        pair.transport.connect(
            pair.listener.address, pair.near.poller, handshakes(3, connecting=True), PATIENCE_S
        )


def test_first_socket_whose_lane_never_comes_is_dropped(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "handshake_timeout", 0.2)
    with polling(pair.far), first_socket(pair, 3) as sock:
        announce(sock)
        sock.settimeout(PATIENCE_S)
        assert sock.recv(1) == b""
    assert len(pair.far.connections) == 1


def test_token_cannot_be_used_by_two_connections_at_once(pair: Pair) -> None:
    token = bytes(31) + b"\7"
    with (
        unraisable() as raised,
        polling(pair.far),
        first_socket(pair, 3) as sock,
        first_socket(pair, 4) as other,
    ):
        sock.sendall(b"\0" + token)
        other.sendall(b"\0" + token)
        other.settimeout(PATIENCE_S)
        sock.settimeout(PATIENCE_S)
        with selectors.DefaultSelector() as selector:  # either may be the second
            selector.register(sock, selectors.EVENT_READ)
            selector.register(other, selectors.EVENT_READ)
            [(key, _)] = selector.select(PATIENCE_S)
        assert key.fileobj.recv(1) == b""
        number = 4 if key.fileobj is sock else 3
        deadline = time.monotonic() + PATIENCE_S
        with join(token, deadline, "there", lambda: first_socket(pair, number)) as lane:
            assert lane.fileno() >= 0
    assert raised == []


def test_socket_for_something_unknown_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "handshake_timeout", 10 * PATIENCE_S)
    with polling(pair.far), first_socket(pair, 3) as sock:
        sock.sendall(b"\2" + bytes(32))
        sock.settimeout(PATIENCE_S)
        assert sock.recv(1) == b""


def test_first_sockets_of_one_peer_are_few_and_others_have_theirs() -> None:
    poller = Poller()
    pairing = Pairing(poller)
    pairs = [socket.socketpair() for _ in range(100)]
    pairing.add(pairs[0][0], 2, bytes(32))
    for number, (first, _) in enumerate(pairs[1:], start=1):
        pairing.add(first, 3, bytes([number]) * 32)
    waiting = [number for number, (first, _) in enumerate(pairs) if first.fileno() >= 0]
    assert waiting == [0, 96, 97, 98, 99]
    lane, other = socket.socketpair()
    assert pairing.take(lane, 3, bytes([99]) * 32) is pairs[99][0]
    assert other.recv(1) == b"\1"
    pairing.close()
    poller.close()
    for sock in (lane, other, *(sock for pair in pairs for sock in pair)):
        sock.close()


def test_first_socket_is_closed_where_its_lane_breaks() -> None:
    poller = Poller()
    pairing = Pairing(poller)
    (first, one), (lane, other) = socket.socketpair(), socket.socketpair()
    other.close()
    pairing.add(first, 3, bytes(32))
    with expect(OSError):
        pairing.take(lane, 3, bytes(32))
    assert first.fileno() == -1
    one.close()
    lane.close()
    poller.close()


def test_first_socket_that_comes_when_the_listener_closes_is_closed() -> None:
    poller = Poller()
    pairing = Pairing(poller)
    first, one = socket.socketpair()
    pairing.close()
    pairing.add(first, 3, bytes(32))
    assert first.fileno() == -1
    one.close()
    poller.close()


@pytest.mark.parametrize("transport", [TcpTransport(), UnixTransport()])
def test_peer_that_goes_away_after_the_handshake_is_a_transport_error(
    transport: Transport, tmp_path: Path
) -> None:
    gone = threading.Event()
    if transport.scheme == "tcp":
        server = socket.create_server(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(tmp_path / "s"))
        server.listen()
        address = f"unix://{tmp_path}/s"

    def answer_and_go() -> None:
        sock, _ = server.accept()
        sock.recv(100)
        sock.sendall(b"\x08\0friend 1" + (b"\1" + bytes(32) if transport.scheme == "unix" else b""))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        gone.set()

    class Slow(Countersign):
        def receive(self, message: bytes) -> tuple[bytes | None, bool]:
            gone.wait(PATIENCE_S)
            return super().receive(message)

    poller = Poller()
    peer = threading.Thread(target=answer_and_go)
    peer.start()
    with pytest.raises(TransportError, match=f"cannot connect to {address}: "):
        transport.connect(address, poller, lambda uid: Slow(2, "friend", True), PATIENCE_S)
    peer.join(PATIENCE_S)
    poller.close()
    server.close()
