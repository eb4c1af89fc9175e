"""Calling functions on other workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distgrad.rpc._exchange import allowed_timeout, call_arguments, place_call
from distgrad.rpc.future import Future
from distgrad.rpc.options import UNSET_RPC_TIMEOUT, WorkerInfo

__all__ = ["allowed_timeout", "call_arguments", "rpc_async", "rpc_sync"]


def rpc_sync(
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> Any:
    """Call a function on another worker and return its value.

    Parameters
    ----------
    to
        Name, id or `WorkerInfo` of the callee; the own worker is allowed.
    func
        A function that the callee exposes; it travels by name.
    args, kwargs
        Its arguments. Arrays and tensors arrive as copies that the callee owns.
    timeout
        Seconds until the call fails; 0 for never. By default the worker's
        ``rpc_timeout``. A call made while serving another one never outlives it.

    Returns
    -------
    object
        A copy of what the function returned.

    Raises
    ------
    UnknownWorkerError, NotExposedError, SerializationError
        If the call cannot be made; nothing has run then.
    RpcTimeoutError
        If there is no answer in time. The callee may still run the function.
    WorkerLostError
        If the callee is lost before it answers.
    Exception
        What the function raised, with the remote traceback; its own class where it is
        known here, otherwise `RemoteError`.
    """
    return place_call(to, func, args, kwargs, timeout, True).wait()


def rpc_async(
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> Future:
    """Call a function on another worker; return a `Future` of its value at once.

    Takes the arguments of `rpc_sync`. Arguments are encoded before it returns, so they
    may be changed afterwards. What `rpc_sync` raises about the call itself is raised
    here, the rest by the future.
    """
    return place_call(to, func, args, kwargs, timeout, False)
