"""Sends, closes, aborts and polls of many threads at once: nothing crashes, hangs or repeats."""

import random
import threading
import time
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

from distgrad._codec import Frame, decode
from distgrad.errors import TransportError
from distgrad.testing.transport_pair import Pair, message, polling
from distgrad.transport.registry import transport_for

PATIENCE_S = 30.0


def busy(pair: Pair, seed: int, rounds: int) -> None:
    """Send messages of all sizes over random connections, and end some."""
    choose = random.Random(seed)
    for number in range(rounds):
        connection = choose.choice(pair.near.connections + pair.far.connections)
        with suppress(TransportError):
            kind = choose.random()
            if kind < 0.01:
                connection.close()
            elif kind < 0.02:
                connection.abort()
            else:
                size = choose.choice([0, 0, 0, 100, 30_000, 300_000])
                connection.send(message((seed, number, np.full(size, number % 100, np.uint8))))


@pytest.mark.parametrize("scheme", ["inproc", "unix", "tcp"])
@pytest.mark.parametrize("seed", range(3))
def test_threads_that_send_and_close_see_order_and_one_end_each(scheme: str, seed: int) -> None:
    pair = Pair(transport_for(scheme))
    for number in range(6):
        pair.connect(number)
    threads = [threading.Thread(target=busy, args=(pair, 10 * seed + n, 150)) for n in range(4)]
    with polling(pair.near), polling(pair.far):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        for connection in pair.near.connections:
            connection.close()
        deadline = time.monotonic() + PATIENCE_S
        while len(pair.near.ends()) < 6 or len(pair.far.ends()) < 6:
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)
    for side in (pair.near, pair.far):
        check(side.events)
    pair.close()


def check(events: list) -> None:
    """One end a connection and nothing after it; each thread's messages in order and whole."""
    ends = Counter(connection for connection, item in events if not isinstance(item, Frame))
    assert set(ends.values()) == {1}
    ended, last = set(), {}
    for connection, item in events:
        assert connection not in ended
        if not isinstance(item, Frame):
            ended.add(connection)
            continue
        thread, number, array = decode(item)
        assert np.all(array == number % 100)
        assert last.get((connection, thread), -1) < number
        last[connection, thread] = number


@pytest.mark.parametrize("scheme", ["inproc", "unix", "tcp"])
def test_pollers_closed_while_in_use_end_quietly(scheme: str) -> None:
    for seed in range(5):
        pair = Pair(transport_for(scheme))
        for number in range(4):
            pair.connect(number)
        threads = [threading.Thread(target=busy, args=(pair, seed + n, 60)) for n in range(3)]
        pollers = [
            threading.Thread(target=poll_until_closed, args=(side,))
            for side in (pair.near, pair.far)
        ]
        for thread in threads + pollers:
            thread.start()
        pair.near.poller.close()
        pair.far.poller.close()
        for thread in threads + pollers:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        pair.close()


def poll_until_closed(side) -> None:
    with suppress(TransportError):
        while True:
            side.poll(0.01)
