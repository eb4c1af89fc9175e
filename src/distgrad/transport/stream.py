"""Unix and TCP sockets: listening, connecting, socket options.

What happens on a socket before its peer has proved who it is stands in `handshake`, what
happens afterwards in `_stream`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distgrad.config import config
from distgrad.errors import AuthenticationError, TransportError
from distgrad.transport._stream import Poller, StreamConnection
from distgrad.transport.address import (
    Address,
    format_host_port,
    parse_address,
    split_host_port,
)
from distgrad.transport.base import Connection, Handshake, HandshakeFactory, Listener, Transport
from distgrad.transport.handshake import HalfOpen, authenticate

__all__ = ["StreamListener", "TcpTransport", "UnixTransport"]

_log = logging.getLogger("distgrad.transport")

_BACKLOG = 1024
#: How long a listener pauses when the process has no file descriptor left.
_NO_DESCRIPTOR_PAUSE_S = 0.5
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
#: Longest path of a Unix socket (``sun_path`` less its terminating zero).
_MAX_PATH_BYTES = 107
_DIRECTORY = "distgrad-"  # prefix of the directories that hold a socket each

# Listeners of this process, only for the child of a fork: it must not keep them open.
_listeners: weakref.WeakSet[StreamListener] = weakref.WeakSet()


class StreamTransport(Transport):
    """What Unix and TCP sockets have in common."""

    def listen(
        self,
        poller: Poller,
        new_handshake: HandshakeFactory,
        on_connection: Callable[[Connection, Any], None],
        *,
        host: str | None = None,
        secure: bool,
    ) -> StreamListener:
        """See `Transport.listen`."""
        self._check_listen(host, secure)
        try:
            return StreamListener(self, host, poller, new_handshake, on_connection)
        except OSError as error:
            raise TransportError(
                f"cannot listen on {self.scheme}://{host or ''}: {error.strerror or error}"
            ) from error

    def connect(
        self, address: str, poller: Poller, new_handshake: HandshakeFactory, timeout_s: float
    ) -> Connection:
        """See `Transport.connect`."""
        deadline = time.monotonic() + timeout_s
        target = parse_address(address)
        try:
            sock = self._open(target, timeout_s)
        except OSError as error:
            raise TransportError(
                f"cannot connect to {address}: {error.strerror or error}"
            ) from error
        with sock:
            handshake = new_handshake(self.peer_uid(sock))
            authenticate(sock, handshake, deadline, address)
            return self.adopt(sock, poller, address, handshake.identity)

    def adopt(
        self, sock: socket.socket, poller: Poller, peer_address: str, identity: Any
    ) -> StreamConnection:
        """Make a connection of an authenticated socket, which is taken over."""
        connection = StreamConnection(
            poller, sock.fileno(), scheme=self.scheme, peer_address=peer_address, identity=identity
        )
        sock.detach()
        return connection

    @abstractmethod
    def bind(self, host: str | None) -> tuple[socket.socket, str, Callable[[], None]]:
        """Return a bound socket, its address, and what removes its traces."""

    @abstractmethod
    def peer_uid(self, sock: socket.socket) -> int | None:
        """Return the user id of the peer if the kernel vouches for it."""

    @abstractmethod
    def prepare(self, sock: socket.socket) -> None:
        """Set the options of a connected socket."""

    @abstractmethod
    def _check_listen(self, host: str | None, secure: bool) -> None: ...

    @abstractmethod
    def _open(self, target: Address, timeout_s: float) -> socket.socket: ...


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
        self._accepting = False
        self._closed = False
        self._sock, self.address, remove = transport.bind(host)
        self._remove = weakref.finalize(self, _remove_in, os.getpid(), remove)
        self._sock.listen(_BACKLOG)
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
            self._sock.close()
        self._remove()

    def abandon(self) -> None:
        """In the child of a fork: close the copies of the descriptors, and only them."""
        self._closed = True
        self._remove.detach()
        self._sock.close()
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

        def finished(identity: Any) -> None:
            self._forget(half_open)
            self._welcome(sock, identity)

        def failed(error: Exception) -> None:
            self._forget(half_open)
            # Looking whether somebody listens is no offence, and `tidy` does it.
            level = logging.WARNING if isinstance(error, AuthenticationError) else logging.DEBUG
            _log.log(level, "%s: refused a connection: %s", self.address, error)

        half_open = HalfOpen(
            sock, self._poller, handshake, config.handshake_timeout, finished, failed
        )
        self._half_open.add(half_open)

    def _forget(self, half_open: HalfOpen) -> None:
        with self._lock:
            self._half_open.discard(half_open)
        self._update()

    def _welcome(self, sock: socket.socket, identity: Any) -> None:
        peer = f"{self.address}#{sock.fileno()}"
        with sock:
            connection = self._transport.adopt(sock, self._poller, peer, identity)
        try:
            self._on_connection(connection, identity)
        except BaseException:
            connection.abort()
            raise


def _listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its queue is full
            return True
    return True


class UnixTransport(StreamTransport):
    """Sockets in the file system, in a directory that only this user may enter."""

    scheme = "unix"

    def bind(self, host: str | None) -> tuple[socket.socket, str, Callable[[], None]]:
        """Bind to a file in a fresh directory of mode 0700; sweep up after the dead first."""
        for abandoned in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY}*/s"):
            self.tidy(f"unix://{abandoned}")
        directory = tempfile.mkdtemp(prefix=_DIRECTORY)
        if len(os.fsencode(directory)) + len("/new") > _MAX_PATH_BYTES:
            os.rmdir(directory)
            directory = tempfile.mkdtemp(prefix=_DIRECTORY, dir="/tmp")
        path = f"{directory}/s"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # It gets its name once it listens: before, others would take it for abandoned.
        sock.bind(f"{directory}/new")
        sock.listen(_BACKLOG)
        os.rename(f"{directory}/new", path)
        return sock, f"unix://{path}", lambda: shutil.rmtree(directory, ignore_errors=True)

    def tidy(self, address: str) -> None:
        """Remove a socket of this user that nobody listens on, and its directory if empty.

        The path may come from a peer, so nothing but such a socket is ever removed.
        """
        path = Path(address.removeprefix("unix://"))
        with suppress(OSError):  # gone already, or not ours
            status = path.lstat()
            if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
                return
            if not _listened_on(path):
                path.unlink()
                if path.parent.name.startswith(_DIRECTORY):
                    path.parent.rmdir()

    def peer_uid(self, sock: socket.socket) -> int | None:
        """Return the user id that the peer had when it connected or listened."""
        credentials = struct.Struct("3i")  # pid, uid, gid
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
        return int(credentials.unpack(raw)[1])

    def prepare(self, sock: socket.socket) -> None:
        """Set the options of a connected socket."""

    def _check_listen(self, host: str | None, secure: bool) -> None:
        if host is not None:
            raise TransportError(
                f"cannot listen on host {host!r}: Unix sockets reach this host only",
                hint="use the tcp transport, or no host",
            )

    def _open(self, target: Address, timeout_s: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A non-blocking connect fails at once when the listener's queue is full; a
            # blocking one waits, for as long as the send time-out says.
            _limit_connect(sock, timeout_s)
            sock.connect(target.location)
            _limit_connect(sock, 0.0)
            self.prepare(sock)
        except BaseException:
            sock.close()
            raise
        return sock


class TcpTransport(StreamTransport):
    """TCP, on the loopback interface unless a host is given. Always needs a secret."""

    scheme = "tcp"

    def bind(self, host: str | None) -> tuple[socket.socket, str, Callable[[], None]]:
        """Bind to a free port.

        A wildcard host such as ``0.0.0.0`` is announced as this host's name.
        """
        host = host or "127.0.0.1"
        infos = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = infos[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.bind(where)
        except BaseException:
            sock.close()
            raise
        bound, port = sock.getsockname()[:2]
        shown = socket.gethostname() if bound in ("0.0.0.0", "::") else bound
        return sock, f"tcp://{format_host_port(shown, port)}", lambda: None

    def peer_uid(self, sock: socket.socket) -> int | None:
        """Return None: TCP does not say who the peer is."""
        return None

    def prepare(self, sock: socket.socket) -> None:
        """Send small messages at once; notice a dead peer within 15 s or so."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)

    def _check_listen(self, host: str | None, secure: bool) -> None:
        if not secure:
            raise AuthenticationError(
                f"cannot listen on tcp://{host or '127.0.0.1'}: there is no secret, and TCP "
                "does not tell who connects",
                hint="set DISTGRAD_SECRET or DISTGRAD_SECRET_FILE, or use the unix transport",
            )

    def _open(self, target: Address, timeout_s: float) -> socket.socket:
        host, port = split_host_port(target.location)
        sock = socket.create_connection((host, port), timeout=timeout_s)
        self.prepare(sock)
        return sock


def _limit_connect(sock: socket.socket, timeout_s: float) -> None:
    microseconds = max(int(timeout_s * 1e6), 1) if timeout_s > 0 else 0
    limit = struct.pack("ll", *divmod(microseconds, 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _remove_in(pid: int, remove: Callable[[], None]) -> None:
    """Remove the traces of a listener, but never those of a parent process."""
    if os.getpid() == pid:
        remove()


def _abandon_in_child() -> None:
    for listener in list(_listeners):
        with suppress(OSError):
            listener.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)
