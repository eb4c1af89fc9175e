"""The values of messages: what the codec asks about tensors and other rich types.

A `Session` accompanies one message through the codec, on either side. It collects the
tensors that require grad, in slot order, for the autograd hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from distgrad import _codec
from distgrad._core import Tensor
from distgrad.config import config
from distgrad.errors import SerializationError
from distgrad.message import KINDS
from distgrad.rpc._exchange import Session, unwrap_tensor, wrap_tensor
from distgrad.rpc.exposure import name_of
from distgrad.rpc.options import WorkerInfo

__all__ = ["Session", "apply_limits", "register_type"]

T = TypeVar("T")


_codec.set_tensor_type(Tensor, unwrap_tensor, wrap_tensor)
_codec.register_type(
    WorkerInfo,
    "distgrad.WorkerInfo",
    lambda info, session: (info.name, info.id),
    lambda value, session: WorkerInfo(*value),
)

for _code, _kind in KINDS.items():
    _codec.name_fields(_code, _kind._fields)  # type: ignore[attr-defined]


def register_type(
    cls: type[T],
    encode: Callable[[T], Any],
    decode: Callable[[Any], T],
    *,
    name: str | None = None,
) -> None:
    """Let instances of a class be sent, as the values that a function makes of them.

    Call it in every process that sends or receives them, best in the module of the class.

    Parameters
    ----------
    cls
        Exactly this class; subclasses are registered on their own.
    encode
        ``encode(obj)`` returns something that can be sent, without ``obj`` itself.
    decode
        ``decode(value)`` makes an instance again. The value comes from a peer: check it.
        What it raises fails the call that carries the value.
    name
        Of the class on the wire; by default its module and qualified name.

    Raises
    ------
    ValueError
        If the name belongs to another class.
    """
    if not isinstance(cls, type) or not callable(encode) or not callable(decode):
        raise TypeError(
            f"cannot register {cls!r}: expected a class, a function that makes values of its "
            "instances, and one that makes instances of values"
        )
    wire_name = name or name_of(cls)

    def receive(value: Any, session: Session | None) -> T:
        try:
            return decode(value)
        except Exception as error:
            raise SerializationError(
                f"cannot receive a value of type {wire_name}: {type(error).__name__}: {error}"
            ) from error

    _codec.register_type(cls, wire_name, lambda obj, session: encode(obj), receive)


def apply_limits() -> tuple[int, ...]:
    """Hand the limits of `config` to the codec of this process; return what others must keep."""
    _codec.configure(
        max_depth=config.max_depth,
        max_meta_bytes=config.max_meta_bytes,
        max_payload_bytes=config.max_payload_bytes,
        max_items=config.max_items,
        max_buffers=config.max_buffers,
        inline_array_bytes=config.inline_array_bytes,
    )
    return _codec.receivable()
