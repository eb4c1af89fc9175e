"""How the workers of a world find each other.

Every worker publishes its name, incarnation and addresses in a store, and reads those of
all others. After that nobody needs the store: workers connect to each other on first use.

Without a secret the store is a Unix socket of the own user, named after the address, so
that a world started by hand on one host is closed to everybody else.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from distgrad.config import config
from distgrad.errors import (
    AuthenticationError,
    RpcTimeoutError,
    TransportError,
    WorkerLostError,
)
from distgrad.rpc.auth import HmacHandshake
from distgrad.rpc.environment import detect
from distgrad.rpc.options import RpcBackendOptions, check_name
from distgrad.rpc.store import FileStore, MemoryStore, ServerStore, Store, StoreServer
from distgrad.rpc.world import Member
from distgrad.transport.base import Handshake

__all__ = ["Place", "find_place", "meet"]


# Containers may share a host name and process ids; this differs. Drawn once, at import:
# workers that start at the same time on threads of one process must agree on it.
_PROCESS_MARK = secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a world meets, and this worker's number in it.

    Attributes
    ----------
    scheme
        ``tcp``, ``file`` or ``memory``.
    target
        ``(host, port)``, a path, or a `MemoryStore`.
    """

    rank: int
    world_size: int
    scheme: str
    target: Any


def find_place(
    init_method: Any, rank: int, world_size: int | None, environ: Mapping[str, str]
) -> Place:
    """Return where to meet, from the init method, the arguments and the environment.

    Raises
    ------
    ValueError
        If the rank, the world size or the address is missing or makes no sense; says
        which, and where it can be given.
    """
    for what, number in (("rank", rank), ("world_size", world_size)):
        if number is not None and not isinstance(number, int):
            raise TypeError(f"cannot join a world with {what}={number!r}: expected an integer")
    if isinstance(init_method, MemoryStore):
        return _checked(Place(rank, world_size or 0, "memory", init_method))
    url = urlsplit(str(init_method))
    if url.scheme == "env":
        return _from_environment(rank, world_size, environ)
    try:
        port = url.port
        query = {key: int(values[-1]) for key, values in parse_qs(url.query).items()}
    except ValueError as error:
        raise ValueError(f"cannot meet at {init_method!r}: {error}") from None
    rank = query.get("rank", rank) if rank < 0 else rank
    size = world_size or query.get("world_size", 0)
    if url.scheme == "tcp" and url.hostname and port:
        return _checked(Place(rank, size, "tcp", (url.hostname, port)))
    if url.scheme == "file" and url.path and url.netloc in ("", "localhost"):
        return _checked(Place(rank, size, "file", url.path))
    raise ValueError(
        f"cannot meet at {init_method!r}: expected env://, tcp://host:port or file:///path"
    )


def _from_environment(rank: int, world_size: int | None, environ: Mapping[str, str]) -> Place:
    found = detect(environ)
    if rank < 0 and found.rank is not None:
        rank = found.rank
    size = world_size or found.world_size or 0
    host, port = found.master_addr, found.master_port
    if (host is None or port is None) and size == 1:
        return _checked(Place(max(rank, 0), 1, "memory", MemoryStore()))
    if host is None or port is None:
        missing = "MASTER_ADDR" if host is None else "MASTER_PORT"
        raise ValueError(
            f"cannot meet at env://: {missing} is not set; start the script with "
            "`distgrad run`, set it, or pass init_method='tcp://host:port'"
        )
    return _checked(Place(rank, size, "tcp", (host, port)))


def _checked(place: Place) -> Place:
    if place.world_size < 1:
        raise ValueError(
            "cannot join a world: its size is unknown; pass world_size= or set WORLD_SIZE"
        )
    if not 0 <= place.rank < place.world_size:
        raise ValueError(
            f"cannot join a world of {place.world_size} as rank {place.rank}: "
            "pass rank= or set RANK to 0 .. world size - 1"
        )
    if place.scheme == "tcp" and not 0 < place.target[1] < 1 << 16:
        raise ValueError(f"cannot meet at port {place.target[1]}: a port is 1 to 65535")
    if place.world_size > 1 << 16:
        raise ValueError(f"cannot build a world of {place.world_size} workers: 65536 is the limit")
    return place


# --- meeting -----------------------------------------------------------------------------


