"""From a Unix socket to shared memory: offered after the handshake, and taken if it works.

The accepting side sends an offer of 33 bytes: whether there is one (0 or 1), and a nonce;
with it goes the descriptor of a memory file that has the nonce at its start. The connecting
side maps the file, compares, copies the nonce to the next place in the file and answers with
one byte: whether it did. Without an offer there is no answer. If anything fails on the
way, both go on with the plain socket.

What is in the file, and what else travels, stands in ``docs/transports.md``.
"""

from __future__ import annotations

import os
import secrets
import socket
import time

from distgrad.config import config
from distgrad.errors import TransportError
from distgrad.transport._arena import memory_file
from distgrad.transport._ring import NOTE_NBYTES, RING_FILE_NBYTES, Ring
from distgrad.transport.base import NoAnswer

__all__ = ["Offer", "answer_offer"]

_NO, _YES = b"\0", b"\1"


class Offer:
    """The accepting side of the switch, on an authenticated socket."""

    def __init__(self) -> None:
        #: The rings, once the peer has agreed; None for the plain socket.
        self.ring: Ring | None = None
        self._offered: Ring | None = None
        self._nonce = secrets.token_bytes(NOTE_NBYTES)

    def send(self, sock: socket.socket) -> bool:
        """Make the offer; return whether there will be an answer."""
        if config.shared_memory:
            try:
                self._send_file(sock)
            except OSError:  # no memory file, no descriptor, not allowed
                self._offered = None
        if self._offered is None:
            sock.send(_NO + bytes(NOTE_NBYTES), socket.MSG_NOSIGNAL)
        return self._offered is not None

    def _send_file(self, sock: socket.socket) -> None:
        fd = memory_file("distgrad-ring", RING_FILE_NBYTES)
        try:
            ring = Ring(fd, 0)
            ring.leave_note(0, self._nonce)
            socket.send_fds(sock, [_YES + self._nonce], [fd], socket.MSG_NOSIGNAL)
        finally:
            os.close(fd)
        self._offered = ring

    def take_answer(self, sock: socket.socket) -> bool:
        """Read the answer; return False if it is not there yet.

        Raises
        ------
        TransportError
            The peer has gone, or agrees without having been in the same memory.
        """
        try:
            answer = sock.recv(1)
        except BlockingIOError:
            return False
        if answer not in (_NO, _YES):
            raise TransportError("cannot agree with the peer on shared memory: no answer")
        if answer == _YES:
            if self._offered is None or self._offered.read_note(1) != self._nonce:
                raise TransportError("cannot agree with the peer on shared memory: wrong nonce")
            self.ring = self._offered
        return True


def answer_offer(sock: socket.socket, deadline: float, address: str) -> Ring | None:
    """Take the offer that follows the handshake, on the connecting side; blocks.

    Parameters
    ----------
    deadline
        When to give up, on the clock of `time.monotonic`.

    Raises
    ------
    TransportError
        The peer has gone, or its offer did not come in time.
    """
    try:
        message, fds = _receive_offer(sock, deadline)
    except TimeoutError:
        raise NoAnswer(f"cannot connect to {address}: no offer in time") from None
    except ConnectionError as error:
        raise TransportError(
            f"cannot connect to {address}: it went away after the handshake ({error})"
        ) from None
    try:
        if message[:1] == _NO:
            return None
        ring = _join(fds, message[1:])
    finally:
        for fd in fds:
            os.close(fd)
    sock.sendall(_NO if ring is None else _YES)
    return ring


def _join(fds: list[int], nonce: bytes) -> Ring | None:
    """Map the file of an offer; None if that is not possible, or not wanted."""
    if not config.shared_memory or len(fds) != 1:
        return None
    try:
        ring = Ring(fds[0], 1)
    except OSError:
        return None
    if ring.read_note(0) != nonce:
        return None
    ring.leave_note(1, nonce)
    return ring


def _receive_offer(sock: socket.socket, deadline: float) -> tuple[bytes, list[int]]:
    message = b""
    fds: list[int] = []
    try:
        while len(message) < 1 + NOTE_NBYTES:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            data, passed, _, _ = socket.recv_fds(sock, 1 + NOTE_NBYTES - len(message), 1)
            fds += passed
            if not data:
                raise ConnectionResetError("it closed the connection")
            message += data
            if time.monotonic() > deadline:
                raise TimeoutError
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds
