"""Repair what a mutation broke: lengths and checksums, so that inputs reach what lies behind."""

from __future__ import annotations

import struct

from distgrad._codec import _crc32c

HEADER = 64
_MOST_BUFFERS = 16


def mend_frame(data: bytearray, start: int, *, whole: bool) -> int:
    """Give the frame at `start` a header that fits; return where the next one starts.

    Parameters
    ----------
    whole
        Whether the frame fills the rest of the data: its meta block takes what the payload
        leaves.
    """
    if len(data) - start <= HEADER:
        data += bytes(start + HEADER + 1 - len(data))
    room = len(data) - start - HEADER
    kind, _, meta, num_buffers, payload = _lengths(data, start)
    num_buffers %= _MOST_BUFFERS + 1
    table = 8 * num_buffers + -8 * num_buffers % 16
    if num_buffers == 0 or table + 2 > room:
        num_buffers = table = payload = 0
    else:
        payload = min(max(_payload(data, start, num_buffers) or payload, 1), room - table - 1)
    meta = room - payload if whole else min(max(meta, table + 1), room - payload)
    data[start] = 1
    data[start + 1] = kind or 1
    data[start + 3] = 0
    struct.pack_into("<I", data, start + 4, meta)
    struct.pack_into("<HHQ", data, start + 44, num_buffers, 0, payload)
    crc = _crc32c(data[start : start + 56] + data[start + HEADER : start + HEADER + meta])
    struct.pack_into("<II", data, start + 56, crc, 0)
    return start + HEADER + meta + payload


def _lengths(data: bytearray, start: int) -> tuple[int, int, int, int, int]:
    kind, flags, meta = struct.unpack_from("<xBHI", data, start)
    num_buffers, payload = struct.unpack_from("<H2xQ", data, start + 44)
    return kind, flags, meta, num_buffers, payload


def _payload(data: bytearray, start: int, num_buffers: int) -> int:
    """Add up the buffer table; 0 if it makes no sense."""
    if len(data) < start + HEADER + 8 * num_buffers:
        return 0
    total = 0
    for nbytes in struct.unpack_from(f"<{num_buffers}Q", data, start + HEADER):
        total += -total % 64 + nbytes
    return total if total < 2**20 else 0
