"""The one place where a layer above RPC sees the tensors of messages.

RPC knows no autograd. It offers an outgoing and an incoming hook; distributed autograd
implements them (`Worker.payload_hook`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from distgrad._codec import Frame

if TYPE_CHECKING:
    from distgrad._core import Tensor
    from distgrad.rpc.worker import Worker

__all__ = ["Handler", "PayloadHook"]

#: Called with (worker, sender id, frame, fields) for a message of its kind.
Handler = Callable[["Worker", int, Frame, Any], Any]


class PayloadHook(Protocol):
    """What happens to tensors that require grad when a message carries them."""

    def outgoing(
        self, worker: Worker, to_id: int, tensors: list[Tensor], is_response: bool, what: object
    ) -> tuple[int, int]:
        """Record a message that is about to leave.

        Parameters
        ----------
        worker
            The sender.
        to_id
            Id of the receiver.
        tensors
            The tensors of the message that require grad, each once, in slot order; none
            under `no_grad`.
        is_response
            Whether the message answers a request.
        what
            For people: the name of a request; for an answer what the request began with,
            which is the function's name or the id of an RRef.

        Returns
        -------
        tuple of int
            Context id and autograd message id for the header; 0 means none.
        """

    def undelivered(self, worker: Worker, context_id: int, message_id: int) -> None:
        """Take back a record: the message never left."""

    def uncertain(self, worker: Worker, context_id: int, message_id: int) -> None:
        """Note that the receiver may never have seen the message."""

    def incoming(
        self, worker: Worker, from_id: int, context_id: int, message_id: int, tensors: list[Tensor]
    ) -> None:
        """Attach a history to the tensors (slot order) of a message that arrived."""

    def enter(self, worker: Worker, context_id: int) -> None:
        """Make the context current for the rest of the task that serves a call."""
