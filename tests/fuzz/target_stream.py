"""A stream of frames in pieces of any size, through a socket: the parser of a connection."""

from __future__ import annotations

import socket

from mending import mend_frame

from distgrad._codec import Frame, decode, encode
from distgrad.errors import ProtocolError, TransportError
from distgrad.transport._poller import Poller
from distgrad.transport._stream import StreamConnection

_GREETING = encode(1, "a message that crosses the nonsense")


def one(data: bytes) -> None:
    """Feed a connection; the first byte says in pieces of which size, at most 64 of them."""
    if not data:
        return
    step = max(data[0] ** 2, len(data) // 64, 1)
    near, far = socket.socketpair()
    poller = Poller()
    connection = StreamConnection(
        poller, near.detach(), scheme="fuzz", peer_address="nobody", identity=(1, 1)
    )
    events = []
    try:
        for start in range(1, len(data), step):
            far.send(data[start : start + step], socket.MSG_NOSIGNAL)
            events += poller.poll(0, False)
            if connection.closed:
                break
            connection.send(_GREETING)
    except (BrokenPipeError, ConnectionResetError, TransportError):
        pass  # it was given up
    finally:
        far.close()
    if not any(not isinstance(item, Frame) for _, item in events):
        events += poller.poll(1, False)
        events += poller.poll(0, False) if isinstance(events[-1][1], Frame) else []
    poller.close()
    check(events)


def check(events: list[tuple[object, object]]) -> None:
    """There is one end, at the end; what came before is frames."""
    ends = [item for _, item in events if not isinstance(item, Frame)]
    assert len(ends) == 1, ends
    assert events[-1][1] is ends[0]
    assert ends[0] is None or isinstance(ends[0], ProtocolError | TransportError), ends
    for _, item in events:
        if isinstance(item, Frame):
            try:
                decode(item)
            except ProtocolError:
                continue


def repair(data: bytes) -> bytes:
    """Make frames of what may be some."""
    stream = bytearray(data or b"\1")
    start = 1
    while len(stream) - start > 64:
        start = mend_frame(stream, start, whole=False)
    return bytes(stream)
