"""Reference counting of remote values, as a state machine without I/O.

One `ReferenceCounts` a worker. Events go in as method calls; what has to be sent or told
comes out as a list of actions. It knows no threads, sockets or clocks; its user holds a
lock around each call and performs the actions afterwards, in order.

Terms. The *owner* holds a value. A *user* holds a *fork*: one counted reference, with an
id of its own. Whoever passes a reference on is the *parent* of the new fork, the *child*.
Ids have 64 bits, the worker that minted them in the upper 16: so an RRef id names its
creator and a fork id names its parent.

Invariants, cited by the tests:

1. The owner's table keeps a value while it has forks, and drops it with the last one.
2. A fork given out by the owner is registered before the message with it leaves; its user
   sends nothing and is confirmed at once.
3. A parent that is a user keeps its own fork until each child is accepted: until the owner
   knows the child, or the child has come home to the owner.
4. A user reports the end of its fork once, when it was dropped, is not pending and has no
   unaccepted child. Messages are idempotent.
5. A pending fork is passed on by its creator only. (Code never sees other pending forks:
   calls and answers wait for the forks that they bring.) So an unknown RRef id in a fork
   request is not created yet if its creator is the parent and lives; else it is freed.
6. A lost worker holds nothing: the owner reclaims its forks, parents forget its children,
   users of its values are told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from distgrad.message import RRefChildAccept, RRefForkRequest

__all__ = [
    "Action",
    "Answer",
    "End",
    "Fork",
    "ForkState",
    "Free",
    "ReferenceCounts",
    "Send",
    "Settled",
    "worker_of",
]

_COUNTER_BITS = 48


def worker_of(identifier: int) -> int:
    """Return the worker that minted an RRef id or fork id."""
    return identifier >> _COUNTER_BITS


class ForkState(Enum):
    """What a user knows about its fork."""

    PENDING = "pending"  # the owner has not acknowledged it yet
    CONFIRMED = "confirmed"  # the owner counts it
    TIMED_OUT = "timed out"  # the creating call was not acknowledged in time
    REFUSED = "refused"  # the owner does not have the value (any more)
    OWNER_LOST = "owner lost"  # the owner is gone, and the value with it


class Send(NamedTuple):
    """Send a message to a worker. A fork request is answered; see `ReferenceCounts.settle`."""

    to: int
    body: RRefForkRequest | RRefChildAccept


class End(NamedTuple):
    """Tell the owner that a fork has ended (`RRefUserDelete`); may be sent with others."""

    to: int
    rref_id: int
    fork_id: int


class Answer(NamedTuple):
    """Answer the fork request of a user."""

    to: int
    fork_id: int
    accepted: bool


class Settled(NamedTuple):
    """A pending fork of this worker reached the state it has now."""

    fork: Fork


class Free(NamedTuple):
    """The table let go of a value that it owned."""

    rref_id: int
    value: Any


Action = Send | End | Answer | Settled | Free


@dataclass(slots=True, eq=False)
class Fork:
    """One counted reference that this worker uses."""

    rref_id: int
    fork_id: int
    owner: int
    parent: int  # the worker that passed it on; the user itself if it created the RRef
    state: ForkState
    origin: bool = False  # this worker created the RRef with it
    dropped: bool = False  # the program let go of it
    children: set[int] = field(default_factory=set)  # forks passed on, not accepted yet
    cause: BaseException | None = None  # why it is not confirmed, for the user's errors


@dataclass(slots=True)
class _Owned:
    """A value that this worker owns and others use."""

    value: Any
    forks: dict[int, int] = field(default_factory=dict)  # fork id -> worker that holds it


class ReferenceCounts:
    """The reference counts of one worker: forks of its values, and forks that it uses.

    Parameters
    ----------
    worker_id
        The worker whose counts these are, 0 to 65535.
    """

    def __init__(self, worker_id: int) -> None:
        self.worker_id = worker_id
        self.lost: set[int] = set()  # workers that are gone; ids are not reused
        self.owned: dict[int, _Owned] = {}  # RRef id -> value with forks
        self.used: dict[int, Fork] = {}  # fork id -> fork of this worker
        self._children: dict[int, tuple[Fork, int]] = {}  # child -> its parent here, destination
        self._parked: dict[int, list[tuple[int, int]]] = {}  # uncreated RRef -> (user, fork)
        self._failed: set[int] = set()  # RRefs whose creation here failed
        self._minted = 0

    def new_id(self) -> int:
        """Mint an id for an RRef or a fork; they share one counter."""
        self._minted += 1
        return (self.worker_id << _COUNTER_BITS) | (self._minted - 1)

    # --- owner -------------------------------------------------------------------------

    def share(self, rref_id: int, value: Any, to: int) -> int:
        """Register a fork of an own value for worker ``to``, and return its id."""
        fork_id = self.new_id()
        if to not in self.lost:
            self._hold(rref_id, value).forks[fork_id] = to
        return fork_id

    def create(self, rref_id: int, fork_id: int, value: Any, user: int) -> list[Action]:
        """Take up a value that ``user`` created here, with its first fork."""
        if user in self.lost:
            return []
        owned = self._hold(rref_id, value)
        owned.forks[fork_id] = user
        actions: list[Action] = []
        for child_user, child in self._parked.pop(rref_id, ()):
            owned.forks[child] = child_user
            actions.append(Answer(child_user, child, True))
        return actions

    def on_fork_request(self, user: int, rref_id: int, fork_id: int) -> list[Action]:
        """Count a fork that another user passed on to ``user`` (invariant 5)."""
        if user in self.lost:
            return []
        if owned := self.owned.get(rref_id):
            owned.forks[fork_id] = user
            return [Answer(user, fork_id, True)]
        creator = worker_of(rref_id)
        if creator == worker_of(fork_id) != self.worker_id and not self._never(rref_id):
            self._parked.setdefault(rref_id, []).append((user, fork_id))
            return []
        return [Answer(user, fork_id, False)]

    def on_end(self, user: int, rref_id: int, fork_id: int) -> list[Action]:
        """Remove a fork whose user let go of it, or whose creation failed."""
        if rref_id in self.owned:
            return self._remove_fork(rref_id, fork_id)
        if worker_of(rref_id) == user and not self._never(rref_id):
            self._failed.add(rref_id)
            return self._refuse_parked(rref_id)
        return []

    def _never(self, rref_id: int) -> bool:
        """Tell whether an unknown RRef is sure not to be created any more."""
        return rref_id in self._failed or worker_of(rref_id) in self.lost

    def _hold(self, rref_id: int, value: Any) -> _Owned:
        return self.owned.setdefault(rref_id, _Owned(value))

    def _remove_fork(self, rref_id: int, fork_id: int) -> list[Action]:
        owned = self.owned.get(rref_id)
        if owned is None or owned.forks.pop(fork_id, None) is None or owned.forks:
            return []
        del self.owned[rref_id]
        return [Free(rref_id, owned.value)]

    def _refuse_parked(self, rref_id: int) -> list[Action]:
        return [Answer(user, fork, False) for user, fork in self._parked.pop(rref_id, ())]

    # --- user --------------------------------------------------------------------------

    def originate(self, rref_id: int, owner: int) -> Fork:
        """Begin a fork of a value that this worker is about to create at ``owner``."""
        fork = self._use(rref_id, self.new_id(), owner, self.worker_id, ForkState.PENDING)
        fork.origin = True
        return fork

    def abandon(self, fork: Fork) -> None:
        """Forget a fork whose creating call never left."""
        del self.used[fork.fork_id]

    def pass_on(self, fork: Fork, to: int) -> int:
        """Mint a child of a fork for worker ``to``, and return its id (invariant 3)."""
        self._check_passable(fork)
        child = self.new_id()
        if to not in self.lost:
            fork.children.add(child)
            self._children[child] = fork, to
        return child

    def receive(
        self, owner: int, rref_id: int, fork_id: int, parent: int
    ) -> tuple[Fork | None, list[Action]]:
        """Take up a fork that ``parent`` passed on to this worker.

        Returns
        -------
        fork
            The new fork, or None if this worker owns the value.
        actions
            What to perform.
        """
        if owner == self.worker_id:
            if parent == owner:
                return None, self._remove_fork(rref_id, fork_id)
            return None, self._accept(parent, fork_id)
        if owner in self.lost:
            fork = self._use(rref_id, fork_id, owner, parent, ForkState.OWNER_LOST)
            return fork, self._accept(parent, fork_id)
        if parent == owner:
            return self._use(rref_id, fork_id, owner, parent, ForkState.CONFIRMED), []
        fork = self._use(rref_id, fork_id, owner, parent, ForkState.PENDING)
        return fork, [Send(owner, RRefForkRequest(rref_id, fork_id))]

    def settle(self, fork: Fork, state: ForkState) -> list[Action]:
        """Note the outcome of a fork request or of a creating call; later ones are ignored."""
        if fork.state is not ForkState.PENDING:
            return []
        fork.state = state
        actions: list[Action] = [Settled(fork)]
        if not fork.origin:
            actions += self._accept(fork.parent, fork.fork_id)
        if state is ForkState.REFUSED:  # of a failed creation the owner learns only by this
            actions.append(End(fork.owner, fork.rref_id, fork.fork_id))
        return actions + self._end(fork)

    def on_child_accept(self, fork_id: int) -> list[Action]:
        """Release the parent of a child that the owner knows now."""
        return self.revoke(fork_id)

    def drop(self, fork: Fork) -> list[Action]:
        """Let go of a fork; safe to repeat."""
        fork.dropped = True
        return self._end(fork)

    def _use(self, rref_id: int, fork_id: int, owner: int, parent: int, state: ForkState) -> Fork:
        fork = self.used[fork_id] = Fork(rref_id, fork_id, owner, parent, state)
        return fork

    def _check_passable(self, fork: Fork) -> None:
        pending = fork.origin and fork.state is ForkState.PENDING
        if fork.dropped or not (pending or fork.state is ForkState.CONFIRMED):
            state = "dropped" if fork.dropped else fork.state.value
            raise ValueError(f"cannot pass on fork {fork.fork_id:#x}: it is {state}")

    def _accept(self, parent: int, fork_id: int) -> list[Action]:
        return [] if parent in self.lost else [Send(parent, RRefChildAccept(fork_id))]

    def _end(self, fork: Fork) -> list[Action]:
        """Report the end of a fork when nothing holds it any more (invariant 4)."""
        if not fork.dropped or fork.state is ForkState.PENDING or fork.fork_id not in self.used:
            return []
        counted = fork.state in (ForkState.CONFIRMED, ForkState.TIMED_OUT)
        if counted and fork.children:
            return []
        del self.used[fork.fork_id]
        return [End(fork.owner, fork.rref_id, fork.fork_id)] if counted else []

    # --- either ------------------------------------------------------------------------

    def revoke(self, fork_id: int) -> list[Action]:
        """Take back a fork that was minted here for a message that never left."""
        if child := self._children.pop(fork_id, None):
            fork, _ = child
            fork.children.discard(fork_id)
            return self._end(fork)
        return []

    def unshare(self, rref_id: int, fork_id: int) -> list[Action]:
        """Take back a fork that `share` registered for a message that never left."""
        return self._remove_fork(rref_id, fork_id)

    def lose(self, worker: int) -> list[Action]:
        """Note that a worker is gone (invariant 6)."""
        self.lost.add(worker)
        actions = self._reclaim(worker)
        for child, (_, to) in list(self._children.items()):
            if to == worker:
                actions += self.revoke(child)
        for fork in list(self.used.values()):
            if fork.owner == worker:
                actions += self._lose_owner(fork)
        return actions

    def _reclaim(self, worker: int) -> list[Action]:
        actions: list[Action] = []
        for rref_id, owned in list(self.owned.items()):
            for fork_id in [f for f, user in owned.forks.items() if user == worker]:
                actions += self._remove_fork(rref_id, fork_id)
        for rref_id, waiting in list(self._parked.items()):
            waiting[:] = [(user, fork) for user, fork in waiting if user != worker]
            if worker_of(rref_id) == worker or not waiting:
                actions += self._refuse_parked(rref_id)
        self._failed = {rref_id for rref_id in self._failed if worker_of(rref_id) != worker}
        return actions

    def _lose_owner(self, fork: Fork) -> list[Action]:
        if fork.state is ForkState.PENDING:
            return self.settle(fork, ForkState.OWNER_LOST)
        fork.state = ForkState.OWNER_LOST
        return self._end(fork)

    # --- books -------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Return the sizes of the tables; all are 0 when nothing is shared or used."""
        pending = sum(fork.state is ForkState.PENDING for fork in self.used.values())
        return {
            "owner_rrefs": len(self.owned),
            "forks": sum(len(owned.forks) for owned in self.owned.values()),
            "user_rrefs": len(self.used),
            "pending_users": pending,
            "pending_children": len(self._children),
            "parked_forks": sum(map(len, self._parked.values())),
        }
