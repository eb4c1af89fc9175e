"""Names, ids and options of workers."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distgrad.config import config
from distgrad.errors import AuthenticationError

__all__ = ["UNSET_RPC_TIMEOUT", "RpcBackendOptions", "WorkerInfo", "check_name"]

#: Stands for "the default timeout of the worker" in calls.
UNSET_RPC_TIMEOUT = -1.0

_NAME = re.compile(r"[A-Za-z0-9_:-]+")


class WorkerInfo(NamedTuple):
    """Name and id of a worker."""

    name: str
    id: int


@dataclass(kw_only=True)
class RpcBackendOptions:
    """How a worker runs.

    Parameters
    ----------
    rpc_timeout
        Default deadline of a call in seconds; 0 means none.
    init_method
        Where the world meets: ``env://``, ``tcp://host:port`` or ``file:///path``.
    num_worker_threads
        Most threads that serve calls, those not counted that wait for an answer themselves;
        None takes ``config.max_serving_threads``, which is the most of all. Threads are started
        on demand.
    device_maps
        Worker name to a map from local to remote devices.
    expose
        Patterns ``"module:name"`` or ``"module:*"`` of functions that others may call.
    secret
        Shared by the whole world; None reads ``DISTGRAD_SECRET`` or the file named by
        ``DISTGRAD_SECRET_FILE`` (mode 0600).
    host
        Address on which the TCP listener is reachable; None means loopback.
    heartbeat_interval
        Seconds from one look at each connected peer to the next; 0 for none. A peer whose
        process was stopped is lost within four times as long. One that computes, even in C code
        that holds the GIL, answers.
    """

    rpc_timeout: float = field(default_factory=lambda: config.rpc_timeout)
    init_method: Any = "env://"
    num_worker_threads: int | None = None
    device_maps: Mapping[str, Mapping[Any, Any]] | None = None
    expose: Sequence[str] = ()
    secret: bytes | str | None = None
    host: str | None = None
    heartbeat_interval: float = field(default_factory=lambda: config.heartbeat_interval)

    def __post_init__(self) -> None:
        _check(self, "rpc_timeout", (int, float), "seconds")
        _check(self, "heartbeat_interval", (int, float), "seconds")
        if self.num_worker_threads is not None:
            _check(self, "num_worker_threads", (int,), "a number of threads", least=1)
        if self.secret is not None:
            _check(self, "secret", (str, bytes), "text or bytes")
        if self.host is not None:
            _check(self, "host", (str,), "a name or address")
        patterns = (self.expose,) if isinstance(self.expose, str) else self.expose
        is_list = isinstance(patterns, Iterable)
        self.expose = tuple(patterns) if is_list else ()
        if not is_list or not all(isinstance(pattern, str) for pattern in self.expose):
            raise TypeError(
                f"cannot use expose={patterns!r}: expected texts 'module:name'; functions "
                "themselves are decorated with rpc.expose"
            )

    def find_secret(self) -> bytes | None:
        """Return the world's secret from the options, the environment or the secret file.

        Raises
        ------
        AuthenticationError
            If the secret is empty, or its file can be read by others.
        """
        text = self.secret if self.secret is not None else os.environ.get("DISTGRAD_SECRET")
        path = os.environ.get("DISTGRAD_SECRET_FILE")
        if text is None and path:
            text = _read_secret(Path(path))
        if text is None:
            return None
        secret = text.encode() if isinstance(text, str) else text
        if not secret:
            raise AuthenticationError("cannot use the secret of this world: it is empty")
        return secret


def _check(
    options: RpcBackendOptions, name: str, types: tuple[type, ...], wanted: str, least: float = 0
) -> None:
    """Refuse a value of another type, and a number that is too small or none at all."""
    value = getattr(options, name)
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"cannot use {name}={value!r}: expected {wanted}")
    if isinstance(value, (int, float)) and not value >= least:  # true of NaN
        raise ValueError(f"cannot use {name}={value!r}: expected {wanted}, {least:g} or more")


def _read_secret(path: Path) -> bytes:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_bytes().strip()
    except OSError as error:
        raise AuthenticationError(f"cannot read the secret file {path}: {error.strerror}") from None
    if mode & 0o077:
        raise AuthenticationError(
            f"cannot use the secret file {path}: others may read it (mode {mode:04o})",
            hint=f"chmod 600 {path}",
        )
    return text


def check_name(name: str) -> str:
    """Return a worker's name if it is one.

    Raises
    ------
    ValueError
        If it is empty, longer than 127 characters, or has others than letters, digits,
        ``-``, ``_`` and ``:``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 127:
        raise ValueError(
            f"cannot name a worker {name!r}: a name has 1 to 127 letters, digits, '-', '_' or ':'"
        )
    return name
