"""What a transport is: the contract between distgrad and whatever moves its messages.

The docstrings of these classes are the contract; the suite that checks it ships as
`distgrad.testing.transport_contract`. A transport knows frames (`distgrad._codec`) and
nothing above them: no worker, no tensor, no call.

Invariants that every transport keeps (tests cite the numbers):

T1  Messages of one connection arrive complete, once, and in the order of `send`. One that
    is marked `overtakes` may arrive before others that were sent earlier.
T2  A connection ends exactly once: one event ``(connection, error or None)`` from
    `Poller.poll`, after every message that had arrived complete, and nothing after it.
T3  Bytes that are not a frame end the connection they came on, and nothing else. A
    connection never resynchronises.
T4  `Connection.send` and `abort` never wait; `close` waits a bounded time.
T5  What a receiver gets is its own: later writes of the sender do not reach it once
    `send` has returned True, `flushed` is true, or `detach` has returned a number.
T6  A peer that has not finished its handshake costs a bounded number of connections,
    bytes and seconds, and causes no event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from distgrad.errors import TransportError

if TYPE_CHECKING:
    from distgrad._codec import Outgoing
    from distgrad.transport._poller import Poller

__all__ = ["MAX_HANDSHAKE_BYTES", "Connection", "Handshake", "Listener", "NoAnswer", "Transport"]

#: Longest message of a handshake: what a stranger may make us read.
MAX_HANDSHAKE_BYTES = 512

#: Makes one side of a handshake, given the user id of the peer where the kernel vouches for it.
HandshakeFactory = Callable[[int | None], "Handshake"]


class Handshake(ABC):
    """One side of one attempt to agree on who is at both ends. Does no I/O.

    The transport carries its messages, each of at most `MAX_HANDSHAKE_BYTES`, and gives
    the connection to the rpc layer only when both sides are finished.
    """

    #: Who the peer is; valid once finished. The rpc layer uses (worker id, incarnation).
    identity: Any = None

    @abstractmethod
    def start(self) -> bytes | None:
        """Return the first message of the connecting side; None on the accepting side."""

    @abstractmethod
    def receive(self, message: bytes) -> tuple[bytes | None, bool]:
        """Take a message of the peer; return (answer or None, finished).

        Raises
        ------
        AuthenticationError
            The peer is not who it has to be. The transport closes the connection.
        """


class NoAnswer(TransportError):
    """Somebody listens there, and did not answer in time."""


class Connection(ABC):
    """An authenticated, ordered, reliable stream of messages to one peer."""

    #: Scheme of the transport, such as ``"unix"``.
    scheme: str
    #: Address of the peer for people to read; the accepting side may know only a number.
    peer_address: str
    #: What the peer's handshake proved; set before the first event of the connection.
    identity: Any
    #: Free for the layer above, which finds its record of the peer here. Starts as None.
    peer: Any

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether this side has closed the connection or has seen its end."""

    @abstractmethod
    def send(self, message: Outgoing) -> bool:
        """Send a message; callable from any thread, never waits.

        Returns
        -------
        bool
            True if the message was handed over whole: its arrays may be changed again.
            False if a part of it is queued; polling sends the rest, and until `flushed`
            is true the connection reads the arrays of the message.

        Raises
        ------
        TransportError
            The connection is closed or broken. The message counts as not sent, though
            its first bytes may have left.
        """

    @abstractmethod
    def flushed(self) -> bool:
        """Whether nothing of earlier `send` calls is still queued on this side.

        After a False, `Poller.poll` returns as soon as this is worth another look; a transport
        that does not see to that (with `Poller.wake`) is asked every millisecond.
        """

    def waiting(self) -> int:
        """Return how many messages of earlier `send` calls are queued on this side."""
        return 0 if self.flushed() else 1

    def progress(self) -> int | None:
        """Return a number that grows as the peer takes what is queued; None if unknown.

        A connection that tells is given up when the peer takes nothing for too long.
        """
        return None

    def detach(self, message: Outgoing) -> int | None:
        """Read the arrays of a queued message no more: copy what is left of them.

        A call whose time is over ends so, though a part of it is still queued.

        Returns
        -------
        int or None
            How many bytes of such copies are queued; None if the arrays are still read, so
            that the caller has to wait.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Hand over what is queued, for a second at most, then end the connection.

        Idempotent and callable from any thread. Messages that have arrived and that
        `Poller.poll` has not returned yet may be dropped; the end is reported by `poll`
        as for any other connection.
        """

    @abstractmethod
    def abort(self) -> None:
        """End the connection at once and drop what is queued. Idempotent; any thread."""


class Listener(ABC):
    """Accepts connections until it is closed."""

    #: What `Transport.connect` of a peer takes.
    address: str

    @abstractmethod
    def close(self) -> None:
        """Stop accepting, drop half-open connections, remove files. Idempotent; any thread.

        Connections that were accepted live on.
        """


class Transport(ABC):
    """A way to reach other workers, found by the scheme of an address."""

    scheme: ClassVar[str]

    @abstractmethod
    def listen(
        self,
        poller: Poller,
        new_handshake: HandshakeFactory,
        on_connection: Callable[[Connection, Any], None],
        *,
        host: str | None = None,
        secure: bool,
    ) -> Listener:
        """Accept connections on a fresh address while somebody polls ``poller``.

        Parameters
        ----------
        poller
            Runs the handshakes and delivers the events of the connections.
        new_handshake
            Called once a connection attempt.
        on_connection
            Called with (connection, identity) in the polling thread, before the first
            event of the connection. If it raises, the connection is aborted.
        host
            The host name or IP address to listen on, where that means something. None
            stands for this host only.
        secure
            Whether the handshake proves the knowledge of a secret. A transport that
            cannot tell local users apart refuses to listen without.

        Raises
        ------
        AuthenticationError
            ``secure`` is False and this transport needs a secret.
        TransportError
            The address cannot be listened on.
        """

    @abstractmethod
    def connect(
        self, address: str, poller: Poller, new_handshake: HandshakeFactory, timeout_s: float
    ) -> Connection:
        """Connect to a listener and finish the handshake, within ``timeout_s`` seconds.

        Blocks the calling thread, which need not be the one that polls. The events of
        the connection may come out of ``poller`` before this returns, and only after
        ``connection.identity`` is set.

        Raises
        ------
        AuthenticationError
            One side refused the other.
        NoAnswer
            Somebody listens there, and did not answer in time.
        TransportError
            Nobody listens there, or the connection broke.
        """

    def tidy(self, address: str) -> None:  # noqa: B027 - most transports leave nothing behind
        """Remove what a peer that ended without notice left behind at its address.

        Only what is provably abandoned and belongs to this user; otherwise nothing. Does
        not wait. Called when a peer is lost.
        """
