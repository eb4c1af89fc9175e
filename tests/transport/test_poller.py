"""The poller by itself: waking, posting, timers, watching, signals, closing."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from distgrad.config import config
from distgrad.errors import TransportError
from distgrad.testing.transport_pair import unraisable
from distgrad.transport._poller import Poller

LONG_S = 30.0


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def start(target: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def elapsed(call: Callable[[], Any]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def until_sleeping(poller: Poller) -> None:
    deadline = time.monotonic() + LONG_S
    while not poller.sleeping:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("spin", [False, True])
def test_poll_without_events_returns_after_its_timeout(poller: Poller, spin: bool) -> None:
    assert elapsed(lambda: poller.poll(0.05, spin)) == pytest.approx(0.05, abs=0.04)
    assert elapsed(lambda: poller.poll(0.0, spin)) < 0.04


def test_poll_timeout_is_finer_than_a_millisecond(poller: Poller) -> None:
    shortest = min(elapsed(lambda: poller.poll(200e-6, False)) for _ in range(50))
    assert 200e-6 <= shortest < 900e-6


def test_wake_before_poll_makes_the_next_poll_return(poller: Poller) -> None:
    poller.wake()
    assert poller.poll(LONG_S, False) == []
    assert elapsed(lambda: poller.poll(0.02, False)) > 0.01


@pytest.mark.parametrize("spin_us", [0.0, 1e9])
def test_wake_during_poll_makes_it_return(
    poller: Poller, monkeypatch: pytest.MonkeyPatch, spin_us: float
) -> None:
    monkeypatch.setattr(config, "spin_us", spin_us)
    thread = start(lambda: poller.poll(LONG_S, True))
    if not spin_us:
        until_sleeping(poller)
    poller.wake()
    thread.join(LONG_S)
    assert not thread.is_alive()
    assert not poller.sleeping


def test_wakes_of_a_racing_thread_are_never_lost(poller: Poller) -> None:
    answered = threading.Semaphore(0)

    def answer() -> None:
        for _ in range(2000):
            poller.poll(LONG_S, False)
            answered.release()

    thread = start(answer)
    for _ in range(2000):
        poller.wake()
        assert answered.acquire(timeout=LONG_S)
    thread.join(LONG_S)


def test_posts_come_out_in_order(poller: Poller) -> None:
    connection: Any = object()
    for number in range(10):
        poller.post(connection, number)
    assert poller.poll(LONG_S, False) == [(connection, number) for number in range(10)]


def test_post_wakes_a_sleeping_poll(poller: Poller) -> None:
    events: list[Any] = []
    thread = start(lambda: events.extend(poller.poll(LONG_S, False)))
    until_sleeping(poller)
    connection: Any = object()
    poller.post(connection, "item")
    thread.join(LONG_S)
    assert events == [(connection, "item")]


def test_callbacks_run_in_the_polling_thread_in_order_with_posts(poller: Poller) -> None:
    seen: list[Any] = []
    connection: Any = object()
    poller.call(lambda: seen.append(threading.get_ident()))
    poller.post(connection, 1)
    poller.call(lambda: seen.append("last"))
    assert poller.poll(LONG_S, False) == [(connection, 1)]
    assert seen == [threading.get_ident(), "last"]


def test_poll_returns_after_a_callback_ran(poller: Poller) -> None:
    poller.call_later(0.01, lambda: None)
    assert poller.poll(LONG_S, False) == []


def test_callback_that_raises_is_reported_and_disturbs_nothing(poller: Poller) -> None:
    connection: Any = object()
    poller.call(lambda: 1 // 0)
    poller.post(connection, 1)
    with unraisable() as raised:
        assert poller.poll(LONG_S, False) == [(connection, 1)]
    assert [type(error) for error in raised] == [ZeroDivisionError]


def test_timers_run_in_the_order_of_their_times(poller: Poller) -> None:
    seen: list[int] = []
    for delay in (3, 1, 2):
        poller.call_later(delay * 0.005, lambda delay=delay: seen.append(delay))
    poller.call_later(0.001, lambda: seen.append(0)).cancel()
    while len(seen) < 3:
        poller.poll(LONG_S, False)
    assert seen == [1, 2, 3]


def test_timer_set_by_another_thread_shortens_a_running_poll(poller: Poller) -> None:
    ran = threading.Event()
    thread = start(lambda: poller.poll(LONG_S, False))
    until_sleeping(poller)
    poller.call_later(0.01, ran.set)
    thread.join(LONG_S)
    poller.poll(0.0 if ran.is_set() else LONG_S, False)
    assert ran.is_set()


def test_watch_calls_back_while_readable_until_unwatch(
    poller: Poller, pipe: tuple[int, int]
) -> None:
    calls: list[int] = []
    reading, writing = pipe
    poller.watch(reading, lambda: calls.append(1))
    poller.poll(0.0, False)
    assert calls == []
    os.write(writing, b"x")
    poller.poll(LONG_S, False)
    poller.poll(LONG_S, False)
    assert len(calls) == 2
    poller.unwatch(reading)
    poller.unwatch(reading)
    assert poller.poll(0.0, False) == []
    assert len(calls) == 2


def test_watch_of_a_watched_descriptor_raises(poller: Poller, pipe: tuple[int, int]) -> None:
    poller.watch(pipe[0], lambda: None)
    with pytest.raises(ValueError, match="watched already"):
        poller.watch(pipe[0], lambda: None)


def test_watch_of_a_closed_descriptor_raises(poller: Poller) -> None:
    with pytest.raises(TransportError, match="Bad file descriptor"):
        poller.watch(10_000, lambda: None)


def test_poll_by_a_second_thread_raises(poller: Poller) -> None:
    thread = start(lambda: poller.poll(LONG_S, False))
    until_sleeping(poller)
    with pytest.raises(RuntimeError, match="another thread"):
        poller.poll(0.0, False)
    poller.wake()
    thread.join(LONG_S)


def test_close_ends_a_running_poll_and_forbids_more(poller: Poller) -> None:
    thread = start(lambda: poller.poll(math.inf, False))
    until_sleeping(poller)
    poller.close()
    thread.join(LONG_S)
    assert not thread.is_alive()
    poller.close()
    poller.wake()
    for use in (lambda: poller.poll(0, False), lambda: poller.call(lambda: None)):
        with pytest.raises(TransportError, match="closed"):
            use()


def test_close_inside_a_callback_ends_the_poll(poller: Poller) -> None:
    poller.call(poller.close)
    assert poller.poll(LONG_S, False) == []
    with pytest.raises(TransportError, match="closed"):
        poller.poll(0, False)


@pytest.fixture
def interrupting() -> Iterator[None]:
    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupting")
def test_signal_interrupts_a_sleeping_poll(poller: Poller) -> None:
    def interrupt() -> None:
        until_sleeping(poller)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    thread = start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        poller.poll(LONG_S, False)
    thread.join(LONG_S)
    assert poller.poll(0, False) == []


@pytest.mark.usefixtures("interrupting")
def test_signal_during_a_spin_is_noticed(poller: Poller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "spin_us", 50_000.0)
    timer = threading.Timer(
        0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1)
    )
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        poller.poll(LONG_S, True)
    timer.join(LONG_S)


def test_interrupt_in_a_callback_loses_no_event(poller: Poller) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    connection: Any = object()
    poller.post(connection, 1)
    poller.call(interrupt)
    poller.post(connection, 2)
    with pytest.raises(KeyboardInterrupt):
        poller.poll(LONG_S, False)
    assert poller.poll(LONG_S, False) == [(connection, 1), (connection, 2)]


def test_spin_in_vain_gives_the_processor_back(
    poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "spin_us", 2000.0)
    for _ in range(20):
        poller.poll(0.004, True)
    before = time.thread_time()
    for _ in range(20):
        poller.poll(0.004, True)
    assert time.thread_time() - before < 0.02  # spinning on would take 40 ms
