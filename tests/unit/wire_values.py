"""Round trips through the codec, and what it means that a value came back the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from distgrad._codec import Frame, Outgoing, _recompute_crc, decode, encode, parse


def whole(message: Outgoing) -> bytes:
    """Return the bytes of a message as they stand on the wire."""
    return b"".join(message.parts())


def frame_of(value: object, session: object = None) -> Frame:
    """Return the frame in which a value arrives."""
    return parse(whole(encode(1, value, session)))


def frame_with(meta: bytes) -> Frame:
    """Return a frame with a meta block of one's own making and a correct crc."""
    frame = bytearray(64) + meta
    frame[0] = frame[1] = 1
    frame[4:8] = len(meta).to_bytes(4, "little")
    _recompute_crc(frame)
    return parse(frame)


def round_trip(value: Any, session: object = None) -> Any:
    """Return what arrives if `value` is sent."""
    return decode(frame_of(value, session), session)


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal in type, parts and bits, nan like nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return same_array(a, b)
    if isinstance(a, np.generic):
        return bool(a.dtype == b.dtype) and same_array(np.asarray(a), np.asarray(b))
    if isinstance(a, float | complex):
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    if isinstance(a, slice):
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, set | frozenset):
        return same(sorted(a, key=repr), sorted(b, key=repr))
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    return bool(a == b)


def same_array(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind == "T":  # pointers; the dtypes may hold different nans
        return same(a.tolist(), b.tolist())
    if a.dtype.char == "G":
        return same_array(a.real, b.real) and same_array(a.imag, b.imag)
    if a.dtype.char == "g":  # ten bytes of sixteen count; the others are whatever was there
        return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b))
    return a.tobytes() == b.tobytes()
