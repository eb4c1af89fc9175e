"""The watch over the poll role: what ends it, and how often it looks meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from references import wait_until

from distgrad.rpc._leader import Leadership
from distgrad.transport._poller import Poller

GRACE_S = 200e-6


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


@pytest.fixture
def leadership(poller: Poller) -> Leadership:
    leadership = Leadership(poller)
    leadership.grace_s = GRACE_S
    leadership.longest_s = 16 * GRACE_S
    return leadership


class Watch:
    """A thread that watches until something ends that."""

    def __init__(self, watch: Callable[[], None]) -> None:
        self.thread = threading.Thread(target=watch, daemon=True)
        self.thread.start()

    def ended(self, within_s: float = 20.0) -> bool:
        self.thread.join(within_s)
        return not self.thread.is_alive()


def test_a_role_that_lies_free_ends_the_watch(leadership: Leadership) -> None:
    assert Watch(leadership.watch).ended()


def test_a_role_that_is_held_does_not(leadership: Leadership) -> None:
    assert leadership.try_lead()
    watch = Watch(leadership.watch)
    assert not watch.ended(within_s=0.05)
    leadership.leave()
    assert watch.ended()


@pytest.mark.parametrize("end", [Leadership.leave, Leadership.ring, Leadership.close])
def test_the_bell_ends_the_sleep_of_the_watcher(
    leadership: Leadership, poller: Poller, end: Callable[[Leadership], None]
) -> None:
    assert leadership.try_lead()
    polls = Watch(lambda: poller.poll(600.0, True))
    wait_until(lambda: poller.sleeping, collect=False)
    watch = Watch(leadership.watch)
    wait_until(lambda: leadership.looks > 0, collect=False)
    assert not watch.ended(within_s=0.05)
    before = leadership.looks
    assert not watch.ended(within_s=0.3)
    assert leadership.looks == before  # it sleeps as long as the leader does
    end(leadership)
    assert watch.ended()
    poller.wake()
    assert polls.ended()


def test_looks_become_rare_while_the_role_changes_hands(leadership: Leadership) -> None:
    closed = threading.Event()

    def take_turn() -> None:
        if leadership.try_lead():
            leadership.leave()

    def keep_watching() -> None:
        while not closed.is_set():
            leadership.watch()
            take_turn()  # as a watcher does that was needed

    watch = Watch(keep_watching)
    span_s = 0.4
    end = time.monotonic() + span_s
    while time.monotonic() < end:
        take_turn()
    looks = leadership.looks
    closed.set()
    leadership.close()
    assert watch.ended()
    assert 0 < looks < span_s / GRACE_S / 5


@pytest.mark.parametrize(("longest_s", "frequent"), [(0.0, True), (600.0, False)])
def test_looks_stay_frequent_where_they_must(
    leadership: Leadership, longest_s: float, frequent: bool
) -> None:
    leadership.longest_s = longest_s
    assert leadership.try_lead()
    watch = Watch(leadership.watch)
    watch.ended(within_s=2.0)
    # From 0.2 ms on by a sixteenth each: 130 looks in 2 s, against 10 000 of constant pace.
    assert (leadership.looks > 400) == frequent
    leadership.close()
    assert watch.ended()
