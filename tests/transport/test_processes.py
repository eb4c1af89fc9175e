"""Real processes: a peer killed at any moment, forks, exit without goodbye."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad._codec import Frame, decode
from distgrad.config import config
from distgrad.errors import TransportError
from distgrad.testing.transport_pair import Pair, Side, handshakes, message, polling
from distgrad.transport.base import Connection
from distgrad.transport.registry import transport_for

PATIENCE_S = 30.0

PEER = """
import os, sys, numpy as np
from distgrad._codec import Frame, decode
from distgrad.testing.transport_pair import handshakes, message
from distgrad.transport._poller import Poller
from distgrad.transport.registry import transport_for

poller = Poller()
address = sys.argv[1]
connection = transport_for(address.partition("://")[0]).connect(
    address, poller, handshakes(2, connecting=True), 30.0
)
{body}
"""


class Child:
    """A process that connects to the listening side and runs a piece of code."""

    def __init__(self, scheme: str, body: str) -> None:
        self.side = Side()
        self.connections: list[Connection] = []
        self.listener = transport_for(scheme).listen(
            self.side.poller,
            handshakes(1, connecting=False),
            lambda connection, identity: self.connections.append(connection),
            secure=True,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER.format(body=textwrap.dedent(body)), self.listener.address],
            stdout=subprocess.PIPE,
        )
        self.until(lambda: bool(self.connections))

    @property
    def connection(self) -> Connection:
        return self.connections[0]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "nothing happened"
            self.side.poll(0.01)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.listener.close()
        self.side.poller.close()
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(params=["unix", "plain", "tcp"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "plain":
        return str(request.param)
    monkeypatch.setattr(config, "shared_memory", False)
    return "unix"


@pytest.fixture
def child(scheme: str) -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def start(body: str) -> Child:
        children.append(Child(scheme, body))
        return children[-1]

    yield start
    for one in children:
        one.close()


ECHO = """
while True:
    for connection, item in poller.poll(30.0, True):
        if not isinstance(item, Frame):
            sys.exit()
        connection.send(message(decode(item)))
"""
SILENT = """
poller.poll(30.0, False)
"""
FLOOD = """
array = np.ones(40_000_000)
connection.send(message(array))
print("sent", flush=True)
while not connection.flushed():
    poller.poll(30.0, False)
