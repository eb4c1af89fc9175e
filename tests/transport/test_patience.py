"""How long peers may take: time that passes while nobody polls does not count."""

import threading
import time

from distgrad.transport._poller import Poller
from distgrad.transport.patience import Patience

TIMEOUT_S = 0.05
AWAY_S = 0.2


def poll_until(poller, ended, limit_s=20.0):
    until = time.monotonic() + limit_s
    while not ended and time.monotonic() < until:
        poller.poll(0.01, False)
    return ended


def test_patience_ends_once_for_who_polls():
    poller, ended = Poller(), []
    Patience(poller, TIMEOUT_S, lambda: ended.append(True))
    assert poll_until(poller, ended) == [True]
    poller.poll(2 * TIMEOUT_S, False)
    assert ended == [True]
    poller.close()


def test_patience_begins_anew_for_who_was_away_but_not_for_ever():
    poller, ended, away = Poller(), [], threading.Event()
    Patience(poller, TIMEOUT_S, lambda: ended.append(True))
    for _ in range(3):
        away.wait(AWAY_S)
        poller.poll(0.0, False)
        assert not ended
    away.wait(AWAY_S)
    poller.poll(0.0, False)
    assert ended == [True]
    poller.close()


def test_patience_that_is_cancelled_never_ends():
    poller, ended, away = Poller(), [], threading.Event()
    patience = Patience(poller, TIMEOUT_S, lambda: ended.append(True))
    away.wait(AWAY_S)
    poller.poll(0.0, False)
    patience.cancel()
    poller.poll(2 * TIMEOUT_S, False)
    assert not ended
    poller.close()
