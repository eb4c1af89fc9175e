"""The races of reference counting, one by one, by hand."""

from __future__ import annotations

import pytest

from distgrad.message import RRefChildAccept, RRefForkRequest
from distgrad.rref.protocol import (
    Answer,
    End,
    Fork,
    ForkState,
    Free,
    ReferenceCounts,
    Send,
    Settled,
    worker_of,
)

OWNER, PARENT, CHILD = 0, 1, 2


@pytest.fixture
def owner() -> ReferenceCounts:
    return ReferenceCounts(OWNER)


@pytest.fixture
def parent() -> ReferenceCounts:
    return ReferenceCounts(PARENT)


@pytest.fixture
def child() -> ReferenceCounts:
    return ReferenceCounts(CHILD)


def shared(owner: ReferenceCounts, user: ReferenceCounts) -> Fork:
    """Return the user's fork of a value that its owner passed to it."""
    rref_id = owner.new_id()
    fork_id = owner.share(rref_id, "value", user.worker_id)
    fork, actions = user.receive(OWNER, rref_id, fork_id, OWNER)
    assert fork is not None
    assert actions == []
    return fork


def test_ids_name_the_worker_that_minted_them(parent: ReferenceCounts) -> None:
    first, second = parent.new_id(), parent.new_id()
    assert worker_of(first) == worker_of(second) == PARENT
    assert second == first + 1 == (PARENT << 48) + 1


def test_fork_by_owner_is_confirmed_without_messages(
    owner: ReferenceCounts, parent: ReferenceCounts
) -> None:
    fork = shared(owner, parent)
    assert fork.state is ForkState.CONFIRMED
    assert owner.owned[fork.rref_id].forks == {fork.fork_id: PARENT}


def test_last_delete_frees_the_value_once(owner: ReferenceCounts, parent: ReferenceCounts) -> None:
    fork = shared(owner, parent)
    assert parent.drop(fork) == [End(OWNER, fork.rref_id, fork.fork_id)]
    assert parent.drop(fork) == []
    assert owner.on_end(PARENT, fork.rref_id, fork.fork_id) == [Free(fork.rref_id, "value")]
    assert owner.on_end(PARENT, fork.rref_id, fork.fork_id) == []


def test_parent_dropped_waits_for_its_child(
    owner: ReferenceCounts, parent: ReferenceCounts, child: ReferenceCounts
) -> None:
    fork = shared(owner, parent)
    child_id = parent.pass_on(fork, CHILD)
    assert parent.drop(fork) == []
    passed, actions = child.receive(OWNER, fork.rref_id, child_id, PARENT)
    assert passed is not None
    request = RRefForkRequest(fork.rref_id, child_id)
    assert actions == [Send(OWNER, request)]
    assert owner.on_fork_request(CHILD, *request) == [Answer(CHILD, child_id, True)]
    accept = RRefChildAccept(child_id)
    assert child.settle(passed, ForkState.CONFIRMED) == [Settled(passed), Send(PARENT, accept)]
    end = End(OWNER, fork.rref_id, fork.fork_id)
    assert parent.on_child_accept(*accept) == [end]
    assert parent.on_child_accept(*accept) == []


def test_user_to_owner_argument_comes_home(owner: ReferenceCounts, parent: ReferenceCounts) -> None:
    fork = shared(owner, parent)
    phantom = parent.pass_on(fork, OWNER)
    received, actions = owner.receive(OWNER, fork.rref_id, phantom, PARENT)
    assert received is None
    assert actions == [Send(PARENT, RRefChildAccept(phantom))]
    assert phantom not in owner.owned[fork.rref_id].forks


def test_owner_to_itself_leaves_no_fork(owner: ReferenceCounts) -> None:
    rref_id = owner.new_id()
    fork_id = owner.share(rref_id, "value", OWNER)
    received, actions = owner.receive(OWNER, rref_id, fork_id, OWNER)
    assert received is None
    assert actions == [Free(rref_id, "value")]


def test_fork_request_before_creation_is_parked(
    owner: ReferenceCounts, parent: ReferenceCounts
) -> None:
    rref_id = parent.new_id()
    origin = parent.originate(rref_id, OWNER)
    child_id = parent.pass_on(origin, CHILD)
    assert owner.on_fork_request(CHILD, rref_id, child_id) == []
    created = owner.create(rref_id, origin.fork_id, "value", PARENT)
    assert created == [Answer(CHILD, child_id, True)]
    assert owner.owned[rref_id].forks == {origin.fork_id: PARENT, child_id: CHILD}


