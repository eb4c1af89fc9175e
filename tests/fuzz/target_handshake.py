"""Strangers and peers at a listener, and one who connects to a stranger: before a connection.

The first byte of an input says who is tested: the accepting or the connecting side, with a lane
or with shared memory. Steps of the other side follow, which knows the secret, and keeps to the
protocol as far as the steps say.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from steps import Steps

from distgrad.config import config
from distgrad.errors import AuthenticationError, TransportError
from distgrad.rpc.auth import HmacHandshake
from distgrad.transport._arena import memory_file
from distgrad.transport._poller import Poller
from distgrad.transport._ring import RING_FILE_NBYTES, Ring
from distgrad.transport.address import Address
from distgrad.transport.stream import UnixTransport

#: Lines of files with this in their path count as code to reach; see the driver.
TRACED = "/distgrad/transport/"
_SOCKETS = 4  # of those who call
_NONCE = bytes(range(32))
_files = memory_file("fuzz-offer", RING_FILE_NBYTES), memory_file("fuzz-offer", 4096)
_numbers = itertools.count()


def handshakes(number: int, *, connecting: bool) -> Callable[[int | None], HmacHandshake]:
    """Make the handshakes of a worker."""
    return lambda uid: HmacHandshake(
        b"secret", connecting=connecting, identity=(number, 1), peer_uid=uid, world="fuzz"
    )


class Side:
    """One side of a handshake by hand, on a socket that does not block."""

    def __init__(self, sock: socket.socket, number: int, *, connecting: bool) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.identity = (number, 1)
        self.handshake = handshakes(number, connecting=connecting)(None)
        self.message = self.handshake.start()  # the one to be sent next
        self.proved = False  # a proof of the identity was made
        self.finished = False
        self.heard = b""

    def send(self, data: bytes) -> None:
        self.sock.send(data, socket.MSG_NOSIGNAL)

    def speak(self, steps: Steps) -> None:
        """Send the next message of the handshake."""
        if self.message is not None:
            self.send(steps.damage(struct.pack("<H", len(self.message)) + self.message))
            self.message = None

    def listen(self) -> None:
        """Read a message of the handshake, and think of an answer."""
        if self.finished:
            return
        for _ in range(2):  # the length, the message
            end = 2 + int.from_bytes(self.heard[:2], "little")
            self.heard += self.sock.recv(end - len(self.heard))
        if len(self.heard) == 2 + int.from_bytes(self.heard[:2], "little"):
            message, self.heard = self.heard[2:], b""
            with suppress(AuthenticationError):
                self.message, self.finished = self.handshake.receive(message)
                self.proved = self.proved or len(self.message or b"") == 32


# -- the accepting side --------------------------------------------------------------------


class Caller(Side):
    """Somebody who connects."""

    def say_purpose(self, steps: Steps) -> None:
        """Say that this is a first socket, or a lane."""
        kind, token = steps.take(2)
        self.send(steps.damage(bytes([kind % 2]) + bytes([token % 2]) * 32))

    def answer_offer(self, steps: Steps) -> None:
        """Share memory, or not."""
        offer, fds, _, _ = socket.recv_fds(self.sock, 33, 1)
        for fd in fds:
            if len(offer) == 33:
                Ring(fd, 1).leave_note(1, steps.damage(offer[1:]).ljust(32)[:32])
            os.close(fd)
        self.send(bytes([steps.choose(3)]))


class Siege:
    """A listener, and those who call."""

    def __init__(self, transport: Transport, poller: Poller) -> None:
        self.callers: dict[int, Caller] = {}
        self.sockets: list[socket.socket] = []  # all that there ever were
        self.proved: set[object] = set()  # identities
        self.poller = poller
        self.listener = transport.listen(
            poller, handshakes(7, connecting=False), self.welcome, secure=True
        )

    def welcome(self, connection: Any, identity: Any) -> None:
        """Check that somebody has proved to be who is said to have come."""
        assert identity == connection.identity
        assert identity in self.proved

    def step(self, steps: Steps) -> None:
        """Let one of the callers do something."""
        what, which = divmod(steps.take(1)[0], _SOCKETS)
        caller = self.callers.get(which)
        if caller is None or what == 0:
            sock = socket.socket(socket.AF_UNIX)
            self.sockets.append(sock)
            sock.connect(f"\0{self.listener.address}")
            self.callers[which] = Caller(sock, 1 + what % 2, connecting=True)
            return
        steps_of_it: tuple[Callable[[], object], ...] = (
            lambda: caller.speak(steps),
            caller.listen,
            lambda: caller.say_purpose(steps),
            lambda: caller.answer_offer(steps),
            lambda: caller.send(steps.take(steps.take(1)[0])),
            lambda: caller.sock.shutdown(socket.SHUT_WR),
            caller.sock.close,
            lambda: setattr(config, "handshake_timeout", 1e-9),  # of those that come later
            self.listener.close,
            lambda: (caller.listen(), caller.speak(steps)),
        )
        try:
            steps_of_it[what % len(steps_of_it)]()
        finally:
            if caller.proved:
                self.proved.add(caller.identity)

    def run(self, steps: Steps) -> None:
        """Tell it to its end."""
        while steps.left:
            with suppress(OSError):
                self.step(steps)
            for _ in range(3):  # a connection, a length, a message
                self.poller.poll(0, False)
        for sock in self.sockets:
            sock.close()
        self.poller.poll(0, False)
        self.listener.close()
        self.poller.close()


def besiege(steps: Steps, *, local: bool) -> None:
    """Listen, and be called."""
    Siege(Transport(steps, local=local), Poller()).run(steps)


# -- the connecting side -------------------------------------------------------------------


class Host(Side):
    """Somebody who is called, and answers as the accepting side does or in another way."""

    def __init__(self, sock: socket.socket, steps: Steps, *, local: bool) -> None:
        super().__init__(sock, 7, connecting=False)
        self.steps = steps
        self.local = local
        self.offered = False

    def react(self) -> None:
        """Do something, now that there is nothing to read."""
        what = self.steps.choose(8)
        if what == 0 or not self.steps.left:
            self.sock.close()
        elif what == 1:
            self.send(self.steps.take(self.steps.take(1)[0]))
        elif self.finished and self.local and not self.offered:
            self.offer()
        elif self.finished:
            self.heard = b""
            self.send(bytes([self.steps.choose(3) ^ 1]))
        else:
            self.listen()
            self.speak(self.steps)

    def offer(self) -> None:
        """Offer shared memory, or what looks like it."""
        self.offered = True
        how, files = self.steps.take(2)
        Ring(_files[0], 0).leave_note(0, _NONCE)
        data = self.steps.damage(bytes([how % 4 ^ 1]) + _NONCE)
        passed = [_files[files & 1]] * (1 + (files >> 1)) if files < 4 else []
        socket.send_fds(self.sock, [data], passed, socket.MSG_NOSIGNAL)


class Near(socket.socket):
    """The socket of the connecting side: before it waits, the other side reacts."""

    host: Host

    def recv(self, *args: Any) -> bytes:
        """Read, once there is something."""
        self._stir()
        return super().recv(*args)

    def recvmsg(self, *args: Any) -> Any:
        """Read, once there is something."""
        self._stir()
        return super().recvmsg(*args)

    def _stir(self) -> None:
        while not select.select([self], [], [], 0)[0]:
            try:
                self.host.react()
            except OSError:
                self.host.sock.close()


class Transport(UnixTransport):
    """Sockets that leave no files behind."""

    scheme = "fuzz"

    def __init__(self, steps: Steps, *, local: bool) -> None:
        self.local = local  # type: ignore[misc]
        self.steps = steps
        self.hosts: list[Host] = []

    def bind(self, host: str | None) -> tuple[socket.socket, str, Callable[[], None]]:
        """Bind to an abstract name."""
        name = f"distgrad-fuzz-{os.getpid()}-{next(_numbers)}"
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"\0{name}")
        return sock, name, lambda: None

    def _open(self, target: Address, timeout_s: float) -> socket.socket:
        near, far = socket.socketpair()
        sock = Near(fileno=near.detach())
        sock.settimeout(timeout_s)
        sock.host = Host(far, self.steps, local=self.local)
        self.hosts.append(sock.host)
        return sock


def call(steps: Steps, *, local: bool) -> None:
    """Connect to somebody who answers in any way."""
    transport, poller = Transport(steps, local=local), Poller()
    told = ""
    try:
        connection = transport.connect("unix://fuzz", poller, handshakes(1, connecting=True), 5.0)
        assert connection.identity == (7, 1)
        assert transport.hosts[0].proved
        connection.abort()
    except (AuthenticationError, TransportError) as error:
        told = str(error)
    assert told.count("cannot ") < 2, told
    for host in transport.hosts:
        host.sock.close()
    poller.poll(0, False)
    poller.close()


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that no descriptor stays open, and that nothing is raised where nobody sees it."""
    raised: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, raised.append
    log = logging.getLogger("distgrad.transport")
    timeout, log.disabled = config.handshake_timeout, True
    before = len(os.listdir("/proc/self/fd"))
    try:
        yield
    finally:
        sys.unraisablehook, config.handshake_timeout, log.disabled = hook, timeout, False
    assert not raised, raised
    for generation in range(3):
        if len(os.listdir("/proc/self/fd")) > before:
            gc.collect(generation)
    assert len(os.listdir("/proc/self/fd")) <= before


def one(data: bytes) -> None:
    """Be called, or call."""
    steps = Steps(data)
    mode = steps.choose(4)
    with nothing_left():
        (call if mode & 2 else besiege)(steps, local=bool(mode & 1))


def repair(data: bytes) -> bytes:
    """Leave it: every input is a list of steps."""
    return data
