"""A peer with a lane: payloads that are announced on the one socket and sent on the other.

An input is a list of steps: what the peer writes on its two sockets and reads from them, which
of them it ends, and when this side polls and sends meanwhile.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from steps import Steps
from target_stream import check

from distgrad._codec import Frame, encode
from distgrad.config import config
from distgrad.errors import TransportError
from distgrad.transport._poller import Poller
from distgrad.transport._stream import StreamConnection

_OVERTAKES = 1  # flag of a header
_RECORD = b"\xfe" + bytes(63)
_PATTERN = bytes(range(251)) * 5000  # what the peer sends on its lane, over and over
_ARRAYS = [np.zeros(nbytes, np.uint8) for nbytes in (300_000, 40_000, 3000, 5_000_000, 1)]
_MOST_SAID = 2**23  # bytes: they are kept here, too
_SMALL = encode(1, "small")
_LARGE = encode(1, (_ARRAYS[0], "and", _ARRAYS[1]))


class Story(Steps):
    """One connection with a lane, and what its peer does to it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        near, self.far = socket.socketpair()
        lane, self.far_lane = socket.socketpair()
        self.far.setblocking(False)
        self.far_lane.setblocking(False)
        self.poller = Poller()
        self.connection = StreamConnection(
            self.poller,
            near.detach(),
            scheme="fuzz",
            peer_address="nobody",
            identity=(1, 1),
            lane=lane.detach(),
        )
        self.events: list[tuple[object, object]] = []
        # What an honest peer has told: place and length on the lane, for each message in order.
        self.told: list[tuple[int, int]] = []
        self.free: set[int] = set()  # numbers of those that may overtake
        self.came: list[int] = []  # numbers of those that came
        self.due = self.fed = 0  # bytes of the lane: announced, written
        self.honest = True
        self.said = bytearray(), bytearray()  # what this side says on its sockets
        self.heard = [0, 0]

    def tell(self, value: Any, how: int, *, apart: bool) -> None:
        """Write a message, and its payload apart from it or behind it."""
        message = encode(1, value, request_id=len(self.told))
        message.overtakes = bool(how & 1)
        head, *payload = map(memoryview, message.parts())
        nbytes = sum(part.nbytes for part in payload) if apart else 0
        self.honest &= bool(nbytes) or not apart
        data = _RECORD + bytes(head) if apart else b"".join((head, *payload))
        self.honest &= self.far.send(data, socket.MSG_NOSIGNAL) == len(data)
        if how & 1:
            self.free.add(len(self.told))
        self.told.append((self.due, nbytes))
        self.due += nbytes

    def bring(self, nbytes: int) -> None:
        """Write on the lane, while it is read."""
        patience = 2
        while nbytes > 0 and patience:
            start = self.fed % 251
            piece = memoryview(_PATTERN)[start : start + nbytes]
            try:
                sent = self.far_lane.send(piece, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
                patience = patience - 1 if self.honest and self.fed < self.due else 0
            self.fed += sent
            nbytes -= sent
            # Fresh memory is touched by another thread meanwhile.
            self.poll(0.01 if patience < 2 and not self.connection.closed else 0.0)

    def poll(self, timeout_s: float = 0.0) -> None:
        """Poll, and look at what came."""
        new = self.poller.poll(timeout_s, False)
        self.events += new
        for _, item in new:
            if isinstance(item, Frame) and self.honest:
                place, nbytes = self.told[item.request_id]
                self.came.append(item.request_id)
                if nbytes:
                    assert memoryview(item.payload or b"") == pattern(place, nbytes)

    def say(self, message: Any, *, apart: bool) -> None:
        """Send on this side."""
        if len(self.said[1]) > _MOST_SAID:
            return
        head, *payload = map(bytes, message.parts())
        self.said[0].extend(_RECORD + head if apart else head)
        self.said[1].extend(b"".join(payload))
        with suppress(TransportError):
            self.connection.send(message)

    # What a step can be.

    def write(self) -> None:
        self.honest = False
        self.far.send(self.take(self.take(1)[0]), socket.MSG_NOSIGNAL)

    def write_record(self) -> None:
        self.honest = False
        self.far.send(_RECORD, socket.MSG_NOSIGNAL)

    def write_message(self) -> None:
        how = self.take(1)[0]
        self.tell(bytes(300 * (how >> 1)), how, apart=False)

    def announce(self) -> None:
        how, which = self.take(2)
        self.tell([_ARRAYS[which % len(_ARRAYS)]] * (1 + (how >> 1) % 3), how, apart=True)

    def feed(self) -> None:
        """Send what was announced, or a part."""
        share = self.take(1)[0] or 255
        self.bring((self.due - self.fed) * share // 255)

    def feed_blindly(self) -> None:
        size, scale = self.take(2)
        self.bring(size << scale % 14)

    def let_go(self) -> None:
        """Free the arrays that came."""
        ends = [event for event in self.events if not isinstance(event[1], Frame)]
        self.events = ends if ends else self.events[:1]

    def send_small(self) -> None:
        self.say(_SMALL, apart=False)

    def send_large(self) -> None:
        self.say(_LARGE, apart=True)

    def hear(self) -> None:
        """Read on one of the sockets."""
        which, size = self.take(2)
        lane = which & 1
        data = (self.far_lane if lane else self.far).recv(1 + (size << 10))
        assert self.said[lane].startswith(data, self.heard[lane])
        self.heard[lane] += len(data)

    def stop_lane(self) -> None:
        self.far_lane.shutdown(socket.SHUT_WR)

    def end_lane(self) -> None:
        self.far_lane.close()

    def stop(self) -> None:
        self.far.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        self.far.close()

    def give_up(self) -> None:
        self.connection.abort()
        self.honest = False

    def run(self) -> None:
        """Tell it to its end."""
        while self.left:
            step = STEPS[self.choose(len(STEPS))]
            with suppress(OSError):
                step(self)
        self.poll()
        self.far.close()
        self.far_lane.close()
        for _ in range(100):
            if any(not isinstance(item, Frame) for _, item in self.events):
                break
            self.poll(1.0)
        assert self.connection.closed
        assert self.connection.flushed()
        self.poller.close()
        check(self.events)
        if self.honest:
            self.check_order()

    def check_order(self) -> None:
        """All came whose bytes were here: in order, but for those that may overtake."""
        whole = 0
        while whole < len(self.told) and sum(self.told[whole]) <= self.fed:
            whole += 1
        assert [n for n in self.came if n not in self.free] == [
            n for n in range(whole) if n not in self.free
        ]
        assert {n for n in self.free if n < whole or not self.told[n][1]} <= set(self.came)
        assert len(set(self.came)) == len(self.came)


def pattern(place: int, nbytes: int) -> bytes:
    """Return what the peer sends on its lane at a place."""
    rounds = nbytes // len(_PATTERN) + 1
    start = place % 251
    return (_PATTERN * (rounds + 1))[start : start + nbytes]


STEPS: tuple[Callable[[Story], None], ...] = (
    Story.write, Story.write_record, Story.write_message, Story.announce, Story.feed,
    Story.feed_blindly, Story.poll, Story.let_go, Story.send_small, Story.send_large, Story.hear,
    Story.stop_lane, Story.end_lane, Story.stop, Story.end, Story.give_up,
)  # fmt: skip


def one(data: bytes) -> None:
    """Play one story, in fresh memory."""
    before, config.pool_bytes = config.pool_bytes, 0
    try:
        Story(data).run()
    finally:
        config.pool_bytes = before


def repair(data: bytes) -> bytes:
    """Leave it: every input is a story."""
    return data