def test_fork_request_parked_is_refused_when_the_creator_is_lost(
    owner: ReferenceCounts, parent: ReferenceCounts
) -> None:
    rref_id = parent.new_id()
    child_id = parent.pass_on(parent.originate(rref_id, OWNER), CHILD)
    owner.on_fork_request(CHILD, rref_id, child_id)
    assert owner.lose(PARENT) == [Answer(CHILD, child_id, False)]
    assert owner.on_fork_request(CHILD, rref_id, child_id) == [Answer(CHILD, child_id, False)]


def test_fork_request_of_a_freed_value_is_refused(
    owner: ReferenceCounts, parent: ReferenceCounts, child: ReferenceCounts
) -> None:
    fork = shared(owner, parent)
    child_id = parent.pass_on(fork, CHILD)
    assert owner.lose(PARENT) == [Free(fork.rref_id, "value")]
    passed, _ = child.receive(OWNER, fork.rref_id, child_id, PARENT)
    assert passed is not None
    refusal = owner.on_fork_request(CHILD, fork.rref_id, child_id)
    assert refusal == [Answer(CHILD, child_id, False)]
    child.settle(passed, ForkState.REFUSED)
    child.drop(passed)
    assert not any(child.counters().values())


def test_pending_fork_is_passed_on_by_its_creator_only(
    owner: ReferenceCounts, parent: ReferenceCounts, child: ReferenceCounts
) -> None:
    fork = shared(owner, parent)
    passed, _ = child.receive(OWNER, fork.rref_id, parent.pass_on(fork, CHILD), PARENT)
    assert passed is not None
    with pytest.raises(ValueError, match="it is pending"):
        child.pass_on(passed, 3)


def test_creation_timed_out_still_reports_its_end(parent: ReferenceCounts) -> None:
    fork = parent.originate(parent.new_id(), OWNER)
    assert parent.settle(fork, ForkState.TIMED_OUT) == [Settled(fork)]
    assert parent.settle(fork, ForkState.CONFIRMED) == []
    with pytest.raises(ValueError, match="timed out"):
        parent.pass_on(fork, CHILD)
    assert parent.drop(fork) == [End(OWNER, fork.rref_id, fork.fork_id)]


def test_message_never_left_takes_its_fork_back(
    owner: ReferenceCounts, parent: ReferenceCounts
) -> None:
    fork = shared(owner, parent)
    child_id = parent.pass_on(fork, CHILD)
    parent.drop(fork)
    assert parent.revoke(child_id) == [End(OWNER, fork.rref_id, fork.fork_id)]
    rref_id = owner.new_id()
    fork_id = owner.share(rref_id, "other", CHILD)
    assert owner.unshare(rref_id, fork_id) == [Free(rref_id, "other")]


def test_lost_user_gives_its_forks_back(owner: ReferenceCounts, parent: ReferenceCounts) -> None:
    fork = shared(owner, parent)
    assert owner.lose(PARENT) == [Free(fork.rref_id, "value")]
    assert owner.lose(PARENT) == []
    owner.share(fork.rref_id, "value", PARENT)
    assert not any(owner.counters().values())


def test_lost_owner_settles_its_users(owner: ReferenceCounts, child: ReferenceCounts) -> None:
    confirmed = shared(owner, child)
    pending, _ = child.receive(OWNER, confirmed.rref_id, PARENT << 48, PARENT)
    assert pending is not None
    accept = Send(PARENT, RRefChildAccept(pending.fork_id))
    assert child.lose(OWNER) == [Settled(pending), accept]
    assert confirmed.state is pending.state is ForkState.OWNER_LOST
    assert child.drop(confirmed) == child.drop(pending) == []
    assert not any(child.counters().values())


def test_lost_child_releases_its_parent(owner: ReferenceCounts, parent: ReferenceCounts) -> None:
    fork = shared(owner, parent)
    parent.pass_on(fork, CHILD)
    parent.drop(fork)
    assert parent.lose(CHILD) == [End(OWNER, fork.rref_id, fork.fork_id)]
