"""Calling functions on other workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distgrad.errors import RpcTimeoutError
from distgrad.message import Call, code_of
from distgrad.rpc.activity import activity, current_worker
from distgrad.rpc.exposure import name_of
from distgrad.rpc.future import Future
from distgrad.rpc.options import UNSET_RPC_TIMEOUT, WorkerInfo
from distgrad.rpc.pending import RpcFuture
from distgrad.rpc.worker import Worker

__all__ = ["allowed_timeout", "rpc_async", "rpc_sync"]

_CALL = code_of(Call)


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
    worker = current_worker()
    now = activity.get(None)
    chain = 0 if now is None else now.chain
    return _call(worker, to, func, args, kwargs, timeout, chain).wait()


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
    return _call(current_worker(), to, func, args, kwargs, timeout, 0)


def _call(
    worker: Worker,
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    timeout: float,
    chain: int,
) -> RpcFuture:
    name = name_of(func)
    body = (name, () if args is None else tuple(args), dict(kwargs) if kwargs else None)
    return worker.agent.request(
        worker.world.id_of(to),
        _CALL,
        body,
        timeout=allowed_timeout(worker, timeout, name),
        chain=chain,
        what=f"call {name}",
    )


def allowed_timeout(worker: Worker, timeout: float, what: str) -> float:
    """Return how long a new call may take: what is asked for, and within the call served.

    Raises
    ------
    ValueError
        If the timeout is negative.
    RpcTimeoutError
        If the call being served has expired.
    """
    if timeout < 0:
        if timeout != UNSET_RPC_TIMEOUT:
            raise ValueError(f"cannot call {what} with timeout={timeout!r}: it is negative")
        timeout = worker.options.rpc_timeout
    now = activity.get(None)
    if now is None or now.deadline is None:
        return timeout
    left = now.deadline - time.monotonic()
    if left <= 0:
        raise RpcTimeoutError(f"cannot call {what}: the call being served here has expired")
    return min(timeout, left) if timeout else left