"""


def test_messages_between_processes_come_back_equal(child: Callable[[str], Child]) -> None:
    echo = child(ECHO)
    values: list[Any] = [None, "text", [1, 2.5], np.arange(5.0), np.arange(3_000_000)]
    for value in values:
        echo.connection.send(message(value))
    echo.until(lambda: len(echo.side.events) == len(values))
    for sent, received in zip(values, echo.side.values(), strict=True):
        assert repr(sent) == repr(received)


def test_peer_killed_while_idle_ends_the_connection(child: Callable[[str], Child]) -> None:
    peer = child(SILENT)
    peer.kill()
    peer.until(lambda: bool(peer.side.events))
    assert len(peer.side.ends()) == 1
    with pytest.raises(TransportError, match="cannot send"):
        peer.connection.send(message(1))


def test_peer_killed_in_the_middle_of_a_message_is_an_error(
    child: Callable[[str], Child],
) -> None:
    peer = child(FLOOD)
    assert peer.process.stdout is not None
    assert peer.process.stdout.readline() == b"sent\n"
    peer.side.poll(0.0)  # takes a part of the message
    peer.kill()
    peer.until(lambda: bool(peer.side.events))
    [(_, error)] = peer.side.events
    assert "in the middle of a message" in str(error)


def test_peer_killed_while_it_is_sent_to_ends_the_connection(
    child: Callable[[str], Child],
) -> None:
    peer = child("import signal\nsignal.pause()")
    peer.connection.send(message(np.ones(40_000_000)))
    assert not peer.connection.flushed()
    peer.kill()
    peer.until(lambda: bool(peer.side.events))
    assert peer.connection.closed
    assert peer.connection.flushed()
    assert len(peer.side.ends()) == 1


def test_peer_that_exits_delivers_what_it_sent(child: Callable[[str], Child]) -> None:
    peer = child("connection.send(message('last words'))")
    peer.until(lambda: bool(peer.side.ends()))
    assert peer.side.values() == ["last words"]
    assert peer.side.ends() == [None]


def test_peer_stopped_and_continued_loses_nothing(child: Callable[[str], Child]) -> None:
    echo = child(ECHO)
    echo.process.send_signal(signal.SIGSTOP)
    for number in range(1000):
        echo.connection.send(message(number))
    echo.process.send_signal(signal.SIGCONT)
    echo.until(lambda: len(echo.side.events) == 1000)
    assert echo.side.values() == list(range(1000))


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child; return its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork_child_leaves_the_connections_of_the_parent_alone(scheme: str) -> None:
    pair = Pair(transport_for(scheme))
    pair.connect()
    pair.near.connection.send(message(np.ones(1_000_000)))  # a part of it is queued

    def misuse() -> None:
        connection = pair.near.connection
        assert connection.closed
        for use in (
            lambda: connection.send(message("child")),
            lambda: pair.near.poller.poll(0, False),
        ):
            try:
                use()
            except TransportError:
                continue
            raise AssertionError("the child can use the parent's connection")
        connection.close()
        connection.abort()
        pair.listener.close()
        pair.near.poller.close()
        pair.far.poller.close()

    assert in_child(misuse) == 0
    pair.near.connection.send(message("parent"))
    pair.until(lambda: len(pair.far.events) == 2)
    assert pair.far.values()[1] == "parent"
    pair.connect(3)
    pair.close()


def test_fork_child_does_not_hold_connections_open(scheme: str) -> None:
    pair = Pair(transport_for(scheme))
    pair.connect()
    release, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        os.read(release, 1)
        os._exit(0)
    os.close(release)
    pair.near.poller.close()
    deadline = time.monotonic() + PATIENCE_S
    while not pair.far.ends() and time.monotonic() < deadline:
        pair.far.poll(0.01)
    assert len(pair.far.ends()) == 1
    os.close(hold)
    os.waitpid(pid, 0)
    pair.close()


def test_fork_child_can_make_its_own_connections(scheme: str) -> None:
    pair = Pair(transport_for(scheme))
    pair.connect()

    def use() -> None:
        own = Pair(transport_for(scheme))
        own.connect()
        own.near.connection.send(message("own"))
        own.until(lambda: own.far.values() == ["own"])
        own.close()

    assert in_child(use) == 0
    pair.close()


def test_exit_without_close_removes_the_socket_file() -> None:
    program = """
        import sys
        from distgrad.testing.transport_pair import handshakes
        from distgrad.transport._poller import Poller
        from distgrad.transport.stream import UnixTransport
        poller = Poller()
        listener = UnixTransport().listen(
            poller, handshakes(1, connecting=False), print, secure=True
        )
        print(listener.address)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    path = Path(done.stdout.strip().removeprefix("unix://"))
    assert path.name == "s"
    assert not path.parent.exists()


def test_hundred_workers_in_one_process_reach_each_other() -> None:
    transport = transport_for("inproc")
    sides = [Side() for _ in range(100)]
    listeners = [
        transport.listen(
            side.poller,
            handshakes(number, connecting=False),
            lambda connection, identity, side=side: side.connections.append(connection),
            secure=False,
        )
        for number, side in enumerate(sides)
    ]
    for number, side in enumerate(sides):
        for listener in listeners:
            connection = transport.connect(
                listener.address, side.poller, handshakes(number, connecting=True), 1.0
            )
            connection.send(message(number))
    for side in sides:
        side.poll()
        assert sorted(side.values()) == list(range(100))
        assert all(
            connection.identity == decode(item)
            for connection, item in side.events
            if isinstance(item, Frame)
        )
    for listener, side in zip(listeners, sides, strict=True):
        listener.close()
        side.poller.close()


def test_connect_waits_while_the_listener_is_busy(scheme: str) -> None:
    """The other side starts to poll late; the kernel keeps the connection until then."""
    pair = Pair(transport_for(scheme))
    results: list[Connection] = []
    thread = threading.Thread(
        target=lambda: results.append(
            pair.transport.connect(
                pair.listener.address, pair.near.poller, handshakes(2, connecting=True), PATIENCE_S
            )
        )
    )
    thread.start()
    with polling(pair.far):
        thread.join(PATIENCE_S)
    assert len(results) == 1
    pair.close()
