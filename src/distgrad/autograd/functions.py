"""The nodes at the two ends of a message of the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distgrad._core import Node, Tensor, gradient_edge

__all__ = ["RecvRpcBackward", "SendRpcBackward"]


class SendRpcBackward(Node):
    """Where the gradients of tensors that were sent come in.

    Its edges lead to the histories of the tensors of one message that require grad, in the
    order of the message.

    Parameters
    ----------
    tensors
        Those tensors.
    message_id
        Autograd message id.
    peer
        Id of the worker that the message went to.
    """

    __slots__ = ("_grads", "message_id", "peer")

    def __init__(self, tensors: Sequence[Tensor], message_id: int, peer: int) -> None:
        super().__init__([gradient_edge(tensor) for tensor in tensors], len(tensors))
        self.message_id = message_id
        self.peer = peer
        self._grads: tuple[Any, ...] | None = None

    def apply(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hand the gradients on unchanged."""
        return grads

    def set_grads(self, grads: Sequence[Any]) -> None:
        """Keep gradients, one or None for each tensor of the message.

        Passes call this only when ``config.trace_graph`` is set: a gradient that is kept
        cannot be added to in place.
        """
        if len(grads) != self.num_inputs:
            raise ValueError(
                f"cannot set {len(grads)} gradients: the message has {self.num_inputs} tensors"
            )
        self._grads = tuple(grads)

    def get_grads(self) -> tuple[Any, ...] | None:
        """Return the gradients that were kept last, or None."""
        return self._grads


class RecvRpcBackward(Node):
    """Where the gradients of tensors that were received go out to their sender.

    Parameters
    ----------
    slots
        Number of tensors of the message that require grad.
    message_id
        Autograd message id.
    peer
        Id of the worker that the message came from.
    context_id
        The context in which it was received; the node does not keep the context alive.
    """

    __slots__ = ("context_id", "message_id", "peer")

    def __init__(self, slots: int, message_id: int, peer: int, context_id: int) -> None:
        super().__init__((), slots)
        self.boundary = True
        self.message_id = message_id
        self.peer = peer
        self.context_id = context_id
