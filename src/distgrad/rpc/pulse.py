"""Signs of life: a worker that was stopped is told from one that computes.

The end of a process ends its connections, and the kernel ends those to a host that is gone. A
process that was stopped, by a signal or a frozen container, keeps them. So a worker has
doors, where a thread that needs no GIL gives a byte to whoever knocks; and it knocks at the
doors of the peers that it is connected to, each in turn, once an interval.

Invariants
    1. Only silence counts: a host that took the knock, and a process that gave nothing for
       `PATIENCE` intervals. Who refuses has ended, and its connections say so.
    2. Who slept itself does not judge: the silence of an interval whose end it slept through is
       its own, and it counts anew. Processes that are stopped together, as by Ctrl-Z, go on in any
       order, and each gives the others `PATIENCE` - 1 whole intervals then.
    3. Nothing here blocks the thread that polls.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distgrad.errors import TransportError
from distgrad.rpc._pulse import answer
from distgrad.transport.address import parse_address, split_host_port
from distgrad.transport.stream import TcpTransport

if TYPE_CHECKING:
    from distgrad.rpc.agent import Agent

__all__ = ["PATIENCE", "Doors", "Rounds", "is_running"]

#: Intervals that a peer may stay silent.
PATIENCE = 3
_BACKLOG = 4096  # who was stopped must not look like a host that is gone

# Of this process; only for the child of a fork, which must not keep them open.
_doors: weakref.WeakSet[Doors] = weakref.WeakSet()


class Doors:
    """Where others learn that this process runs; one for each scheme that it listens on.

    Parameters
    ----------
    schemes
        ``unix`` and ``tcp`` have doors, others none.
    host
        For the door of ``tcp``, as for its listener.
    """

    def __init__(self, schemes: Sequence[str], host: str | None) -> None:
        self.addresses: list[str] = []
        self._sockets: list[socket.socket] = []
        self._stop = -1  # tells the thread to end
        self._thread: threading.Thread | None = None
        _doors.add(self)
        try:
            if "unix" in schemes:
                name = f"distgrad-{secrets.token_hex(8)}"
                self._sockets.append(socket.socket(socket.AF_UNIX))
                self._sockets[-1].bind(f"\0{name}")  # abstract: no file is left behind
                self.addresses.append(f"unix://{name}")
            if "tcp" in schemes:
                sock, address, _ = TcpTransport().bind(host)
                self._sockets.append(sock)
                self.addresses.append(address)
            for sock in self._sockets:
                sock.listen(_BACKLOG)
                sock.setblocking(False)
        except BaseException:
            self.abandon()
            raise

    def attend(self, name: str) -> None:
        """Begin to answer."""
        if self._sockets:
            doors = [sock.fileno() for sock in self._sockets]
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            thread = threading.Thread(
                target=answer, args=(doors, self._stop), name=f"distgrad-{name}-pulse", daemon=True
            )
            thread.start()
            self._thread = thread

    def close(self) -> None:
        """Answer no longer. Idempotent."""
        if self._thread is not None and self._stop >= 0:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptors, and only them."""
        stop, self._stop = self._stop, -1
        if stop >= 0:
            os.close(stop)
        for sock in self._sockets:
            sock.close()


def _abandon_in_child() -> None:
    for doors in list(_doors):
        doors.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)


def is_running(doors: Sequence[str], patience_s: float) -> bool:
    """Whether a process answers at one of its doors; blocks for that long at most at each."""
    return any(_answers(door, patience_s) for door in doors)


def _answers(door: str, patience_s: float) -> bool:
    with suppress(OSError, TransportError, ValueError):  # refused, silent, out of reach, or no door
        scheme, location = parse_address(door)
        if scheme == "tcp":
            with socket.create_connection(split_host_port(location), patience_s) as sock:
                return bool(sock.recv(1))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(patience_s)
            sock.connect(f"\0{location}")
            return bool(sock.recv(1))
    return False


