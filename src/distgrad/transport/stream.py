"""Unix and TCP sockets: listening, connecting, socket options.

What happens on a socket before its peer has proved who it is stands in `handshake`, what
happens afterwards in `_stream`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import struct
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from distgrad.config import config
from distgrad.errors import AuthenticationError, TransportError
from distgrad.transport._poller import Poller
from distgrad.transport._ring import Ring
from distgrad.transport._stream import StreamConnection
from distgrad.transport.address import (
    Address,
    format_host_port,
    parse_address,
    split_host_port,
)
from distgrad.transport.base import Connection, HandshakeFactory, Transport
from distgrad.transport.handshake import authenticate
from distgrad.transport.lanes import announce, join
from distgrad.transport.listener import StreamListener
from distgrad.transport.shm import answer_offer

__all__ = ["StreamListener", "TcpTransport", "UnixTransport"]

#: Longest path of a Unix socket (``sun_path`` less its terminating zero).
_MAX_PATH_BYTES = 107
_DIRECTORY = "distgrad-"  # prefix of the directories that hold a socket each


class StreamTransport(Transport):
    """What Unix and TCP sockets have in common."""

    #: Whether the peer is on this host, so that it may share memory; others get a lane.
    local: ClassVar[bool] = False

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

        def introduce() -> tuple[socket.socket, Any]:
            return self._introduce(address, new_handshake, deadline)

        sock, identity = introduce()
        with sock:
            try:
                if self.local:
                    ring = answer_offer(sock, deadline, address)
                    return self.adopt(sock, poller, address, identity, ring)
                token = announce(sock)
                lane = join(token, deadline, address, lambda: introduce()[0])
                return self.adopt(sock, poller, address, identity, lane=lane)
            except (AuthenticationError, TransportError):  # they are among the next
                raise
            except OSError as error:  # the peer went away
                raise TransportError(
                    f"cannot connect to {address}: {error.strerror or error}"
                ) from error

    def _introduce(
        self, address: str, new_handshake: HandshakeFactory, deadline: float
    ) -> tuple[socket.socket, Any]:
        """Return a connected socket whose peer is known, and who that is."""
        target = parse_address(address)
        try:
            sock = self._open(target, max(deadline - time.monotonic(), 1e-3))
        except OSError as error:
            raise TransportError(
                f"cannot connect to {address}: {error.strerror or error}"
            ) from error
        try:
            handshake = new_handshake(self.peer_uid(sock))
            authenticate(sock, handshake, deadline, address)
        except BaseException:
            sock.close()
            raise
        return sock, handshake.identity

    def adopt(
        self,
        sock: socket.socket,
        poller: Poller,
        peer_address: str,
        identity: Any,
        ring: Ring | None = None,
        lane: socket.socket | None = None,
    ) -> StreamConnection:
        """Make a connection of an authenticated socket and its lane, which are taken over."""
        with lane or nullcontext():
            connection = StreamConnection(
                poller,
                sock.fileno(),
                scheme=self.scheme,
                peer_address=peer_address,
                identity=identity,
                ring=ring,
                lane=lane.fileno() if lane else -1,
            )
            sock.detach()
            if lane:
                lane.detach()
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


class _Home:
    """A fresh directory of mode 0700 for one socket.

    Its owner holds a lock on it. The kernel drops the lock with the process, so whoever can
    take it knows that nobody listens there any more.
    """

    def __init__(self) -> None:
        path = tempfile.mkdtemp(prefix=_DIRECTORY)
        if len(os.fsencode(path)) + len("/new") > _MAX_PATH_BYTES:
            os.rmdir(path)
            path = tempfile.mkdtemp(prefix=_DIRECTORY, dir="/tmp")
        self.path = path
        self._lock = _lock(path)
        _homes.add(self)

    def leave(self) -> None:
        """Remove the directory and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()
        _homes.discard(self)

    def release(self) -> None:
        """Let go of the lock. In the child of a fork: of its copy, which would keep it."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


# Of this process; only for the child of a fork.
_homes: set[_Home] = set()


def _release_in_child() -> None:
    for home in list(_homes):
        home.release()
    _homes.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _lock(directory: str | Path) -> int:
    """Return a descriptor that holds the lock of a directory; -1 if that cannot be had."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody has it, or this file system knows no locks
        os.close(descriptor)
        return -1
    return descriptor


@cache
def _sweep(folder: str) -> None:
    """Remove what dead processes left in a folder; once a process is enough."""
    for abandoned in Path(folder).glob(f"{_DIRECTORY}*/s"):
        UnixTransport().tidy(f"unix://{abandoned}")


class UnixTransport(StreamTransport):
    """Sockets in the file system, in a directory that only this user may enter."""

    scheme = "unix"
    local = True

    def bind(self, host: str | None) -> tuple[socket.socket, str, Callable[[], None]]:
        """Bind to a file in a directory of its own; sweep up after the dead first."""
        _sweep(tempfile.gettempdir())
        home = _Home()
        path = f"{home.path}/s"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
        except BaseException:
            sock.close()
            home.leave()
            raise
        return sock, f"unix://{path}", home.leave

    def tidy(self, address: str) -> None:
        """Remove a socket of this user whose process has ended, and its directory.

        The path may come from a peer, so nothing but such a socket is ever removed.
        """
        path = Path(address.removeprefix("unix://"))
        if not path.parent.name.startswith(_DIRECTORY) or (lock := _lock(path.parent)) < 0:
            return
        with suppress(OSError):  # gone already, or not ours
            status = path.lstat()
            if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.getuid():
                path.unlink()
                path.parent.rmdir()
        os.close(lock)

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
        """Send small messages at once; notice a host that is gone.

        Within 25 s where nothing is on the way; else after ``config.stall_timeout``, as with
        any peer that takes nothing: the kernel counts the time in which it was stopped too.
        """
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        patience_s = min(max(config.stall_timeout, 15.0), 86400.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * patience_s))

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
