"""Two sides of a transport in one process, for tests: who listens, and who connects."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distgrad._codec import Frame, Outgoing, decode, encode
from distgrad.errors import AuthenticationError
from distgrad.transport._poller import Poller
from distgrad.transport.base import Connection, Handshake, HandshakeFactory, Listener, Transport

__all__ = [
    "Countersign",
    "Pair",
    "Side",
    "expect",
    "handshakes",
    "message",
    "polling",
    "unraisable",
]

#: How long anything may take before the suite calls it hung.
PATIENCE_S = 20.0
KIND = 1


def message(value: Any) -> Outgoing:
    """Encode a value as a message."""
    return encode(KIND, value)


@contextmanager
def expect(error: type[BaseException]) -> Iterator[None]:
    """Fail unless the block raises ``error``."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"nothing raised {error.__name__}")


class Countersign(Handshake):
    """A handshake for tests: a word that both sides know, and a number each."""

    def __init__(self, number: int, word: str, connecting: bool) -> None:
        self._own = f"{word} {number}".encode()
        self._word = word
        self._connecting = connecting

    def start(self) -> bytes | None:
        """Return the word of the connecting side."""
        return self._own if self._connecting else None

    def receive(self, message: bytes) -> tuple[bytes | None, bool]:
        """Check the word of the peer."""
        word, _, number = message.decode(errors="replace").partition(" ")
        if word != self._word:
            raise AuthenticationError("cannot authenticate the peer: wrong word")
        self.identity = int(number)
        return (None if self._connecting else self._own), True


def handshakes(number: int, *, connecting: bool, word: str = "friend") -> HandshakeFactory:
    """Make the handshakes of worker ``number``."""
    return lambda peer_uid: Countersign(number, word, connecting)


class Side:
    """One worker: a poller, and what came out of it."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.connections: list[Connection] = []
        self.events: list[tuple[Connection, Frame | Exception | None]] = []

    @property
    def connection(self) -> Connection:
        """The first connection."""
        return self.connections[0]

    def values(self) -> list[Any]:
        """Decode the messages that arrived, in order."""
        items = [item for _, item in self.events]
        return [decode(item) for item in items if not isinstance(item, Exception | None)]

    def ends(self) -> list[Exception | None]:
        """List the reasons of the connections that ended, in order."""
        return [item for _, item in self.events if isinstance(item, Exception | None)]

    def poll(self, timeout_s: float = 0.0) -> None:
        """Take in what the poller has."""
        self.events += self.poller.poll(timeout_s, False)


class Pair:
    """A listening side, ``far``, and a connecting one, ``near``."""

    def __init__(
        self,
        transport: Transport,
        on_connection: Callable[[Connection, Any], None] | None = None,
    ) -> None:
        self.transport = transport
        self.near, self.far = Side(), Side()
        self.listener: Listener = transport.listen(
            self.far.poller,
            handshakes(1, connecting=False),
            on_connection or self._accept,
            secure=True,
        )

    def _accept(self, connection: Connection, identity: Any) -> None:
        assert connection.identity == identity
        self.far.connections.append(connection)

    def connect(self, number: int = 2, word: str = "friend") -> Connection:
        """Connect once more, while another thread polls the listening side."""
        wanted = len(self.far.connections) + 1
        factory = handshakes(number, connecting=True, word=word)
        with polling(self.far):
            connection = self.transport.connect(
                self.listener.address, self.near.poller, factory, PATIENCE_S
            )
        self.near.connections.append(connection)
        self.until(lambda: len(self.far.connections) >= wanted)
        return connection

    def until(self, condition: Callable[[], bool]) -> None:
        """Poll both sides in turn until ``condition()`` holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "nothing happened"
            self.near.poll()
            self.far.poll(0.001)

    def settle(self) -> None:
        """Poll both sides until both have been silent for a moment."""
        silent = 0
        while silent < 5:
            before = len(self.near.events) + len(self.far.events)
            self.near.poll(0.005)
            self.far.poll(0.005)
            silent = silent + 1 if len(self.near.events) + len(self.far.events) == before else 0

    def close(self) -> None:
        """Close everything."""
        self.listener.close()
        self.near.poller.close()
        self.far.poller.close()


@contextmanager
def polling(side: Side) -> Iterator[None]:
    """Let another thread poll a side meanwhile."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            side.poll(PATIENCE_S)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        side.poller.wake()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "poll did not return after wake"


@contextmanager
def unraisable() -> Iterator[list[BaseException | None]]:
    """Collect the exceptions of callbacks, which have nobody to raise them to."""
    raised: list[BaseException | None] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda what: raised.append(what.exc_value)
    try:
        yield raised
    finally:
        sys.unraisablehook = before
