"""The locks of steps: exclusive, in order of arrival, never stuck."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distgrad.optim.locks import LockTable

A, B, C = frozenset("a"), frozenset("b"), frozenset("c")


def test_locks_free_parameters_are_granted() -> None:
    table = LockTable()
    assert table.acquire(1, A, wait=False)
    assert table.acquire(2, B, wait=False)
    assert len(table) == 2


def test_locks_busy_parameter_is_refused_or_waited_for() -> None:
    table = LockTable()
    table.acquire(1, A, wait=False)
    assert not table.acquire(2, A | B, wait=False)
    assert not table.acquire(3, A, wait=True)
    assert table.release(2) == []
    assert table.release(1) == [3]


def test_locks_nobody_overtakes_who_waits_for_the_same() -> None:
    table = LockTable()
    table.acquire(1, A, wait=True)
    assert not table.acquire(2, A | B, wait=True)
    assert not table.acquire(3, B, wait=True)
    assert not table.acquire(4, B, wait=False)
    assert table.acquire(5, C, wait=False)
    assert table.release(1) == [2]
    assert table.release(2) == [3]


def test_locks_given_up_place_lets_others_pass() -> None:
    table = LockTable()
    table.acquire(1, A, wait=True)
    table.acquire(2, A | B, wait=True)
    table.acquire(3, B, wait=True)
    assert table.release(2) == [3]


def test_locks_step_without_parameters_never_waits() -> None:
    table = LockTable()
    table.acquire(1, A, wait=True)
    assert table.acquire(2, frozenset(), wait=False)


@given(
    st.lists(st.frozensets(st.integers(0, 4), max_size=4), max_size=12),
    st.lists(st.integers(0, 11), max_size=12),
    st.booleans(),
)
def test_locks_every_waiting_step_has_its_turn(
    wishes: list[frozenset[int]], early: list[int], wait: bool
) -> None:
    table, held = LockTable(), {}
    for step, keys in enumerate(wishes):
        if table.acquire(step, keys, wait):
            held[step] = keys
    turns = list(held)
    for step in [*early, *range(len(wishes)), *range(len(wishes))]:
        if step not in held:
            continue
        del held[step]
        for granted in table.release(step):
            assert not any(wishes[granted] & keys for keys in held.values())
            held[granted] = wishes[granted]
            turns.append(granted)
    while held:
        for granted in table.release(held.popitem()[0]):
            held[granted] = wishes[granted]
            turns.append(granted)
    assert len(table) == 0
    if wait:
        assert sorted(turns) == list(range(len(wishes)))
