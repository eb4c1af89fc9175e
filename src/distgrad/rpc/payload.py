"""The values of messages: what the codec asks about tensors and other rich types.

A `Session` accompanies one message through the codec, on either side. It collects the
tensors that require grad, in slot order, for the autograd hook.
"""

from __future__ import annotations

import numpy as np

from distgrad import _codec
from distgrad._core import Tensor
from distgrad.config import config
from distgrad.rpc._exchange import Session
from distgrad.rpc.options import WorkerInfo

__all__ = ["Session", "apply_limits", "register_type"]


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
