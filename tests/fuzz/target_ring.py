"""A peer that shares memory and writes anything anywhere into it, at any moment.

An input is a list of steps: what the peer does to the rings, the chunks and the socket, and
when this side polls and sends meanwhile.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from steps import Steps
from target_stream import check

from distgrad._codec import Frame, encode
from distgrad.errors import TransportError
from distgrad.transport._arena import memory_file
from distgrad.transport._poller import Poller
from distgrad.transport._ring import RING_FILE_NBYTES, Ring
from distgrad.transport._stream import StreamConnection

_PAGE = 4096
_RING = 512 * 1024
_TO_US, _TO_PEER = _PAGE + 2 * _PAGE, _PAGE  # control blocks, by who produces
_DATA = _PAGE + 4 * _PAGE + _RING  # of the ring that the peer writes
# Offsets of tail, starving, head, asleep and two words of `returned` in a control block.
_FIELDS = (0, 64, 128, 192, 256, 260)
_SMALL = encode(1, "small")
_LARGE = encode(1, np.zeros(40_000, np.uint8))
_WHOLE = b"".join(_SMALL.parts())
_HEAD = bytes(_LARGE.parts()[0])  # its payload is a loan

_ring_file = memory_file("fuzz-ring", RING_FILE_NBYTES)
_chunk_file = memory_file("fuzz-chunk", 2**20)
_bad_file = os.memfd_create("fuzz-unsealed", os.MFD_ALLOW_SEALING)
os.ftruncate(_bad_file, 2**20)
fcntl.fcntl(_bad_file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
_memory = mmap.mmap(_ring_file, RING_FILE_NBYTES)


class Story(Steps):
    """One connection, and what its peer does to it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        _memory[: 5 * _PAGE] = bytes(5 * _PAGE)
        near, self.far = socket.socketpair()
        self.far.setblocking(False)
        self.poller = Poller()
        self.connection = StreamConnection(
            self.poller,
            near.detach(),
            scheme="fuzz",
            peer_address="nobody",
            identity=(1, 1),
            ring=Ring(_ring_file, 0),
        )
        self.events: list[tuple[object, object]] = []
        self.tail = 0

    def put(self, data: bytes) -> None:
        """Write to the ring as an honest peer does."""
        for byte_at in range(0, len(data), 256):
            piece = data[byte_at : byte_at + 256]
            start = _DATA + self.tail % _RING
            room = _DATA + _RING - start
            _memory[start : start + min(len(piece), room)] = piece[:room]
            if len(piece) > room:
                _memory[_DATA : _DATA + len(piece) - room] = piece[room:]
            self.tail += len(piece)
        _memory[_TO_US : _TO_US + 8] = struct.pack("<Q", self.tail & (2**64 - 1))

    # What a step can be.

    def write(self) -> None:
        self.put(self.take(self.take(1)[0]))

    def write_message(self) -> None:
        self.put(_WHOLE)

    def write_loan(self) -> None:
        how, slab, number, chunk, page, nbytes = struct.unpack("<BHBBBI", self.take(10))
        nbytes = nbytes if how & 1 else 40_000
        record = struct.pack(
            "<B3xIIIQQ32x", 255, slab % 1100, number, chunk % 4, page * _PAGE, nbytes
        )
        self.put(record + (_WHOLE if how & 2 else _HEAD))

    def set_field(self) -> None:
        which, value = struct.unpack("<BQ", self.take(9))
        block = _TO_US if which & 1 else _TO_PEER
        at = block + _FIELDS[(which >> 1) % len(_FIELDS)]
        nbytes = 8 if at - block in (0, 128) else 4
        _memory[at : at + nbytes] = value.to_bytes(8, "little")[:nbytes]

    def move_field(self) -> None:
        which, step = struct.unpack("<Bi", self.take(5))
        at = (_TO_US if which & 1 else _TO_PEER) + (0 if which & 2 else 128)
        old = int.from_bytes(_memory[at : at + 8], "little")
        _memory[at : at + 8] = ((old + step) % 2**64).to_bytes(8, "little")

    def scribble(self) -> None:
        at, nbytes = struct.unpack("<IB", self.take(5))
        at %= RING_FILE_NBYTES - 256
        _memory[at : at + nbytes] = self.take(nbytes)

    def speak(self) -> None:
        self.far.send(self.take(1 + self.take(1)[0] % 8), socket.MSG_NOSIGNAL)

    def ring_bell(self) -> None:
        self.far.send(b"\1", socket.MSG_NOSIGNAL)

    def pass_chunk(self) -> None:
        kind = self.take(1)[0]
        fds = [(_chunk_file, _bad_file, _ring_file)[kind % 3]] * (1 + (kind > 200))
        socket.send_fds(self.far, [b"\2"], fds, socket.MSG_NOSIGNAL)

    def poll(self) -> None:
        self.events += self.poller.poll(0, False)
        if len(self.events) > 3:
            self.let_go()

    def let_go(self) -> None:
        """Free the arrays that came: their loans go back."""
        ends = [event for event in self.events if not isinstance(event[1], Frame)]
        self.events = ends if ends else self.events[:1]

    def send_small(self) -> None:
        with suppress(TransportError):
            self.connection.send(_SMALL)

    def send_large(self) -> None:
        with suppress(TransportError):
            self.connection.send(_LARGE)

    def hang_up(self) -> None:
        self.far.close()

    def run(self) -> None:
        """Tell it to its end."""
        while self.left:
            step = STEPS[self.choose(len(STEPS))]
            with suppress(OSError):
                step(self)
        self.poll()
        self.far.close()
        for _ in range(100):
            if any(not isinstance(item, Frame) for _, item in self.events):
                break
            self.events += self.poller.poll(1, False)
        self.connection.abort()
        self.poller.close()
        check(self.events)


STEPS: tuple[Callable[[Story], None], ...] = (
    Story.write, Story.write_message, Story.write_loan, Story.set_field, Story.move_field,
    Story.scribble, Story.speak, Story.ring_bell, Story.pass_chunk, Story.poll, Story.let_go,
    Story.send_small, Story.send_large, Story.hang_up,
)  # fmt: skip


def one(data: bytes) -> None:
    """Play one story."""
    Story(data).run()


def repair(data: bytes) -> bytes:
    """Leave it: every input is a story."""
    return data
