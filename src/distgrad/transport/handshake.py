"""Carrying a handshake over a stream socket, before it is a connection.

Each message is a 16-bit little-endian length and that many bytes, at most
`MAX_HANDSHAKE_BYTES`. Neither side ever reads past the message it is in, so whatever
follows the handshake in the stream belongs to the connection. A message of no bytes is the
accepting side's refusal: an end without it means that the process has gone.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from distgrad.errors import AuthenticationError, TransportError
from distgrad.transport._poller import Poller
from distgrad.transport.base import MAX_HANDSHAKE_BYTES, Handshake, NoAnswer
from distgrad.transport.patience import Patience

__all__ = ["HalfOpen", "LastStep", "authenticate"]

_LENGTH_BYTES = 2
_REFUSAL = bytes(_LENGTH_BYTES)


def _packed(message: bytes) -> bytes:
    if not 0 < len(message) <= MAX_HANDSHAKE_BYTES:
        raise AuthenticationError(
            f"cannot send a handshake message of {len(message)} bytes: "
            f"the length must be 1-{MAX_HANDSHAKE_BYTES}"
        )
    return len(message).to_bytes(_LENGTH_BYTES, "little") + message


class _Reader:
    """Puts one message at a time together from what the socket gives."""

    def __init__(self) -> None:
        self._data = bytearray()

    def wants(self) -> int:
        """How many bytes may be read now without reading past the message."""
        if len(self._data) < _LENGTH_BYTES:
            return _LENGTH_BYTES - len(self._data)
        length = int.from_bytes(self._data[:_LENGTH_BYTES], "little")
        if length > MAX_HANDSHAKE_BYTES:
            raise AuthenticationError("cannot authenticate the peer: it does not speak distgrad")
        return _LENGTH_BYTES + length - len(self._data)

    def add(self, data: bytes) -> bytes | None:
        """Take what was read; return the message once it is complete."""
        self._data += data
        if len(self._data) < _LENGTH_BYTES or self.wants():
            return None
        message = bytes(self._data[_LENGTH_BYTES:])
        self._data.clear()
        return message


class LastStep(Protocol):
    """What the accepting side does on a socket once the peer is known: `shm`, `lanes`."""

    def send(self, sock: socket.socket) -> bool:
        """Say what there is to say; return whether an answer will come."""

    def take_answer(self, sock: socket.socket) -> bool:
        """Read the answer; return False if it is not there yet."""


class HalfOpen:
    """A connection that a listener accepted and that has not proved who it is.

    Runs in the polling thread. Ends in exactly one way: ``on_finished(identity)``, after
    which the socket belongs to the callee; or ``on_failed(error)``, with the socket
    closed; or silently by `drop`.

    Parameters
    ----------
    sock
        The accepted socket.
    timeout_s
        How long the peer may take for all of it.
    last_step
        What follows the handshake.
    """

    def __init__(
        self,
        sock: socket.socket,
        poller: Poller,
        handshake: Handshake,
        timeout_s: float,
        on_finished: Callable[[Any], None],
        on_failed: Callable[[Exception], None],
        last_step: LastStep,
    ) -> None:
        self._sock = sock
        self._poller = poller
        self._handshake = handshake
        self._reader = _Reader()
        self._on_finished = on_finished
        self._on_failed = on_failed
        self._last_step = last_step
        self._waits = False
        self._patience = Patience(poller, timeout_s, self._expire)
        sock.setblocking(False)
        poller.watch(sock.fileno(), self._on_readable)

    def drop(self) -> None:
        """Close the socket without a word to anybody. Idempotent."""
        self._release()
        self._sock.close()

    def abandon(self) -> None:
        """In the child of a fork: close the copy of the socket, and only that."""
        self._sock.close()

    def _release(self) -> None:
        self._patience.cancel()
        if self._sock.fileno() >= 0:
            self._poller.unwatch(self._sock.fileno())

    def _expire(self) -> None:
        self._fail(AuthenticationError("cannot authenticate the peer: it took too long"))

    def _fail(self, error: Exception) -> None:
        self.drop()
        self._on_failed(error)

    def _on_readable(self) -> None:
        try:
            finished = self._advance()
        except Exception as error:  # whatever a stranger provokes costs the stranger only
            self._fail(error)
            return
        if finished:
            self._release()
            self._on_finished(self._handshake.identity)

    def _advance(self) -> bool:
        if self._waits:
            return self._last_step.take_answer(self._sock)
        if not self._shake_hands():
            return False
        self._waits = self._last_step.send(self._sock)
        return not self._waits

    def _shake_hands(self) -> bool:
        try:
            data = self._sock.recv(self._reader.wants())
        except BlockingIOError:
            return False
        if not data:
            raise TransportError("cannot authenticate the peer: it went away")
        message = self._reader.add(data)
        return message is not None and self._answer(message)

    def _answer(self, message: bytes) -> bool:
        if not message:
            raise AuthenticationError("cannot authenticate the peer: it does not speak distgrad")
        try:
            answer, finished = self._handshake.receive(message)
        except AuthenticationError:
            with suppress(OSError):
                self._sock.send(_REFUSAL, socket.MSG_NOSIGNAL)
            raise
        if answer is not None:
            packed = _packed(answer)
            # A fresh socket takes this much; one that does not has a peer that never reads.
            if self._sock.send(packed, socket.MSG_NOSIGNAL) != len(packed):
                raise AuthenticationError("cannot authenticate the peer: it does not listen")
        return finished


def authenticate(sock: socket.socket, handshake: Handshake, deadline: float, address: str) -> None:
    """Run the connecting side of a handshake to its end; blocks.

    Parameters
    ----------
    deadline
        When to give up, on the clock of `time.monotonic`.

    Raises
    ------
    AuthenticationError
        One side refused the other.
    NoAnswer
        The peer did not answer in time.
    TransportError
        The peer has gone.
    """
    try:
        message = handshake.start()
        finished = False
        while not finished:
            if message is not None:
                _wait_until(sock, deadline)
                sock.sendall(_packed(message))
            message, finished = handshake.receive(_read_message(sock, deadline, address))
        if message is not None:
            sock.sendall(_packed(message))
    except TimeoutError:
        raise NoAnswer(f"cannot connect to {address}: no answer to the handshake in time") from None
    except ConnectionError as error:
        raise TransportError(
            f"cannot connect to {address}: it went away in the handshake ({error})"
        ) from None


def _wait_until(sock: socket.socket, deadline: float) -> None:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    sock.settimeout(remaining)


def _read_message(sock: socket.socket, deadline: float, address: str) -> bytes:
    reader = _Reader()
    while True:
        _wait_until(sock, deadline)
        data = sock.recv(reader.wants())
        if not data:
            raise ConnectionResetError("it closed the connection")
        message = reader.add(data)
        if message == b"":
            raise AuthenticationError(
                f"cannot connect to {address}: refused in the handshake",
                hint="do both sides have the same secret and belong to the same world?",
            )
        if message is not None:
            return message
