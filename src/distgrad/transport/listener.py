"""Accepting sockets: from a stranger to a connection.

What a stranger may do meanwhile is bounded: see `handshake`, and `shm` for what follows it
on a Unix socket.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distgrad.config import config
from distgrad.errors import AuthenticationError
from distgrad.transport._poller import Poller
from distgrad.transport._ring import Ring
from distgrad.transport.base import Connection, Handshake, HandshakeFactory, Listener
from distgrad.transport.handshake import HalfOpen
from distgrad.transport.lanes import Pairing, Purpose
from distgrad.transport.shm import Offer

if TYPE_CHECKING:
    from distgrad.transport.stream import StreamTransport

__all__ = ["BACKLOG", "StreamListener"]

_log = logging.getLogger("distgrad.transport")

#: Connections that wait in the kernel's queue.
BACKLOG = 1024
#: How long a listener pauses when the process has no file descriptor left.
_NO_DESCRIPTOR_PAUSE_S = 0.5
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

# Listeners of this process, only for the child of a fork: it must not keep them open.
_listeners: weakref.WeakSet[StreamListener] = weakref.WeakSet()


class StreamListener(Listener):
    """Accepts sockets, and makes connections of those whose peers prove who they are.

    Everything but `close` runs in the polling thread; `_lock` keeps the two apart. It is
    not held while the layer above is called.
    """

    def __init__(
        self,
        transport: StreamTransport,
        host: str | None,
        poller: Poller,
        new_handshake: HandshakeFactory,
        on_connection: Callable[[Connection, Any], None],
    ) -> None:
        self._transport = transport
        self._poller = poller
        self._new_handshake = new_handshake
        self._on_connection = on_connection
        self._lock = threading.RLock()
        self._half_open: set[HalfOpen] = set()
        self._pairing = Pairing(poller)
        self._accepting = False
        self._closed = False
        self._sock, self.address, remove = transport.bind(host)
        self._remove = weakref.finalize(self, _remove_in, os.getpid(), remove)
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)
        _listeners.add(self)
        self._update()

    def close(self) -> None:
        """See `Listener.close`."""
        with self._lock:
            self._closed = True
            self._update()
            for half_open in self._half_open:
                half_open.drop()
            self._half_open.clear()
            self._pairing.close()
            self._sock.close()
        self._remove()

    def abandon(self) -> None:
        """In the child of a fork: close the copies of the descriptors, and only them."""
        self._closed = True
        self._remove.detach()
        self._sock.close()
        self._pairing.close()
        for half_open in self._half_open:
            half_open.abandon()

    def _update(self) -> None:
        """Accept only while there is room for a half-open connection.

        The others wait in the kernel's queue: strangers cannot push a peer out.
        """
        with self._lock:
            accepting = not self._closed and len(self._half_open) < config.max_half_open
            if accepting and not self._accepting:
                self._poller.watch(self._sock.fileno(), self._accept)
            if self._accepting and not accepting:
                self._poller.unwatch(self._sock.fileno())
            self._accepting = accepting

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._pause()
            return  # otherwise: the peer has gone already
        try:
            with self._lock:
                self._begin(sock)
        except Exception as error:
            sock.close()
            _log.warning("%s: dropped a connection: %s", self.address, error)
        self._update()

    def _pause(self) -> None:
        _log.warning("%s: no file descriptor left, accepting nothing for a moment", self.address)
        with self._lock:
            self._poller.unwatch(self._sock.fileno())
            self._accepting = False
        self._poller.call_later(_NO_DESCRIPTOR_PAUSE_S, self._update)

    def _begin(self, sock: socket.socket) -> None:
        if self._closed:
            sock.close()
            return
        self._transport.prepare(sock)
        handshake: Handshake = self._new_handshake(self._transport.peer_uid(sock))

        last_step = Offer() if self._transport.local else Purpose()

        def finished(identity: Any) -> None:
            self._forget(half_open)
            self._welcome(sock, identity, last_step)

        def failed(error: Exception) -> None:
            self._forget(half_open)
            # A peer that went away has done no wrong.
            level = logging.WARNING if isinstance(error, AuthenticationError) else logging.DEBUG
            _log.log(level, "%s: refused a connection: %s", self.address, error)

        half_open = HalfOpen(
            sock, self._poller, handshake, config.handshake_timeout, finished, failed, last_step
        )
        self._half_open.add(half_open)

    def _forget(self, half_open: HalfOpen) -> None:
        with self._lock:
            self._half_open.discard(half_open)
        self._update()

    def _welcome(self, sock: socket.socket, identity: Any, last_step: Offer | Purpose) -> None:
        if isinstance(last_step, Offer):
            self._introduce(sock, None, identity, last_step.ring)
        elif not last_step.is_lane:
            self._pairing.add(sock, identity, last_step.token)
        else:
            try:
                first = self._pairing.take(sock, identity, last_step.token)
            except (AuthenticationError, OSError) as error:
                sock.close()
                _log.warning("%s: refused a socket: %s", self.address, error)
                return
            self._introduce(first, sock, identity, None)

    def _introduce(
        self, sock: socket.socket, lane: socket.socket | None, identity: Any, ring: Ring | None
    ) -> None:
        """Make the connection and hand it to the layer above.

        Unless the peer has given up meanwhile, as when this side was busy: it will try again, and
        must not be taken for one that was lost.
        """
        if _has_ended(sock) or (lane is not None and _has_ended(lane)):
            sock.close()
            if lane is not None:
                lane.close()
            return
        peer = f"{self.address}#{sock.fileno()}"
        with sock:
            connection = self._transport.adopt(sock, self._poller, peer, identity, ring, lane)
        try:
            self._on_connection(connection, identity)
        except BaseException:
            connection.abort()
            raise


def _has_ended(sock: socket.socket) -> bool:
    """Whether a peer has closed its end and left nothing to read."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _remove_in(pid: int, remove: Callable[[], None]) -> None:
    """Remove the traces of a listener, but never those of a parent process."""
    if os.getpid() == pid:
        remove()


def _abandon_in_child() -> None:
    for listener in list(_listeners):
        with suppress(OSError):
            listener.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)
