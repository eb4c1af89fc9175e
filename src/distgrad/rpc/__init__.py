"""Calls between workers: futures, remote references, and what may be called.

See `init_rpc` for joining a world, `rpc_sync` for the rules of a call, and `expose` for
what others may call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distgrad.errors import (
    AuthenticationError,
    NotExposedError,
    OwnerLostError,
    RemoteError,
    RpcTimeoutError,
    SerializationError,
    TransportError,
    UnknownWorkerError,
    WorkerLostError,
)
from distgrad.rpc import functions
from distgrad.rpc.activity import current_worker, deadline
from distgrad.rpc.calls import rpc_async, rpc_sync
from distgrad.rpc.exposure import expose
from distgrad.rpc.future import Future, collect_all, wait_all
from distgrad.rpc.lifecycle import init_rpc, shutdown
from distgrad.rpc.options import UNSET_RPC_TIMEOUT, RpcBackendOptions, WorkerInfo
from distgrad.rpc.payload import register_type
from distgrad.rpc.queries import debug_info, get_worker_info, is_available
from distgrad.rpc.worker import Worker

if TYPE_CHECKING:
    from distgrad.rref import RRef
    from distgrad.rref.remote import remote as remote

__all__ = [
    "UNSET_RPC_TIMEOUT",
    "AuthenticationError",
    "Future",
    "NotExposedError",
    "OwnerLostError",
    "RRef",
    "RemoteError",
    "RpcBackendOptions",
    "RpcTimeoutError",
    "SerializationError",
    "TransportError",
    "UnknownWorkerError",
    "Worker",
    "WorkerInfo",
    "WorkerLostError",
    "collect_all",
    "current_worker",
    "deadline",
    "debug_info",
    "expose",
    "functions",
    "get_worker_info",
    "init_rpc",
    "is_available",
    "register_type",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
    "wait_all",
]


def __getattr__(name: str) -> Any:
    # Remote references stand above rpc, and users look for them here.
    if name in ("RRef", "remote"):
        from importlib import import_module

        found = globals()[name] = getattr(import_module("distgrad.rref"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
