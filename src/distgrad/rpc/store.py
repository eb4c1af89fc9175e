"""The meeting point of a world at start: a key-value store.

A store holds JSON values. Four kinds, one behaviour (`Store`): in memory (workers of one
process), a server on TCP or on a Unix socket (rank 0 hosts it), and a file. It serves the
rendezvous only; nothing is left of it once all workers know each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distgrad.errors import (
    AuthenticationError,
    ProtocolError,
    RpcTimeoutError,
    TransportError,
    WorkerLostError,
)
from distgrad.transport.base import Handshake

__all__ = ["FileStore", "MemoryStore", "ServerStore", "Store", "StoreServer"]

_MAX_RECORD = 1 << 20
_FAILURE = "failure"  # the key of the reason why there will be no world
_LENGTH = struct.Struct("<I")
_HANDSHAKE_LENGTH = struct.Struct("<H")

NewHandshake = Callable[[bool, "int | None"], Handshake]


class Store(ABC):
    """Keys with JSON values, written once each."""

    @abstractmethod
    def claim(self, key: str, value: Any) -> Any:
        """Publish a value unless the key has one already; return what the key has now."""

    @abstractmethod
    def gather(self, prefix: str, count: int, deadline: float) -> dict[str, Any]:
        """Block until ``count`` keys begin with ``prefix``; return them.

        Raises
        ------
        RpcTimeoutError
            If they are not there at ``deadline`` (`time.monotonic` seconds); names how
            many were.
        WorkerLostError
            If they will never be: somebody called `fail`.
        """

    def fail(self, reason: str) -> None:
        """Tell all who wait in `gather`, and will, that the world cannot come about."""
        with contextlib.suppress(OSError, TransportError):  # all left
            self.claim(_FAILURE, reason)

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; what it holds stays for the others."""


def _chosen(values: dict[str, Any], prefix: str, count: int) -> tuple[dict[str, Any], bool]:
    """Return the values whose keys have a prefix, and whether these are all.

    Raises
    ------
    WorkerLostError
        If they are not, and never will be.
    """
    found = {key: value for key, value in values.items() if key.startswith(prefix)}
    if len(found) < count and _FAILURE in values:
        raise WorkerLostError(f"cannot build the world: {values[_FAILURE]}")
    return found, len(found) >= count


def _too_few(prefix: str, found: int, count: int) -> RpcTimeoutError:
    return RpcTimeoutError(
        f"cannot gather {prefix!r}: {found} of {count} workers arrived in time",
        hint="start the missing workers, check rank, world size and address, or raise "
        "DISTGRAD_RENDEZVOUS_TIMEOUT",
    )


