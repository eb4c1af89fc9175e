"""Two sockets a connection over TCP: one for messages, a lane for large payloads.

After its handshake the connecting side says what a socket is for, in 33 bytes: 0 and a random
token for a connection, or 1 and the token of the connection that it is the lane of. The lane has
proved in a handshake of its own who it comes from, and only the same peer may add one. The
accepting side makes the connection when it has both sockets, and says so with one byte on the lane:
1, or 0 where it refuses it.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from distgrad.config import config
from distgrad.errors import AuthenticationError, TransportError
from distgrad.transport._poller import Poller
from distgrad.transport.base import NoAnswer
from distgrad.transport.patience import Patience

__all__ = ["Pairing", "Purpose", "announce", "join"]

_TOKEN_NBYTES = 32
_FIRST, _LANE = b"\0", b"\1"
_REFUSED, _JOINED = b"\0", b"\1"
_MOST_EACH = (
    4  # first sockets of one peer that wait; an honest one connects once, and again in need
)


class Purpose:
    """What an accepted socket is for; reads it once the peer is known."""

    def __init__(self) -> None:
        self._message = b""

    def send(self, sock: socket.socket) -> bool:
        """Return True: there is nothing to say, and an answer will come."""
        return True

    def take_answer(self, sock: socket.socket) -> bool:
        """Read what the socket is for; return False if not all of it is there yet.

        Raises
        ------
        TransportError
            The peer has gone, or means something else.
        """
        try:
            data = sock.recv(1 + _TOKEN_NBYTES - len(self._message))
        except BlockingIOError:
            return False
        if not data:
            raise TransportError("cannot tell what a socket is for: the peer went away")
        self._message += data
        if self._message[:1] not in (_FIRST, _LANE):
            raise TransportError("cannot tell what a socket is for: it begins with another byte")
        return len(self._message) == 1 + _TOKEN_NBYTES

    @property
    def is_lane(self) -> bool:
        """Whether it is a lane; otherwise the first socket of a connection."""
        return self._message[:1] == _LANE

    @property
    def token(self) -> bytes:
        """What the two sockets of a connection have in common."""
        return self._message[1:]


class Pairing:
    """First sockets that wait for their lanes, on the accepting side.

    Their peers are known. Each waits as long as a handshake may take, and of one peer only the
    latest few.
    """

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._waiting: dict[bytes, tuple[socket.socket, Any, Any]] = {}
        self._closed = False

    def add(self, sock: socket.socket, identity: Any, token: bytes) -> None:
        """Keep a first socket; takes it over."""
        if self._closed or token in self._waiting:  # an honest peer has a token of its own
            sock.close()
            return
        of_peer = [token for token, (_, who, _) in self._waiting.items() if who == identity]
        if len(of_peer) >= _MOST_EACH:
            self._drop(of_peer[0])
        patience = Patience(self._poller, config.handshake_timeout, lambda: self._drop(token))
        self._waiting[token] = sock, identity, patience

    def take(self, lane: socket.socket, identity: Any, token: bytes) -> socket.socket:
        """Return the first socket of a lane, and tell the peer that both are here.

        Raises
        ------
        AuthenticationError
            This peer has no such connection.
        OSError
            The peer has gone; the first socket is closed.
        """
        if token not in self._waiting or self._waiting[token][1] != identity:
            lane.send(_REFUSED, socket.MSG_NOSIGNAL)
            raise AuthenticationError("cannot join a lane to a connection that the peer has not")
        sock, _, patience = self._waiting.pop(token)
        patience.cancel()
        try:
            lane.send(_JOINED, socket.MSG_NOSIGNAL)
        except OSError:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Close all of them, and those that come later; idempotent, any thread."""
        self._closed = True
        for token in list(self._waiting):
            self._drop(token)

    def _drop(self, token: bytes) -> None:
        if waiting := self._waiting.pop(token, None):  # unless its lane came just now
            sock, _, patience = waiting
            patience.cancel()
            sock.close()


def announce(sock: socket.socket) -> bytes:
    """Say on a first socket that it is one; return its token."""
    token = secrets.token_bytes(_TOKEN_NBYTES)
    sock.sendall(_FIRST + token)
    return token


def join(
    token: bytes, deadline: float, address: str, open_socket: Callable[[], socket.socket]
) -> socket.socket:
    """Return a socket that is the lane of the connection with this token; blocks.

    Parameters
    ----------
    deadline
        When to give up, on the clock of `time.monotonic`.
    open_socket
        Connects, and finishes the handshake.

    Raises
    ------
    AuthenticationError
        The peer refused it.
    TransportError
        It has gone, or did not answer in time.
    """
    sock = open_socket()
    try:
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        sock.sendall(_LANE + token)
        answer = sock.recv(1)
        if not answer:
            raise ConnectionResetError("it closed the connection")
        if answer != _JOINED:
            raise AuthenticationError(f"cannot connect to {address}: its second socket was refused")
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise NoAnswer(f"cannot connect to {address}: no answer in time") from None
        if isinstance(error, ConnectionError):
            raise TransportError(
                f"cannot connect to {address}: it went away with its second socket ({error})"
            ) from None
        raise
    return sock