class Rounds:
    """Knocks at the doors of the peers in turn, and gives up those that stay silent.

    Parameters
    ----------
    agent
        Whose connections these are.
    addresses_of
        The doors of a peer.
    interval_s
        How often each peer is asked.

    Attributes
    ----------
    patience_s
        How long a peer may stay silent.
    poller
        Tells of the answers.
    """

    def __init__(
        self, agent: Agent, addresses_of: Callable[[int], Sequence[str]], interval_s: float
    ) -> None:
        self._agent = agent
        self._addresses_of = addresses_of
        self._turn: list[int] = []  # peers that are still to be asked in this round
        self._pause_s = interval_s  # from one of them to the next
        self._waiting: dict[int, _Knock] = {}
        self._hosts: dict[str, str] = {}  # name -> IP address
        self._next = time.monotonic() + interval_s
        self.interval_s = interval_s
        self.patience_s = PATIENCE * interval_s
        self.poller = agent.crew.poller

    def tick(self, now: float) -> float:
        """Ask the next peer if it is time to; return when it will be."""
        if now >= self._next:
            if not self._turn:
                self._turn = self._agent.links.connected
                self._pause_s = self.interval_s / max(len(self._turn), 1)
            self._next = now + self._pause_s
            if self._turn:
                with suppress(TransportError, ValueError):  # what it calls its door is none
                    self.ask(self._turn.pop())
        return self._next

    def _door_of(self, peer: int) -> str | None:
        connection = self._agent.links.routes.get(peer)
        scheme = getattr(connection, "scheme", None)
        addresses = self._addresses_of(peer)
        return next((a for a in addresses if a.partition("://")[0] == scheme), None)

    def ask(self, peer: int) -> None:
        """Knock at the door of a peer, unless it is still expected to answer."""
        door = self._door_of(peer)
        if door is None or peer in self._waiting:
            return
        where = self._locate(door)
        if where is not None:
            with suppress(OSError):  # refused: it has ended. No descriptor left: next time
                self._waiting[peer] = _Knock(self, peer, *where)

    def _locate(self, door: str) -> tuple[int, Any] | None:
        """Return family and address of a door; None while its name is looked up."""
        scheme, location = parse_address(door)
        if scheme == "unix":
            return socket.AF_UNIX, f"\0{location}"
        host, port = split_host_port(location)
        address = self._hosts.get(host, host)
        try:
            info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=_NUMERIC)[0]
        except OSError:
            threading.Thread(target=self._look_up, args=(host,), daemon=True).start()
            return None
        return info[0], info[4]

    def _look_up(self, host: str) -> None:
        with suppress(OSError):
            self._hosts[host] = str(socket.getaddrinfo(host, None)[0][4][0])

    # --- how it ends

    def heard(self, peer: int) -> None:
        """Note that a knock was answered, or that nobody is there."""
        self._waiting.pop(peer, None)

    def silent(self, peer: int) -> None:
        """Give a peer up."""
        self._waiting.pop(peer, None)
        connection = self._agent.links.routes.get(peer)
        if connection is not None:
            connection.abort()
            fact = f"its process gave no sign of life for {self.patience_s:g} s: it was stopped"
            self._agent._on_end(connection, TransportError(fact))

    def close(self) -> None:
        """Wait for no answer any more."""
        for knock in list(self._waiting.values()):
            knock.drop()


_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


class _Knock:
    """One question to one peer; all of it runs in the thread that polls."""

    def __init__(self, rounds: Rounds, peer: int, family: int, address: Any) -> None:
        self._rounds = rounds
        self._peer = peer
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        try:
            with suppress(BlockingIOError):
                self._sock.connect(address)
            rounds.poller.watch(self._sock.fileno(), self._look)
        except BaseException:
            self._sock.close()
            raise
        self._silences = 0  # intervals that passed without an answer, while this process ran
        self._wait()

    def _wait(self) -> None:
        self._due = time.monotonic() + self._rounds.interval_s
        self._timer = self._rounds.poller.call_later(self._rounds.interval_s, self._expire)

    def drop(self) -> None:
        """Forget the question."""
        self._timer.cancel()
        if self._sock.fileno() >= 0:
            self._rounds.poller.unwatch(self._sock.fileno())
        self._sock.close()

    def _look(self) -> bool:
        """See whether there is an answer; whether anybody is there does not matter here."""
        with suppress(OSError):  # refused, reset, out of reach: its connections tell
            try:
                self._sock.recv(1)
            except BlockingIOError:
                return False
        self.drop()
        self._rounds.heard(self._peer)
        return True

    def _expire(self) -> None:
        late = time.monotonic() > self._due + self._rounds.interval_s
        taken = self._is_taken()
        if self._look():
            return
        self._silences = 0 if late else self._silences + 1
        if self._silences < PATIENCE:
            self._wait()
            return
        self.drop()
        if taken:
            self._rounds.silent(self._peer)
        else:
            self._rounds.heard(self._peer)

    def _is_taken(self) -> bool:
        """Whether the host of the peer took the knock."""
        try:
            self._sock.getpeername()
        except OSError:
            return False
        return True