class MemoryStore(Store):
    """A store for workers of one process."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._changed = threading.Condition()

    def claim(self, key: str, value: Any) -> Any:
        with self._changed:
            self._changed.notify_all()
            return self._values.setdefault(key, value)

    def gather(self, prefix: str, count: int, deadline: float) -> dict[str, Any]:
        with self._changed:
            while True:
                found, complete = _chosen(self._values, prefix, count)
                if complete:
                    return found
                if not self._changed.wait(deadline - time.monotonic()):
                    raise _too_few(prefix, len(found), count)

    def close(self) -> None:
        """Nothing to let go of."""


class FileStore(Store):
    """A store in a file that all workers can reach; one JSON record a line.

    Parameters
    ----------
    path
        The file; made with mode 0600 if absent. Must be fresh for every world.
    """

    _PAUSE_S = 0.01  # a file cannot be waited for, so it is looked at again
    _one_thread = threading.Lock()  # the lock of the file is that of the whole process

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def _locked(self) -> Any:
        with self._one_thread:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)
                yield file

    def _read(self, file: Any) -> dict[str, Any]:
        return dict(json.loads(line) for line in file if line.strip())

    def claim(self, key: str, value: Any) -> Any:
        with self._locked() as file:
            known = self._read(file)
            if key not in known:
                file.write(json.dumps([key, value]) + "\n")
        return known.get(key, value)

    def gather(self, prefix: str, count: int, deadline: float) -> dict[str, Any]:
        pause = threading.Event()
        while True:
            with self._locked() as file:
                found, complete = _chosen(self._read(file), prefix, count)
            if complete:
                return found
            if time.monotonic() > deadline:
                raise _too_few(prefix, len(found), count)
            pause.wait(self._PAUSE_S)

    def close(self) -> None:
        """Nothing to let go of: the file is open only while it is read."""


# --- the server and its client ---------------------------------------------------------


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise TransportError("cannot talk to the rendezvous store: it closed the connection")
        data += piece
    return bytes(data)


def _send_record(sock: socket.socket, record: Any) -> None:
    data = json.dumps(record).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive_record(sock: socket.socket) -> Any:
    (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))
    if length > _MAX_RECORD:
        raise ProtocolError(f"cannot read a store record: {length} bytes are over the limit")
    try:
        return json.loads(_receive_exactly(sock, length))
    except ValueError as error:
        raise ProtocolError(f"cannot read a store record: {error}") from None


def _authenticate(sock: socket.socket, handshake: Handshake) -> None:
    message = handshake.start()
    finished = False
    while True:
        if message is not None:
            sock.sendall(_HANDSHAKE_LENGTH.pack(len(message)) + message)
        if finished:
            return
        (length,) = _HANDSHAKE_LENGTH.unpack(_receive_exactly(sock, _HANDSHAKE_LENGTH.size))
        if length > 512:
            raise AuthenticationError("cannot authenticate the peer: its message is too long")
        message, finished = handshake.receive(_receive_exactly(sock, length))
        if finished and message is None:
            return


def _peer_uid(sock: socket.socket) -> int | None:
    if sock.family != socket.AF_UNIX:
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class StoreServer:
    """Serves a `MemoryStore` to the workers of a world, until all have gathered it.

    Parameters
    ----------
    sock
        A bound, listening socket; owned by the server from now on.
    new_handshake
        Called with ``(False, uid of the peer or None)`` for each connection.
    clients
        How many clients are expected; the server ends after as many have left.
    handshake_s
        How long a connection may take to authenticate.
    """

    def __init__(
        self, sock: socket.socket, new_handshake: NewHandshake, clients: int, handshake_s: float
    ) -> None:
        self.store = MemoryStore()
        self._socket = sock
        self._new_handshake = new_handshake
        self._handshake_s = handshake_s
        self._left = clients
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="distgrad-store", daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(
                target=self._serve, args=(sock,), name="distgrad-store-client", daemon=True
            ).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                sock.settimeout(self._handshake_s)
                _authenticate(sock, self._new_handshake(False, _peer_uid(sock)))
                sock.settimeout(None)
                while not self._closed:
                    self._answer(sock, _receive_record(sock))
            except TransportError:
                self._client_left()
            except (OSError, AuthenticationError, ProtocolError):
                return  # a stranger, or a client that broke off: the others are unaffected

    def _answer(self, sock: socket.socket, request: Any) -> None:
        try:
            if request[0] == "claim":
                answer = self.store.claim(str(request[1]), request[2])
            else:
                _, prefix, count, patience_s = request
                answer = self.store.gather(
                    str(prefix), int(count), time.monotonic() + float(patience_s)
                )
            _send_record(sock, ["ok", answer])
        except RpcTimeoutError as error:
            _send_record(sock, ["late", str(error.message)])
        except WorkerLostError as error:
            _send_record(sock, ["lost", str(error.message)])
        except (TypeError, ValueError, IndexError, KeyError):
            raise ProtocolError("cannot read a store request: malformed") from None

    def _client_left(self) -> None:
        self.store.fail("a worker ended before all had come")  # those that came do not ask
        with self._lock:
            self._left -= 1
            last = self._left <= 0
        if last:
            self.close()

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class ServerStore(Store):
    """A store that lives in a `StoreServer`.

    Parameters
    ----------
    connect
        Returns a connected socket, or raises OSError while the server is not up.
    new_handshake
        Called with ``(True, uid of the peer or None)``.
    deadline
        Until when to keep trying (`time.monotonic` seconds).
    place
        The address, for error messages.
    """

    _PAUSE_S = 0.02

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        new_handshake: NewHandshake,
        deadline: float,
        place: str,
    ) -> None:
        self._socket = self._reach(connect, deadline, place)
        self._socket.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            _authenticate(self._socket, new_handshake(True, _peer_uid(self._socket)))
        except (TransportError, OSError) as error:
            self._socket.close()
            raise AuthenticationError(
                f"cannot join the world at {place}: the store there refused this worker ({error})",
                hint="all workers of a world need the same secret",
            ) from None

    def _reach(
        self, connect: Callable[[], socket.socket], deadline: float, place: str
    ) -> socket.socket:
        pause = threading.Event()
        while True:
            try:
                return connect()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RpcTimeoutError(
                        f"cannot reach the rendezvous store at {place}: {error.strerror or error}",
                        hint="start rank 0 there, or check MASTER_ADDR and MASTER_PORT",
                    ) from None
                pause.wait(self._PAUSE_S)

    @property
    def own_host(self) -> str:
        """The address of this process as the server sees it."""
        return str(self._socket.getsockname()[0])

    def _ask(self, request: Any) -> Any:
        _send_record(self._socket, request)
        verdict, answer = _receive_record(self._socket)
        if verdict == "late":
            raise RpcTimeoutError(answer)
        if verdict == "lost":
            raise WorkerLostError(answer)
        return answer

    def claim(self, key: str, value: Any) -> Any:
        return self._ask(["claim", key, value])

    def gather(self, prefix: str, count: int, deadline: float) -> dict[str, Any]:
        patience_s = max(0.0, deadline - time.monotonic())
        self._socket.settimeout(patience_s + 5.0)
        found: dict[str, Any] = self._ask(["gather", prefix, count, patience_s])
        return found

    def close(self) -> None:
        self._socket.close()