class Meeting:
    """The store of a world, opened by one of its workers.

    Attributes
    ----------
    store
        To publish and gather in.
    host
        The address of this worker as the others see it; None on one host.
    """

    def __init__(self, place: Place, secret: bytes | None, deadline: float) -> None:
        self.place = place
        self.host: str | None = None
        self.deadline = deadline
        self._secret = secret
        self._server: StoreServer | None = None
        self.store = self._open()

    def _open(self) -> Store:
        if self.place.scheme == "memory":
            store: Store = self.place.target
            return store
        if self.place.scheme == "file":
            return FileStore(self.place.target)
        host, port = self.place.target
        remote = not _is_loopback(host)
        if remote and self._secret is None:
            raise AuthenticationError(
                f"cannot meet at {host}:{port}: that is another host, and this world has no secret",
                hint="set DISTGRAD_SECRET or DISTGRAD_SECRET_FILE (mode 0600) on every worker",
            )
        if self.place.rank == 0:
            return self._serve(host, port)
        return self._join(host, port, remote)

    def _serve(self, host: str, port: int) -> Store:
        sock = _listen_tcp(host, port) if self._secret else _listen_unix(port)
        self._server = StoreServer(
            sock, self._handshake, self.place.world_size - 1, config.handshake_timeout
        )
        if not _is_loopback(host):
            self.host = host
        if self.place.world_size == 1:
            self._server.close()
        return self._server.store

    def _join(self, host: str, port: int, remote: bool) -> Store:
        def connect() -> socket.socket:
            if self._secret:
                return socket.create_connection((host, port), timeout=5.0)
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(_unix_path(port)))
            except OSError:
                sock.close()
                raise
            return sock

        store = ServerStore(connect, self._handshake, self.deadline, f"{host}:{port}")
        if remote:
            self.host = store.own_host
        return store

    def _handshake(self, connecting: bool, peer_uid: int | None) -> Handshake:
        return HmacHandshake(
            self._secret,
            connecting=connecting,
            identity=(self.place.rank, 0),
            peer_uid=peer_uid,
            world="rendezvous",
        )

    def exchange(self, own: Member) -> list[Member]:
        """Publish this worker and return all, in the order of their ids.

        Raises
        ------
        RpcTimeoutError
            If not all arrive in time.
        ValueError
            If another worker has this rank or name, or another size of the world.
        """
        self._claim(own)
        records = self.store.gather("worker/", self.place.world_size, self.deadline)
        return sorted((_member(record) for record in records.values()), key=lambda m: m.id)

    def _claim(self, own: Member) -> None:
        """Publish this worker, unless that would make a world that cannot come about."""
        size = self.place.world_size
        first_size, first, first_rank = self.store.claim("world", [size, own.name, own.id])
        if first_size != size:
            raise self._misfit(
                own, f"it has world_size={size}, worker {first!r} (rank {first_rank}) {first_size}"
            )
        rank = self.store.claim(f"name/{own.name}", own.id)
        if rank != own.id:
            raise self._misfit(own, f"rank {rank} has that name")
        other = _member(self.store.claim(f"worker/{own.id}", list(own)))
        if other.incarnation != own.incarnation:
            raise self._misfit(own, f"worker {other.name!r} has that rank")

    def _misfit(self, own: Member, fact: str) -> ValueError:
        text = f"cannot join the world as worker {own.name!r} (rank {own.id}): {fact}"
        if self.place.scheme == "file":
            text += f"; or {self.place.target} is of another world: each needs a fresh file"
        return ValueError(text)

    def fail(self, name: str, error: BaseException) -> None:
        """Tell the others not to wait for this worker, which cannot join."""
        if not isinstance(error, RpcTimeoutError | WorkerLostError):
            fact = f"{type(error).__name__}: {error}"
            self.store.fail(f"worker {name!r} could not join: {fact.partition(chr(10))[0]}")

    def close(self) -> None:
        """Leave the meeting; the server ends by itself once all have left."""
        if self.place.scheme != "memory":
            self.store.close()
        if self._server is not None and self._secret is None:
            with contextlib.suppress(FileNotFoundError):
                _unix_path(self.place.target[1]).unlink()


def meet(place: Place, options: RpcBackendOptions) -> Meeting:
    """Open the meeting of a world."""
    return Meeting(place, options.find_secret(), time.monotonic() + config.rendezvous_timeout)


def new_member(
    name: str,
    rank: int,
    addresses: list[str],
    doors: Sequence[str],
    limits: Sequence[int],
) -> Member:
    """Describe this worker to the others, with a fresh incarnation."""
    host = f"{socket.gethostname()}/{_boot_id()}"
    return Member(
        check_name(name),
        rank,
        secrets.randbits(63) | 1,
        host,
        f"{host}/{os.getpid()}/{_PROCESS_MARK}",
        tuple(addresses),
        tuple(doors),
        tuple(limits),
    )


def _member(record: Any) -> Member:
    name, rank, incarnation, host, process, addresses, doors, limits = record
    return Member(
        check_name(name),
        int(rank),
        int(incarnation),
        str(host),
        str(process),
        tuple(addresses),
        tuple(doors),
        tuple(map(int, limits)),
    )


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise TransportError(
            f"cannot host the rendezvous at {host}:{port}: {error.strerror or error}",
            hint="another program, or another rank 0, uses the port: choose another MASTER_PORT",
        ) from None


def _unix_path(port: int) -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"distgrad-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise AuthenticationError(
            f"cannot use {folder}: it is not a directory that only this user can enter"
        )
    return folder / f"rendezvous-{port}.sock"


_binding = threading.Lock()


def _listen_unix(port: int) -> socket.socket:
    path = _unix_path(port)
    sock = socket.socket(socket.AF_UNIX)
    with _binding:
        try:
            _unlink_stale(path)
            sock.bind(str(path))
            sock.listen(128)
        except OSError as error:
            sock.close()
            raise TransportError(
                f"cannot host the rendezvous at {path}: {error.strerror or error}",
                hint="another rank 0 uses the port: choose another MASTER_PORT",
            ) from None
    return sock


def _unlink_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on any more."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
