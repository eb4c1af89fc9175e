"""Workers in one process: a message is copied and posted to the poller of the peer.

No socket is involved, so hundreds of workers cost no descriptors beyond their pollers.
The handshake is the same as anywhere else; the peer runs as this user by construction.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from distgrad._codec import Frame, Outgoing, parse
from distgrad.errors import AuthenticationError, TransportError
from distgrad.transport._poller import Poller
from distgrad.transport._pool import shared_pool
from distgrad.transport.address import parse_address
from distgrad.transport.base import Connection, Handshake, HandshakeFactory, Listener, Transport

__all__ = ["InprocConnection", "InprocListener", "InprocTransport"]

_numbers = count(1)
# Addresses mean something to the whole process, like file names.
_listeners: weakref.WeakValueDictionary[str, InprocListener] = weakref.WeakValueDictionary()


class InprocTransport(Transport):
    """Connects workers of one process."""

    scheme = "inproc"

    def listen(
        self,
        poller: Poller,
        new_handshake: HandshakeFactory,
        on_connection: Callable[[Connection, Any], None],
        *,
        host: str | None = None,
        secure: bool,
    ) -> InprocListener:
        """See `Transport.listen`; ``host`` and ``secure`` make no difference here."""
        listener = InprocListener(poller, new_handshake, on_connection)
        _listeners[listener.address] = listener
        return listener

    def connect(
        self, address: str, poller: Poller, new_handshake: HandshakeFactory, timeout_s: float
    ) -> Connection:
        """See `Transport.connect`; does not wait for the other side to poll."""
        listener = _listeners.get(str(parse_address(address)))
        if listener is None or listener.closed:
            raise TransportError(f"cannot connect to {address}: nobody listens there")
        connecting, accepting = new_handshake(os.getuid()), listener.new_handshake(os.getuid())
        _agree(connecting, accepting, address)
        lock = threading.Lock()
        near = InprocConnection(poller, address, connecting.identity, lock)
        far = InprocConnection(
            listener.poller, f"{address}#{next(_numbers)}", accepting.identity, lock
        )
        near._other, far._other = far, near
        listener.accept(far)
        return near


class InprocListener(Listener):
    """Is found under its address until it is closed."""

    def __init__(
        self,
        poller: Poller,
        new_handshake: HandshakeFactory,
        on_connection: Callable[[Connection, Any], None],
    ) -> None:
        self.address = f"inproc://{os.getpid()}/{next(_numbers)}"
        self.poller = poller
        self.new_handshake = new_handshake
        self.closed = False
        self._on_connection = on_connection

    def accept(self, connection: InprocConnection) -> None:
        """Hand a connection to the polling thread, before its first event."""

        def welcome() -> None:
            try:
                self._on_connection(connection, connection.identity)
            except BaseException:
                connection.abort()
                raise

        self.poller.call(welcome)

    def close(self) -> None:
        """See `Listener.close`."""
        self.closed = True
        _listeners.pop(self.address, None)


class InprocConnection(Connection):
    """One end; its other end is in the same process.

    The lock is shared by both ends. Under it, an end is closed together with the other,
    and each poller gets its one end event after all messages (T2).
    """

    scheme = "inproc"

    def __init__(self, poller: Poller, address: str, identity: Any, lock: threading.Lock) -> None:
        self.peer_address = address
        self.identity = identity
        self.peer = None
        self._poller = poller
        self._lock = lock
        self._other: InprocConnection | None = None  # None once closed
        poller.enroll(self)

    @property
    def closed(self) -> bool:
        """See `Connection.closed`."""
        return self._other is None

    def send(self, message: Outgoing) -> bool:
        """Copy a message to the other end; always whole."""
        frame = _copy(message.parts())
        with self._lock:
            other = self._other
            if other is not None:
                other._poller.post(other, frame)
        if other is None:
            raise TransportError(f"cannot send to {self.peer_address}: the connection is closed")
        return True

    def flushed(self) -> bool:
        """See `Connection.flushed`."""
        return True

    def close(self) -> None:
        """See `Connection.close`."""
        with self._lock:
            other, self._other = self._other, None
            if other is None:
                return
            other._other = None
        for end in (self, other):
            _report_end(end)

    def abort(self) -> None:
        """See `Connection.abort`."""
        self.close()


def _report_end(connection: InprocConnection) -> None:
    try:
        connection._poller.post(connection, None)
    except TransportError:
        return  # its poller is closed: nobody is left who wants to know


def _agree(connecting: Handshake, accepting: Handshake, address: str) -> None:
    """Carry the messages of both handshakes until both are finished."""
    finished = {connecting: False, accepting: False}
    sender, receiver = connecting, accepting
    message = connecting.start()
    while message is not None:
        message, finished[receiver] = receiver.receive(message)
        sender, receiver = receiver, sender
    if not all(finished.values()):
        raise AuthenticationError(f"cannot connect to {address}: the handshake did not finish")


def _copy(parts: Sequence[Any]) -> Frame:
    """Make the frame that a receiver would get from these parts of a message."""
    views = [memoryview(part).cast("B") for part in parts[1:]]
    if not views:
        return parse(parts[0])
    slab: Any = shared_pool().take(sum(view.nbytes for view in views))
    target = memoryview(slab)
    start = 0
    for view in views:
        target[start : start + view.nbytes] = view
        start += view.nbytes
    return parse(parts[0], slab)
