"""A connection breaks while a thread is in the system call that sends from its queue.

The call is held by a library that is preloaded (``_held_sendmsg_native.c``), so that each of these
happens every time: in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad._codec import Frame
from distgrad.errors import TransportError
from distgrad.testing.transport_pair import message
from distgrad.transport._poller import Poller
from distgrad.transport._stream import StreamConnection

PATIENCE_S = 20
SMALL, LARGE = 200_000, 1_000_000  # bytes: beside the message, on the lane


class Held:
    """A connection with a lane, whose peer is two bare sockets; one thread polls."""

    def __init__(self) -> None:
        self.shim = ctypes.CDLL(None)
        self.peer, mine = socket.socketpair()
        self.lane, other = socket.socketpair()
        self.fds = mine.fileno(), other.fileno()
        self.poller = Poller()
        self.connection = StreamConnection(
            self.poller, mine.detach(), scheme="tcp", peer_address="test", identity=None,
            lane=other.detach(),
        )  # fmt: skip
        self.events: list[Any] = []

    def fill(self, nbytes: int) -> weakref.ref[Any]:
        """Send until something is queued; return a reference to the last array."""
        while True:
            array = np.full(nbytes, 7, np.uint8)
            if not self.connection.send(message(array)):
                return weakref.ref(array)

    def poll_held(self, fd: int, by: socket.socket) -> threading.Thread:
        """Poll in a thread that is held as it sends what is queued, since the peer reads."""
        self.shim.hold(fd)
        thread = threading.Thread(target=self.poll)
        thread.start()
        by.recv(1 << 22)
        assert self.shim.wait_until_held(PATIENCE_S) == 0
        return thread

    def poll(self) -> None:
        """Poll until the connection has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.ends() and time.monotonic() < deadline:
            self.events += [item for _, item in self.poller.poll(0.1, False)]

    def ends(self) -> list[Any]:
        """Return why it ended."""
        return [item for item in self.events if not isinstance(item, Frame)]


def story_broken_lane() -> None:
    """The lane breaks under one thread, and another one is sending on the first socket."""
    held = Held()
    array = held.fill(SMALL)
    thread = held.poll_held(held.fds[0], held.peer)
    held.lane.close()
    with pytest.raises(TransportError, match="cannot send to test"):
        held.connection.send(message(np.zeros(LARGE, np.uint8)))
    assert array() is not None, "memory is freed that is being sent"
    held.shim.let_go()
    thread.join(PATIENCE_S)
    assert "cannot send to test" in str(held.ends()[0])
    assert array() is None
    assert held.connection.flushed()


def story_ended_lane() -> None:
    """The polling thread sees the lane end, and another one is sending on it."""
    held = Held()
    held.shim.hold(held.fds[1])
    content = message(np.zeros(LARGE, np.uint8))
    refusals: list[TransportError] = []

    def send() -> None:
        try:
            held.connection.send(content)
        except TransportError as error:
            refusals.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    assert held.shim.wait_until_held(PATIENCE_S) == 0
    held.lane.close()
    for _ in range(3):
        held.events += [item for _, item in held.poller.poll(0.0, False)]
    held.shim.let_go()
    thread.join(PATIENCE_S)
    held.poll()
    assert "cannot send to test" in str(held.ends())
    assert len(refusals) == 1


STORIES = {name: story for name, story in globals().items() if name.startswith("story_")}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if not shutil.which(compiler):
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "held.so"
    source = Path(__file__).with_name("_held_sendmsg_native.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("story", list(STORIES))
def test_connection_that_breaks_while_a_thread_sends(shim: Path, story: str) -> None:
    before = os.environ.get("LD_PRELOAD")
    preload = f"{before}:{shim}" if before else str(shim)
    done = subprocess.run(
        [sys.executable, __file__, story],
        env=os.environ | {"LD_PRELOAD": preload},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    try:
        STORIES[sys.argv[1]]()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a thread that is held would keep it
