"""The contract of `distgrad.transport.base` as a test suite that any transport can run.

A package that ships a transport writes one test file::

    from distgrad.testing.transport_contract import TransportContract
    from mypackage import CarrierPigeon

    class TestCarrierPigeon(TransportContract):
        new_transport = CarrierPigeon

and runs pytest on it. Each test names the invariants (T1-T6) that it checks.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from distgrad.errors import AuthenticationError, TransportError
from distgrad.testing.transport_pair import (
    PATIENCE_S,
    Pair,
    expect,
    handshakes,
    message,
    polling,
    unraisable,
)
from distgrad.transport.base import Connection, Transport

__all__ = ["TransportContract"]


class TransportContract:
    """Subclass it, and set `new_transport` to what makes the transport."""

    new_transport: Callable[[], Transport]

    @contextmanager
    def pair(self) -> Iterator[Pair]:
        """Make two connected sides, and close them."""
        pair = Pair(type(self).new_transport())
        try:
            pair.connect()
            yield pair
        finally:
            pair.close()

    # --- connecting

    def test_connection_new_knows_scheme_address_and_identity(self) -> None:
        with self.pair() as pair:
            near, far = pair.near.connection, pair.far.connection
            assert near.scheme == far.scheme == pair.transport.scheme
            assert near.peer_address == pair.listener.address
            assert pair.listener.address.startswith(pair.transport.scheme + "://")
            assert near.identity == 1
            assert far.identity == 2
            assert near.peer is None
            assert not near.closed
            assert near.flushed()
            assert isinstance(near, Connection)

    def test_connect_to_closed_listener_raises(self) -> None:
        with self.pair() as pair:
            pair.listener.close()
            pair.listener.close()
            with expect(TransportError):
                pair.transport.connect(
                    pair.listener.address, pair.near.poller, handshakes(3, connecting=True), 5.0
                )
            pair.near.connection.send(message("still open"))
            pair.until(lambda: pair.far.values() == ["still open"])

    def test_connect_of_a_stranger_is_refused_without_an_event(self) -> None:  # T6
        with self.pair() as pair:
            with expect(AuthenticationError):
                pair.connect(3, word="foe")
            pair.settle()
            assert len(pair.far.connections) == 1
            assert pair.far.events == pair.near.events == []

    def test_connections_many_keep_their_identities_apart(self) -> None:
        with self.pair() as pair:
            for number in range(10, 30):
                pair.connect(number).send(message(number))
            pair.until(lambda: len(pair.far.events) == 20)
            assert pair.far.values() == [end.identity for end, _ in pair.far.events]

    def test_connections_hold_nothing_after_their_end(self) -> None:
        with self.pair() as pair:
            ends = [weakref.ref(pair.near.connection), weakref.ref(pair.far.connection)]
            pair.near.connection.close()
            pair.until(lambda: len(pair.near.ends()) == len(pair.far.ends()) == 1)
            for side in (pair.near, pair.far):
                side.connections.clear()
                side.events.clear()
            gc.collect()
            assert [end() for end in ends] == [None, None]

    # --- messages

    def test_message_small_arrives_equal_both_ways(self) -> None:  # T1
        with self.pair() as pair:
            value = {"a": [1, 2.5, None, "text"], "b": (b"bytes", {3})}
            assert pair.near.connection.send(message(value))
            assert pair.far.connection.send(message([value, value]))
            pair.until(lambda: bool(pair.near.events and pair.far.events))
            assert pair.far.values() == [value]
            assert pair.near.values() == [[value, value]]

    def test_messages_many_arrive_once_in_order(self) -> None:  # T1
        with self.pair() as pair:
            for number in range(5000):
                pair.near.connection.send(message(number))
            pair.until(lambda: len(pair.far.events) >= 5000)
            pair.settle()
            assert pair.far.values() == list(range(5000))

    def test_messages_of_all_sizes_arrive_equal(self) -> None:  # T1
        sizes = [0, 1, 63, 64, 65, 4000, 65_000, 65_472, 65_536, 70_000, 300_000, 3_000_001]
        with self.pair() as pair:
            for size in sizes:
                pair.near.connection.send(message("x" * size))
                pair.near.connection.send(message(np.full(size, size % 251, np.uint8)))
            pair.until(lambda: len(pair.far.events) == 2 * len(sizes))
            for size, text, array in zip(
                sizes, pair.far.values()[::2], pair.far.values()[1::2], strict=True
            ):
                assert text == "x" * size
                assert np.array_equal(array, np.full(size, size % 251, np.uint8))

    def test_message_with_many_arrays_arrives_equal(self) -> None:  # T1
        with self.pair() as pair:
            arrays = [np.arange(1000 + 7 * n, dtype=np.float64) for n in range(200)]
            pair.near.connection.send(message(arrays))
            pair.until(lambda: bool(pair.far.events))
            for sent, received in zip(arrays, pair.far.values()[0], strict=True):
                assert np.array_equal(sent, received)

    def test_arrays_received_belong_to_the_receiver(self) -> None:  # T5
        with self.pair() as pair:
            array = np.zeros(100_000)
            sent_whole = pair.near.connection.send(message([array, array.reshape(100, 1000).T]))
            if not sent_whole:
                pair.until(pair.near.connection.flushed)
            array[:] = 1.0
            pair.until(lambda: bool(pair.far.events))
            for received in pair.far.values()[0]:
                assert received.flags.writeable
                assert received.ctypes.data % 64 == 0
                assert not received.any()
                received[...] = 2.0
            assert array.min() == array.max() == 1.0

    def test_send_to_a_peer_that_does_not_read_never_waits(self) -> None:  # T4
        with self.pair() as pair:
            arrays = [np.full(4_000_000, float(n)) for n in range(3)]
            start = time.monotonic()
            for array in arrays:
                pair.near.connection.send(message(array))
            assert time.monotonic() - start < 5.0
            pair.until(lambda: len(pair.far.events) == 3 and pair.near.connection.flushed())
            for sent, received in zip(arrays, pair.far.values(), strict=True):
                assert np.array_equal(sent, received)

    def test_arrays_taken_back_arrive_as_they_were(self) -> None:  # T5
        with self.pair() as pair:
            connection = pair.near.connection
            arrays = [np.full(4_000_000, float(n)) for n in range(3)]
            messages = [message(array) for array in arrays]
            for sent in messages:
                connection.send(sent)
            for sent, array in zip(messages, arrays, strict=True):
                if connection.detach(sent) is None:
                    pair.until(connection.flushed)
                array[:] = -1.0
            pair.until(lambda: len(pair.far.events) == 3 and connection.flushed())
            for n, received in enumerate(pair.far.values()):
                assert received.min() == received.max() == n

    def test_send_from_many_threads_keeps_the_order_of_each(self) -> None:  # T1
        with self.pair() as pair:
            filler = np.zeros(20_000)

            def send(thread: int) -> None:
                for number in range(200):
                    pair.near.connection.send(message((thread, number, filler[: number * 100])))

            threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            pair.until(lambda: len(pair.far.events) == 800)
            for thread in threads:
                thread.join(PATIENCE_S)
            for n in range(4):
                mine = [number for thread, number, _ in pair.far.values() if thread == n]
                assert mine == list(range(200))

    # --- the end

    def test_close_is_reported_once_on_both_sides_and_without_error(self) -> None:  # T2
        with self.pair() as pair:
            pair.near.connection.close()
            pair.near.connection.close()
            pair.near.connection.abort()
            assert pair.near.connection.closed
            pair.until(lambda: len(pair.near.ends()) == len(pair.far.ends()) == 1)
            pair.settle()
            assert pair.near.ends() == pair.far.ends() == [None]
            assert pair.far.connection.closed
            pair.far.connection.close()
            pair.settle()
            assert len(pair.near.events) == len(pair.far.events) == 1

    def test_close_by_both_sides_is_reported_once(self) -> None:  # T2
        with self.pair() as pair:
            pair.near.connection.close()
            pair.far.connection.close()
            pair.until(lambda: len(pair.near.ends()) == len(pair.far.ends()) == 1)
            pair.settle()
            assert len(pair.near.events) == len(pair.far.events) == 1

    def test_close_delivers_what_was_sent_before(self) -> None:  # T2
        with self.pair() as pair:
            for number in range(100):
                pair.near.connection.send(message(number))
            pair.near.connection.close()
            pair.until(lambda: bool(pair.far.ends()))
            assert pair.far.values() == list(range(100))
            assert pair.far.events[-1] == (pair.far.connection, None)

    def test_close_flushes_what_is_queued_while_the_peer_reads(self) -> None:  # T2, T4
        with self.pair() as pair:
            array = np.arange(2_000_000.0)
            with polling(pair.far):
                pair.near.connection.send(message(array))
                pair.near.connection.close()
            pair.until(lambda: bool(pair.far.ends()))
            assert pair.far.ends() == [None]
            assert np.array_equal(pair.far.values()[0], array)

    def test_close_with_a_peer_that_does_not_read_takes_bounded_time(self) -> None:  # T4
        with self.pair() as pair:
            pair.near.connection.send(message(np.zeros(8_000_000)))
            start = time.monotonic()
            pair.near.connection.close()
            assert time.monotonic() - start < 5.0
            pair.until(lambda: len(pair.near.ends()) == len(pair.far.ends()) == 1)

    def test_abort_ends_both_sides_at_once(self) -> None:  # T2, T4
        with self.pair() as pair:
            pair.near.connection.send(message(np.zeros(8_000_000)))
            start = time.monotonic()
            pair.near.connection.abort()
            assert time.monotonic() - start < 0.5
            pair.until(lambda: len(pair.near.ends()) == len(pair.far.ends()) == 1)

    def test_close_while_another_thread_polls_ends_that_poll(self) -> None:  # T2
        with self.pair() as pair:
            with polling(pair.near):
                pair.near.connection.close()
                while not pair.far.ends():
                    pair.far.poll(PATIENCE_S)
            assert pair.near.ends() == [None]

    def test_send_on_a_closed_connection_raises(self) -> None:
        with self.pair() as pair:
            pair.near.connection.close()
            with expect(TransportError):
                pair.near.connection.send(message(1))
            pair.until(lambda: bool(pair.far.ends()))
            with expect(TransportError):
                pair.far.connection.send(message(1))

    def test_send_to_a_peer_that_is_gone_ends_the_connection(self) -> None:  # T2
        with self.pair() as pair:
            pair.far.poller.close()
            deadline = time.monotonic() + PATIENCE_S
            with suppress(TransportError):
                while time.monotonic() < deadline:
                    pair.near.connection.send(message("anybody?"))
            while not pair.near.ends() and time.monotonic() < deadline:
                pair.near.poll(0.01)
            pair.near.poll(0.01)
            assert len(pair.near.ends()) == 1
            assert pair.near.connection.closed

    def test_on_connection_that_raises_aborts_the_connection(self) -> None:
        def refuse(connection: Connection, identity: Any) -> None:
            raise ZeroDivisionError("refused by the layer above")

        pair = Pair(type(self).new_transport(), refuse)
        try:
            with unraisable() as raised, polling(pair.far):
                pair.transport.connect(
                    pair.listener.address,
                    pair.near.poller,
                    handshakes(2, connecting=True),
                    PATIENCE_S,
                )
                while not pair.near.ends():
                    pair.near.poll(PATIENCE_S)
            assert [type(error) for error in raised] == [ZeroDivisionError]
        finally:
            pair.close()
