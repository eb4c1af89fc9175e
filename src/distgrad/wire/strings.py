"""Arrays of strings of any length (`numpy.dtypes.StringDType`), as values that can be sent.

Their items are pointers, so they travel as two plain arrays: the length of each string in
bytes of UTF-8, -1 where one is missing, in the shape and order of the array; and the text of
all of them. What a receiver allocates is in proportion to the bytes of both, since neither
may be a reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distgrad.errors import ProtocolError
from distgrad.wire._schema import Unsendable, register_type

__all__ = ["pack", "unpack"]

_CHUNK = 4096  # strings that are Python objects at one time
_Array = np.ndarray[Any, Any]


def _is_fortran(array: _Array) -> bool:
    return array.flags.f_contiguous and not array.flags.c_contiguous


def _line(array: _Array) -> _Array:
    """Return the items one behind the other; a view, unless there are gaps between them."""
    return (array.T if _is_fortran(array) else array).reshape(-1)


def _is_missing(mark: object) -> bool:
    return mark is None or (type(mark) is float and mark != mark)


def pack(array: _Array, session: object) -> tuple[Any, ...]:
    """Return lengths, text, what stands for a missing string if anything does, and `coerce`."""
    dtype: Any = array.dtype
    missing = (dtype.na_object,) if hasattr(dtype, "na_object") else ()
    if missing and not _is_missing(missing[0]):
        raise Unsendable(
            f"an array of strings with na_object={missing[0]!r:.40}",
            "give its dtype na_object=None or nan, or none at all",
        )
    lengths = np.empty(array.shape, np.int32, "F" if _is_fortran(array) else "C")
    line, lengths_line = _line(array), _line(lengths)
    text = bytearray()
    for start in range(0, line.size, _CHUNK):
        items = line[start : start + _CHUNK].tolist()
        pieces = [item.encode() if type(item) is str else None for item in items]
        try:
            lengths_line[start : start + _CHUNK] = [-1 if p is None else len(p) for p in pieces]
        except OverflowError:
            raise Unsendable("a string of 2 GiB or more", "send it in parts") from None
        text += b"".join(filter(None, pieces))
    return lengths, np.frombuffer(text, np.uint8), missing, dtype.coerce


def _refused(fact: str) -> ProtocolError:
    return ProtocolError(f"cannot decode message: {fact} of an array of strings")


def unpack(value: Any, session: object) -> _Array:
    """Return the array that `pack` took apart.

    Raises
    ------
    ProtocolError
        The parts do not fit together, or the text is not UTF-8.
    """
    if type(value) is not tuple or len(value) != 4:
        raise _refused("not the parts")
    lengths, text, missing, coerce = value
    if not all(type(part) is np.ndarray for part in (lengths, text)) or (
        lengths.dtype != np.int32 or text.dtype != np.uint8 or text.ndim != 1
    ):
        raise _refused("not the lengths and the text")
    if type(missing) is not tuple or len(missing) > 1 or not all(map(_is_missing, missing)):
        raise _refused("not the mark for missing items")
    if type(coerce) is not bool:
        raise _refused("not the flags")
    lengths = lengths.copy("K")  # in shared memory the sender could change it after the checks
    line = _line(lengths)
    if line.min(initial=0) < -len(missing):
        raise _refused("a negative length")
    if int(np.maximum(line, 0).sum(dtype=np.int64)) != text.size:
        raise _refused("lengths that do not add up to the text")
    marks = {"na_object": missing[0]} if missing else {}
    strings = np.empty_like(lengths, np.dtypes.StringDType(coerce=coerce, **marks))
    _fill(_line(strings), line, text, missing)
    return strings


def _fill(strings: _Array, lengths: _Array, text: _Array, missing: tuple[Any, ...]) -> None:
    begin = 0
    for start in range(0, strings.size, _CHUNK):
        sizes = lengths[start : start + _CHUNK].tolist()
        end = begin + sum(max(size, 0) for size in sizes)
        data = text[begin:end].tobytes()
        items, at = [], 0
        for size in sizes:
            items.append(missing[0] if size < 0 else data[at : at + size].decode())
            at += max(size, 0)
        strings[start : start + _CHUNK] = items
        begin = end


register_type(np.ndarray, "strings", pack, unpack, alone=True)
