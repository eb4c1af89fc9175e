"""Requests that wait for their answer.

Invariants
    1. Every request that is pending ends: by its answer, its deadline, the loss of its
       peer, or the end of this worker.
    2. It ends once: whoever takes it out of the table completes its future.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from distgrad.errors import DistgradError, RpcTimeoutError
from distgrad.rpc.future import FAILED, PENDING, Future

if TYPE_CHECKING:
    from distgrad.rpc.agent import Agent

__all__ = ["PendingRequests", "RpcFuture"]


class RpcFuture(Future):
    """The answer of another worker to one request.

    Attributes
    ----------
    peer
        Id of the worker that was asked.
    deadline
        When to give up (`time.monotonic` seconds), infinite for never.
    request_id
        Names the request on the wire.
    context_id, message_id
        What autograd recorded with the request; 0 is none.
    what
        Names the request in errors.
    """

    __slots__ = ("context_id", "deadline", "message_id", "peer", "request_id", "timeout", "what")

    def __init__(
        self, agent: Agent, peer: int, request_id: int, chain: Hashable, what: str
    ) -> None:
        self._state = PENDING
        self._value = None
        self._callbacks = None
        self._waiters = None
        self._observed = False
        self._agent = agent
        self.chain = chain
        self.peer = peer
        self.request_id = request_id
        self.what = what
        self.context_id = 0
        self.message_id = 0
        self.timeout = 0.0
        self.deadline = float("inf")

    def cancel(self) -> bool:
        """Give up on the answer; the callee drops the request if it has not started."""
        if not super().cancel():
            return False
        assert self._agent is not None
        self._agent.forget(self)
        return True


class PendingRequests:
    """The requests of one worker that wait for their answer.

    Parameters
    ----------
    forget
        Called with each request that is given up, to tell the callee.
    name_of
        Names a worker by its id.
    """

    def __init__(self, forget: Callable[[RpcFuture], None], name_of: Callable[[int], str]) -> None:
        self._forget = forget
        self._name_of = name_of
        self._requests: dict[int, RpcFuture] = {}
        self.add = self._requests.__setitem__

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, request_id: int, peer: int) -> RpcFuture | None:
        """Return the request if it is pending and ``peer`` is who was asked."""
        future = self._requests.get(request_id)
        return future if future is not None and future.peer == peer else None

    def take(self, request_id: int) -> RpcFuture | None:
        """Take a request out; None if it has ended already."""
        return self._requests.pop(request_id, None)

    def expire(self, now: float) -> float:
        """Fail what is overdue; return when the next request will be."""
        soonest = float("inf")
        for future in list(self._requests.values()):
            if future.deadline <= now:
                self._time_out(future)
            elif future.deadline < soonest:
                soonest = future.deadline
        return soonest

    def _time_out(self, future: RpcFuture) -> None:
        self._forget(future)
        error = RpcTimeoutError(
            f"cannot finish {future.what} on worker {self._name_of(future.peer)!r}: "
            f"no answer within {future.timeout:g} s",
            hint="pass a longer timeout (seconds), or 0 for none",
        )
        future._try_complete(FAILED, error)

    def lose(self, peer: int, why: Exception) -> None:
        """Fail all requests to a peer that is lost."""
        for future in list(self._requests.values()):
            if future.peer == peer and self.take(future.request_id) is not None:
                error = type(why)(f"cannot finish {future.what}: {why}")
                future._try_complete(FAILED, error)

    def end(self) -> None:
        """Fail everything: the worker was shut down."""
        for future in list(self._requests.values()):
            if self.take(future.request_id) is not None:
                error = DistgradError(f"cannot finish {future.what}: the worker was shut down")
                future._try_complete(FAILED, error)
                future._observed = True
