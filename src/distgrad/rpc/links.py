"""The connections of a worker to its peers.

Invariants
    1. All that goes to one peer goes over one connection, so that order is kept.
    2. A peer is lost once, for good: a worker that comes back has another incarnation.
    3. The thread that polls never waits for a connection: two workers that connect to each
       other at once would each wait for a handshake that the other one has to answer.
    4. Who does not answer a handshake, but at its door, computes, and is no loss: what is sent
       to it takes a detour until it answers. Nobody waits longer for it than a call may take.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from distgrad.config import config
from distgrad.errors import (
    AuthenticationError,
    ProtocolError,
    TransportError,
    WorkerLostError,
)
from distgrad.rpc.detour import Detour
from distgrad.rpc.pulse import is_running
from distgrad.transport.base import Connection, Listener, NoAnswer
from distgrad.transport.registry import transport_for

if TYPE_CHECKING:
    from distgrad.rpc.world import World

__all__ = ["Links"]

_TIDY_AFTER_S = 0.2
_MOST_EACH = 4  # connections of one peer; an honest one makes one, and again what it gave up
_MOST_STEPS = 4  # of a connection that can take a handshake_timeout: two addresses, two doors
_AT_ONCE = "its connection closed as soon as it was made"


class Links:
    """Connections, made on first use, one for sending to each peer.

    Parameters
    ----------
    world
        Who the peers are, where they listen and how they prove it.
    poller
        Polls the connections.
    polls_here
        Tells whether the calling thread is the one that polls.
    on_lost
        Called with the id of a peer that turns out to be out of reach, and why; any thread.

    Attributes
    ----------
    routes
        Id of a peer to the connection for sending to it.
    """

    def __init__(
        self,
        world: World,
        poller: Any,
        polls_here: Callable[[], bool],
        on_lost: Callable[[int, Exception], object],
    ) -> None:
        self._world = world
        self._poller = poller
        self._polls_here = polls_here
        self._on_lost = on_lost
        self.routes: dict[int, Connection] = {}
        self._open: set[Connection] = set()
        self._adopting = threading.Lock()
        self._connecting: dict[int, threading.Lock] = {}
        self._detours: dict[int, Detour] = {}
        self.lost: dict[int, Exception] = {}
        self.left: set[int] = set()
        self._closed = False
        self.listeners: list[Listener] = []

    def peer_of(self, connection: Connection) -> int:
        """Return the worker id at the other end of a connection.

        Raises
        ------
        ProtocolError
            If nobody of this world is there.
        """
        peer: int | None = connection.peer
        if peer is None:  # its first message came before `connect` returned
            peer = int(connection.identity[0])
            if not self._world.recognises(connection.identity, peer):
                raise ProtocolError("cannot take a message from outside this world")
            self._adopt(connection, peer)
        return peer

    def to(self, peer: int, patience_s: float = math.inf) -> Connection | Detour:
        """Return the connection for sending to a peer; connects on first use.

        On the thread that polls, this does not block: what it returns keeps messages until
        there is a connection. The same goes for threads that have less patience than it may
        take to find out about a peer that does not answer, and from then on for all others;
        and once the peer has not answered for ``config.handshake_timeout``, although it runs.

        Raises
        ------
        WorkerLostError
            If the peer is lost, has left, or cannot be reached.
        """
        connection = self.routes.get(peer)
        if connection is not None:
            return connection
        longest_s = _MOST_STEPS * config.handshake_timeout
        if peer in self._detours or patience_s < longest_s or self._polls_here():
            return self._detour(peer)
        try:
            return self._connect(peer)
        except NoAnswer:
            return self._detour(peer)

    def _detour(self, peer: int) -> Connection | Detour:
        self._refuse_lost(peer)
        with self._adopting:
            connection = self.routes.get(peer)
            if connection is not None:
                return connection
            if peer in self._detours:
                return self._detours[peer]
            detour = self._detours[peer] = Detour(peer)
            thread = threading.Thread(
                target=self._end_detour, args=(detour,), name="distgrad-connects", daemon=True
            )
            try:
                thread.start()
                return detour
            except RuntimeError:  # at the exit of the interpreter no thread begins any more
                del self._detours[peer]
                if self._polls_here():
                    raise
        return self._make(peer)

    def _end_detour(self, detour: Detour) -> None:
        while not self._closed:
            try:
                self._make(detour.peer)
                return
            except NoAnswer:
                continue
            except Exception as error:  # whatever it is, the peer is out of reach
                self._lose(detour.peer, str(error))
                return

    def _connect(self, peer: int) -> Connection:
        if threading.current_thread() is threading.main_thread():
            # Not here: a signal handler that raises could leave the connection half made, and
            # the peer would take its end for the end of this worker.
            with ThreadPoolExecutor(1) as apart:
                try:
                    made = apart.submit(self._make, peer)
                except RuntimeError:  # at the exit of the interpreter no thread begins any more
                    made = None
            if made is not None:
                return made.result()
        return self._make(peer)

    def _make(self, peer: int) -> Connection:
        self._refuse_lost(peer)
        with self._connecting.setdefault(peer, threading.Lock()):
            connection = self.routes.get(peer)
            if connection is None:
                connection = self._reach(peer)
                self._adopt(connection, peer)
                if connection.peer is None:  # nobody will hear of its end
                    connection.abort()
                    self._lose(peer, f"worker {self._world.name_of(peer)!r} is lost: {_AT_ONCE}")
            self._refuse_lost(peer)
            return self.routes.get(peer, connection)

    def _refuse_lost(self, peer: int) -> None:
        if peer in self.lost:
            raise WorkerLostError(
                f"cannot send to worker {self._world.name_of(peer)!r}: {self.lost[peer]}"
            )

    def _reach(self, peer: int) -> Connection:
        failures = []
        busy: NoAnswer | None = None
        for address in self._world.addresses_of(peer):
            try:
                connection = transport_for(address.partition("://")[0]).connect(
                    address,
                    self._poller,
                    lambda uid: self._world.handshake(connecting=True, peer_uid=uid),
                    config.handshake_timeout,
                )
            except AuthenticationError:
                raise
            except (TransportError, OSError) as error:
                failures.append(f"{address}: {error}")
                busy = error if isinstance(error, NoAnswer) else busy
                continue
            if self._world.recognises(connection.identity, peer):
                return connection
            connection.abort()
            failures.append(f"{address}: another worker listens there")
        if busy is not None and is_running(self._world.doors_of(peer), config.handshake_timeout):
            raise busy
        text = f"cannot reach worker {self._world.name_of(peer)!r}: " + "; ".join(failures)
        self._lose(peer, text)
        raise WorkerLostError(text)

    def _lose(self, peer: int, text: str) -> None:
        """Note that a peer is out of reach, unless its end is known already."""
        why = WorkerLostError(text)  # never raised: a traceback would keep its frames
        with self._adopting:
            if peer in self.lost or peer in self.routes:
                return
            self.lost[peer] = why
            if detour := self._detours.pop(peer, None):
                detour.fail(why)
        self._on_lost(peer, why)

    def accept(self, connection: Connection, identity: Any) -> None:
        """Take in a connection that a peer made and authenticated."""
        peer = identity[0]
        others = sum(other.peer == peer for other in self.connections)
        if not self._world.recognises(identity, peer) or peer in self.lost or others >= _MOST_EACH:
            connection.abort()
            return
        self._adopt(connection, peer)

    def _adopt(self, connection: Connection, peer: int) -> None:
        with self._adopting:
            if self._closed:
                connection.abort()
            elif connection.peer is None and not connection.closed and peer not in self.lost:
                connection.peer = peer
                self._open.add(connection)
                if peer in self.routes:
                    return
                if detour := self._detours.pop(peer, None):
                    detour.join(connection)
                self.routes[peer] = connection

    def drop(
        self, connection: Connection | Detour, error: Exception | None
    ) -> tuple[int, Exception] | None:
        """Note that a connection ended.

        Returns
        -------
        tuple or None
            The peer and the reason, where this means that a peer is lost; None where
            nothing is new.
        """
        peer = connection.peer
        if peer is None or (
            connection not in self._open and self._detours.get(peer) is not connection
        ):
            return None
        name = self._world.name_of(peer)
        if peer in self.left:
            why = WorkerLostError(f"worker {name!r} has shut down")
        else:
            fact = str(error) if error is not None else "its connection closed"
            why = WorkerLostError(f"worker {name!r} is lost: {fact}")
        with self._adopting:  # from here on nobody sends to it, whatever else is connected
            self.lost[peer] = why
            self.routes.pop(peer, None)
            self._detours.pop(peer, None)
            rest = {other for other in self._open if other.peer == peer}
            self._open -= rest
        for other in rest:
            other.abort()
        # Not at once: a dying process closes its connections before its listeners.
        self._poller.call_later(_TIDY_AFTER_S, lambda: self._tidy(peer))
        return peer, why

    def _tidy(self, peer: int) -> None:
        for address in self._world.addresses_of(peer):
            transport_for(address.partition("://")[0]).tidy(address)

    @property
    def connections(self) -> list[Connection]:
        """All open connections, also those only received from."""
        return list(self._open)

    @property
    def connected(self) -> list[int]:
        """Ids of the peers that this worker sends to."""
        return list(self.routes)

    def close(self, farewell: Callable[[int], object]) -> None:
        """Say goodbye to each peer and close everything."""
        for listener in self.listeners:
            listener.close()
        with self._adopting:
            self._closed = True
        for peer, connection in list(self.routes.items()):
            try:
                farewell(peer)
                connection.close()
            except TransportError:
                connection.abort()
        for connection in list(self._open):
            connection.close()
        with self._adopting:  # the thread that polls may still be in `drop`
            self.routes.clear()
            self._open.clear()
        for peer in list(self.lost):  # same
            self._tidy(peer)
