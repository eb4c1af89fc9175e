# cython: annotation_typing=False
"""What autograd records of the messages of the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distgrad._core import set_history
from distgrad.autograd._current import current
from distgrad.autograd.functions import RecvRpcBackward, SendRpcBackward

if TYPE_CHECKING:
    from distgrad._core import Tensor
    from distgrad.autograd.engine import Engine
    from distgrad.rpc import Worker

__all__ = ["Recorder"]


class Recorder:
    """Adds the messages of one worker to its contexts: its `PayloadHook`.

    A call made inside a context carries the context's id whether or not it has tensors, so
    that the callee's own calls join the context. Under `no_grad` nothing is recorded.

    Parameters
    ----------
    engine
        The worker's contexts.
    """

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def outgoing(
        self, worker: Worker, to_id: int, tensors: list[Tensor], is_response: bool, what: object
    ) -> tuple[int, int]:
        """Record a send for the tensors that require grad."""
        part = current.get()
        if part is None or part.host is not self._engine:
            return 0, 0
        if part.released:
            if tensors:
                self._engine.refuse_orphan(part.context_id)
            return 0, 0
        context_id = part.context_id
        part.known.add(to_id)
        if part.table.owes:
            for end in part.table.ends_for(to_id):
                worker.post(to_id, end, context_id=context_id)
        if not tensors:
            return context_id, 0
        message_id = next(self._engine.message_ids)
        node = SendRpcBackward(tensors, message_id, to_id, what, is_response)
        part.record_send(node)
        return context_id, message_id

    def undelivered(self, worker: Worker, context_id: int, message_id: int) -> None:
        """Remove the send of a message that never left."""
        part = self._engine.parts.get(context_id)
        if part is not None:
            part.drop_send(message_id)

    def uncertain(self, worker: Worker, context_id: int, message_id: int) -> None:
        """Have the next passes ask the receiver whether it knows the message."""
        part = self._engine.parts.get(context_id)
        if part is not None:
            part.doubt_send(message_id)

    def incoming(
        self, worker: Worker, from_id: int, context_id: int, message_id: int, tensors: list[Tensor]
    ) -> None:
        """Record a recv and make it the history of the tensors.

        Tensors of a context that is finished stay leaves.
        """
        part = self._engine.part(context_id)
        if part is None:
            return
        node = RecvRpcBackward(len(tensors), message_id, from_id, context_id)
        for slot, tensor in enumerate(tensors):
            set_history(tensor, node, slot)
        part.record_recv(node)

    def enter(self, worker: Worker, context_id: int) -> None:
        """Make the context current for the rest of a task, or none if it is finished."""
        part = self._engine.part(context_id)
        if part is None:
            self._engine.refuse_orphan(context_id)
        current.set(part)
