# cython: annotation_typing=False
"""The nodes at the two ends of a message of the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from distgrad._core import GraphTask, Tensor, gradient_edge
from distgrad.graph._node import Node, TensorBase
from distgrad.rpc.activity import worker_or_none

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
    what
        The call that the message belongs to: as its request is called in errors, or for an
        answer the name of the function or the id of the RRef that was asked for.
    is_response
        Whether the message is an answer.
    """

    __slots__ = ("_grads", "is_response", "message_id", "peer", "what")

    def __init__(
        self,
        tensors: Sequence[Tensor],
        message_id: int,
        peer: int,
        what: object = "",
        is_response: bool = False,
    ) -> None:
        self.passes_on = True
        self._link(tensors, len(tensors))  # as super().__init__ does, without a list of edges
        self.message_id = message_id
        self.peer = peer
        self.what = what
        self.is_response = is_response
        self._grads: tuple[Any, ...] | None = None

    def apply(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hand the gradients on unchanged."""
        return grads

    def described(self) -> str:
        """Return which message this is, for people."""
        if not self.is_response:
            return str(self.what)
        what = f"RRef {self.what:#x}" if isinstance(self.what, int) else f"call {self.what}"
        return f"answer to {what}"

    def set_grads(self, grads: Sequence[Any]) -> None:
        """Keep gradients, one or None for each tensor of the message.

        For whoever looks at nodes; passes do not, since a gradient that is kept cannot be
        added to in place.
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
        self._link((), slots)
        self.boundary = True
        self.message_id = message_id
        self.peer = peer
        self.context_id = context_id

    def refusal(self, inputs: Sequence[TensorBase] | None = None) -> Exception | None:
        """Return the error of a pass on this worker alone; it says if the context is finished.

        Gradients of inputs come through here if the inputs were sent before this was received.
        """
        worker = worker_or_none()
        if worker is None:
            return super().refusal(inputs)
        engine = worker.extensions["autograd"]
        part = engine.parts.get(self.context_id)
        if part is None:
            error: Exception | None = engine.missing(self.context_id)
        elif inputs is None or self._may_come_from(part.sends.values(), inputs):
            error = super().refusal(inputs)
        else:
            error = None
        if error is not None:
            error.add_note(f"it leads to a tensor that worker {self.peer} sent in that context")
        return error

    def _may_come_from(self, sends: Iterable[Node], inputs: Sequence[TensorBase]) -> bool:
        now = self._sequence_nr()
        sent = GraphTask((), sends=[node for node in sends if node._sequence_nr() < now])
        return any(sent.reaches(gradient_edge(x)[0]) for x in inputs)
