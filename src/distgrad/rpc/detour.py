"""What stands in for a connection that is being made."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from distgrad.errors import TransportError

if TYPE_CHECKING:
    from distgrad._codec import Outgoing
    from distgrad.transport.base import Connection

__all__ = ["Detour"]


class Detour:
    """Takes messages for a peer, and sends them in their order once it is connected.

    Parameters
    ----------
    peer
        Id of the worker.
    """

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self._lock = threading.Lock()
        self._messages: list[Outgoing] = []
        self._connection: Connection | None = None
        self._failure: Exception | None = None
        self._detached = 0  # bytes of arrays that were copied

    def send(self, message: Outgoing) -> bool:
        """Keep a message, or send it; see `Connection.send`.

        Raises
        ------
        TransportError
            If the peer cannot be reached.
        """
        with self._lock:
            if self._failure is not None:
                raise TransportError(str(self._failure))
            if self._connection is not None:
                return self._connection.send(message)
            self._messages.append(message)
            return False

    def waiting(self) -> int:
        """Count what is kept; see `Connection.waiting`."""
        with self._lock:
            return len(self._messages) if self._connection is None else self._connection.waiting()

    @property
    def closed(self) -> bool:
        """See `Connection.closed`."""
        with self._lock:
            if self._connection is not None:
                return self._connection.closed
            return self._failure is not None

    def flushed(self) -> bool:
        """See `Connection.flushed`."""
        with self._lock:
            return not self._messages and (self._connection is None or self._connection.flushed())

    def progress(self) -> int | None:
        """See `Connection.progress`; unknown until there is one: calls have their deadlines."""
        with self._lock:
            return None if self._connection is None else self._connection.progress()

    def detach(self, message: Outgoing) -> int | None:
        """See `Connection.detach`."""
        with self._lock:
            if self._connection is not None:
                return self._connection.detach(message)
            if message in self._messages:
                self._detached += message.own()
            return self._detached

    def join(self, connection: Connection) -> None:
        """Send what was kept, and from now on everything, over a connection."""
        with self._lock:
            self._connection = connection
            # If it has closed meanwhile, its end is reported to whoever waits for an answer.
            with suppress(TransportError):
                for message in self._messages:
                    connection.send(message)
            self._messages.clear()

    def abort(self) -> None:
        """Forget what was kept, and send no more; see `Connection.abort`."""
        self.fail(TransportError(f"cannot send to worker {self.peer}: too much was kept for it"))

    def fail(self, why: Exception) -> None:
        """Forget what was kept: the peer cannot be reached."""
        with self._lock:
            self._failure = why
            self._messages.clear()
