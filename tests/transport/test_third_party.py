"""A transport that another package might bring: the contract, the registry, a world on it.

It is written against the docstrings of `distgrad.transport` alone, as a third party would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from distgrad import rpc
from distgrad._codec import Outgoing, parse
from distgrad.errors import AuthenticationError, TransportError
from distgrad.rpc.lifecycle import leave
from distgrad.rpc.store import MemoryStore
from distgrad.testing.transport_contract import TransportContract
from distgrad.transport import Connection, Listener, Transport, register_transport
from distgrad.transport._poller import Poller
from distgrad.transport.base import HandshakeFactory
from distgrad.transport.registry import known_schemes, transport_for

lofts: dict[str, Loft] = {}


class Pigeon(Connection):
    """One end; both ends share a lock, under which they end together (T2)."""

    scheme = "pigeon"
    peer = None

    def __init__(
        self, poller: Poller, peer_address: str, identity: Any, lock: threading.Lock
    ) -> None:
        self.poller = poller
        self.peer_address = peer_address
        self.identity = identity
        self.lock = lock
        self.other: Pigeon | None = None
        poller.enroll(self)

    @property
    def closed(self) -> bool:
        return self.other is None

    def send(self, message: Outgoing) -> bool:
        frame = parse(b"".join(message.parts()))  # a copy, as T5 asks for
        with self.lock:
            if self.other is None:
                raise TransportError(f"cannot send to {self.peer_address}: the pigeon is gone")
            self.other.poller.post(self.other, frame)
        return True

    def flushed(self) -> bool:
        return True

    def close(self) -> None:
        with self.lock:
            other, self.other = self.other, None
            if other is not None:
                other.other = None
        for end in (self, other) if other is not None else ():
            with suppress(TransportError):  # its poller is closed
                end.poller.post(end, None)

    abort = close


class Loft(Listener):
    def __init__(
        self,
        poller: Poller,
        new_handshake: HandshakeFactory,
        on_connection: Callable[[Connection, Any], None],
    ) -> None:
        self.address = f"pigeon://loft-{id(self)}"
        self.poller = poller
        self.new_handshake = new_handshake
        self.on_connection = on_connection
        lofts[self.address] = self

    def welcome(self, pigeon: Pigeon) -> None:
        try:
            self.on_connection(pigeon, pigeon.identity)
        except BaseException:
            pigeon.abort()
            raise

    def close(self) -> None:
        lofts.pop(self.address, None)


class Pigeons(Transport):
    scheme = "pigeon"

    def listen(
        self,
        poller: Poller,
        new_handshake: HandshakeFactory,
        on_connection: Callable[[Connection, Any], None],
        *,
        host: str | None = None,
        secure: bool,
    ) -> Loft:
        return Loft(poller, new_handshake, on_connection)

    def connect(
        self, address: str, poller: Poller, new_handshake: HandshakeFactory, timeout_s: float
    ) -> Connection:
        loft = lofts.get(address)
        if loft is None:
            raise TransportError(f"cannot connect to {address}: no loft there")
        near, far = new_handshake(None), loft.new_handshake(None)
        sides, message, finished = [far, near], near.start(), {}
        while message is not None:
            message, finished[sides[0]] = sides[0].receive(message)
            sides.reverse()
        if list(finished.values()) != [True, True]:
            raise AuthenticationError(f"cannot connect to {address}: strangers")
        lock = threading.Lock()
        here = Pigeon(poller, address, near.identity, lock)
        there = Pigeon(loft.poller, "pigeon://somewhere", far.identity, lock)
        here.other, there.other = there, here
        loft.poller.call(lambda: loft.welcome(there))
        return here


class TestPigeons(TransportContract):
    new_transport = Pigeons


@pytest.fixture
def registered():
    register_transport("pigeon", Pigeons)
    yield
    from distgrad.transport import registry

    del registry._registered["pigeon"]


@rpc.expose
def double(array: np.ndarray) -> np.ndarray:
    return 2 * array


def test_world_runs_on_a_registered_transport(registered: None) -> None:
    assert "pigeon" in known_schemes()
    assert type(transport_for("pigeon")) is Pigeons
    options = rpc.RpcBackendOptions(init_method=MemoryStore(), secret="coo")
    answers, workers = {}, {}

    def live(rank: int) -> None:
        workers[rank] = worker = rpc.init_rpc(f"w{rank}", "pigeon", rank, 2, options)
        answers[rank] = rpc.rpc_sync(1 - rank, double, (np.arange(3 + rank),)).tolist()
        assert worker.agent.links.to(1 - rank).scheme == "pigeon"
        leave(worker, timeout=20)

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {0: [0, 2, 4], 1: [0, 2, 4, 6]}
    assert lofts == {}
