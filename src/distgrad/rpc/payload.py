"""The values of messages: what the codec asks about tensors and other rich types.

A `Session` accompanies one message through the codec, on either side. It collects the
tensors that require grad, in slot order, for the autograd hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from distgrad import _codec
from distgrad._core import Tensor
from distgrad.config import config
from distgrad.rpc.options import WorkerInfo

if TYPE_CHECKING:
    from distgrad.rpc.worker import Worker

__all__ = ["Session", "apply_limits", "register_type"]


class Session:
    """What one message carries besides plain values.

    Attributes
    ----------
    worker
        The worker that encodes or decodes.
    peer_id
        The worker at the other end.
    tensors
        Tensors that require grad, each once, in slot order.
    awaited
        Futures that must be done before the message is served (set by RRef arguments).
    undo
        What to call if the message never leaves.
    """

    __slots__ = ("_slots", "awaited", "peer_id", "tensors", "undo", "worker")

    def __init__(self, worker: Worker, peer_id: int) -> None:
        self.worker = worker
        self.peer_id = peer_id
        self.tensors: list[Tensor] = []
        self._slots: dict[int, int] | None = None
        self.awaited: list[Any] | None = None
        self.undo: list[Callable[[], None]] | None = None

    def take_back(self) -> None:
        """Undo what encoding recorded: the message never left."""
        for undo in self.undo or ():
            undo()

    def slot_of(self, tensor: Tensor) -> int:
        """Return the slot of a tensor in this message; a new one on first sight."""
        if self._slots is None:
            self._slots = {}
        slot = self._slots.setdefault(id(tensor), len(self.tensors))
        if slot == len(self.tensors):
            self.tensors.append(tensor)
        return slot


def _unwrap(tensor: Tensor, session: Session | None) -> tuple[np.ndarray, bool, int]:
    if not tensor.requires_grad:
        return tensor.data, False, -1
    return tensor.data, True, -1 if session is None else session.slot_of(tensor)


def _wrap(array: np.ndarray, requires_grad: bool, slot: int, session: Session | None) -> Tensor:
    tensor = Tensor(array, requires_grad=requires_grad)
    if session is not None and requires_grad and slot == len(session.tensors):
        session.tensors.append(tensor)
    return tensor


_codec.set_tensor_type(Tensor, _unwrap, _wrap)
_codec.register_type(
    WorkerInfo,
    "distgrad.WorkerInfo",
    lambda info, session: (info.name, info.id),
    lambda value, session: WorkerInfo(*value),
)

register_type = _codec.register_type


def apply_limits() -> None:
    """Hand the limits of `config` to the codec of this process."""
    _codec.configure(
        max_depth=config.max_depth,
        max_meta_bytes=config.max_meta_bytes,
        max_payload_bytes=config.max_payload_bytes,
        max_items=config.max_items,
        max_buffers=config.max_buffers,
        inline_array_bytes=config.inline_array_bytes,
    )
