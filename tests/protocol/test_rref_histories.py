"""Random histories of remote references on a simulated network.

The network keeps the order of the messages of one pair of workers and nothing more. Workers
create values, pass references on, return them, drop them, lose messages that were never
sent, time out and die. After every step the books of all live workers are compared with
what the program can still reach.

``DISTGRAD_PROGRAMS`` sets the number of histories; four in five have up to 5 workers, the rest
up to 50.
"""

from __future__ import annotations

import os
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

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

HISTORIES = int(os.environ.get("DISTGRAD_PROGRAMS", "4000"))
MOST_DELIVERIES = 20_000


@dataclass(eq=False)
class Value:
    """A value at its owner, with how often it became unreachable there."""

    rref_id: int
    owner: int
    created: bool = False
    failed: bool = False  # its creation fails at the owner
    local: int = 0  # handles at the owner
    freed: int = 0


@dataclass(eq=False)
class Handle:
    """What the program of a worker holds: a fork, or the value itself at its owner."""

    worker: int
    value: Value
    fork: Fork | None


@dataclass(frozen=True)
class Create:
    """A call that creates a value at the receiver, or fails to."""

    value: Value
    fork_id: int


@dataclass(frozen=True)
class Created:
    """The answer to `Create`."""

    fork_id: int
    good: bool


@dataclass(frozen=True)
class Passed:
    """A message of the program with a reference in it."""

    value: Value
    fork_id: int
    parent: int


@dataclass(frozen=True)
class Answered:
    """The answer to a fork request."""

    fork_id: int
    accepted: bool


@dataclass(frozen=True)
class Lost:
    """The end of a broken connection, behind what still arrived through it."""


@dataclass
class Simulation:
    """One world, its network and its program."""

    seed: int
    counts_class: type[ReferenceCounts] = ReferenceCounts
    handles: list[Handle] = field(default_factory=list)
    values: dict[int, Value] = field(default_factory=dict)
    undecoded: list[tuple[int, Passed]] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.size = self.random.randint(2, 5 if self.random.random() < 0.8 else 50)
        self.workers = {i: self.counts_class(i) for i in range(self.size)}
        self.channels: dict[tuple[int, int], deque[Any]] = {}

    # --- the network -------------------------------------------------------------------

    def send(self, source: int, to: int, message: Any) -> None:
        if to in self.workers:
            self.channels.setdefault((source, to), deque()).append(message)

    def perform(self, worker: int, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send | End):
                message = action.body if isinstance(action, Send) else action
                for _ in range(self.random.choice((1, 1, 1, 2))):
                    self.send(worker, action.to, message)
            elif isinstance(action, Answer):
                self.send(worker, action.to, Answered(action.fork_id, action.accepted))
            elif isinstance(action, Free):
                assert not action.value.freed, "a value was freed twice"
                self.note_freed(action.value)
            elif isinstance(action, Settled) and action.fork.state is ForkState.REFUSED:
                value = self.values[action.fork.rref_id]
                excused = value.failed or action.fork.parent not in self.workers
                assert excused, "a reachable value was refused"

    def note_freed(self, value: Value) -> None:
        if value.local == 0 and value.rref_id not in self.workers[value.owner].owned:
            value.freed += 1

    def deliver_one(self) -> bool:
        choices: list[Any] = [pair for pair, queue in self.channels.items() if queue]
        if self.undecoded:
            choices.append(None)
        if not choices:
            return False
        pair = self.random.choice(choices)
        if pair is None:
            index = self.random.randrange(len(self.undecoded))
            self.decode(*self.undecoded.pop(index))
        else:
            message = self.channels[pair].popleft()
            self.story.append(f"{pair[0]} -> {pair[1]}: {message}")
            self.on_message(pair[0], pair[1], message)
        return True

    def on_message(self, source: int, to: int, message: Any) -> None:
        counts = self.workers[to]
        match message:
            case Passed():
                self.undecoded.append((to, message))
            case Create():
                self.on_create(source, to, message)
            case Created(fork_id, good):
                if fork := counts.used.get(fork_id):
                    state = ForkState.CONFIRMED if good else ForkState.REFUSED
                    self.perform(to, counts.settle(fork, state))
            case Answered(fork_id, accepted):
                if fork := counts.used.get(fork_id):
                    state = ForkState.CONFIRMED if accepted else ForkState.REFUSED
                    self.perform(to, counts.settle(fork, state))
            case RRefForkRequest(rref_id, fork_id):
                self.perform(to, counts.on_fork_request(source, rref_id, fork_id))
            case End(_, rref_id, fork_id):
                self.perform(to, counts.on_end(source, rref_id, fork_id))
            case RRefChildAccept(fork_id):
                self.perform(to, counts.on_child_accept(fork_id))
            case Lost():
                self.perform(to, counts.lose(source))

    def on_create(self, source: int, to: int, message: Create) -> None:
        if not message.value.failed:
            message.value.created = True
            actions = self.workers[to].create(
                message.value.rref_id, message.fork_id, message.value, source
            )
            self.perform(to, actions)
        self.send(to, source, Created(message.fork_id, message.value.created))

    def decode(self, to: int, message: Passed) -> None:
        value, counts = message.value, self.workers[to]
        known = value.local or value.rref_id in counts.owned
        fork, actions = counts.receive(value.owner, value.rref_id, message.fork_id, message.parent)
        if fork is None:
            excused = value.failed or message.parent not in self.workers
            assert known or excused, "a reachable value was freed"
            if known:
                self.handles.append(Handle(to, value, None))
                value.local += 1
        else:
            self.handles.append(Handle(to, value, fork))
        self.perform(to, actions)

    def drain(self) -> None:
        for _ in range(MOST_DELIVERIES):
            if not self.deliver_one():
                return
        raise AssertionError("the history does not end")

    # --- the program -------------------------------------------------------------------

    def step(self) -> None:
        operations = (self.create, self.pass_on, self.drop, self.time_out, self.kill)
        weights = (3, 8, 4, 0.3, 0.25)
        if self.random.random() < 0.6:
            self.deliver_one()
        else:
            self.random.choices(operations, weights)[0]()
        self.check_safety()

    def create(self) -> None:
        worker, owner = (self.random.choice(list(self.workers)) for _ in range(2))
        counts = self.workers[worker]
        value = Value(counts.new_id(), owner)
        self.values[value.rref_id] = value
        if owner == worker:
            value.created, value.local = True, 1
            self.handles.append(Handle(worker, value, None))
            return
        fork = counts.originate(value.rref_id, owner)
        self.handles.append(Handle(worker, value, fork))
        value.failed = self.random.random() < 0.05
        self.send(worker, owner, Create(value, fork.fork_id))

    def pass_on(self) -> None:
        usable = [h for h in self.handles if h.fork is None or self.is_passable(h.fork)]
        if not usable:
            return
        handle = self.random.choice(usable)
        worker, value, fork = handle.worker, handle.value, handle.fork
        to, counts = self.random.randrange(self.size), self.workers[worker]
        child = counts.pass_on(fork, to) if fork else counts.share(value.rref_id, value, to)
        if to not in self.workers or self.random.random() < 0.1:  # the message never leaves
            undo = counts.revoke(child) if fork else counts.unshare(value.rref_id, child)
            self.perform(worker, undo)
        else:
            self.send(worker, to, Passed(value, child, worker))

    @staticmethod
    def is_passable(fork: Fork) -> bool:
        created = fork.origin and fork.state is ForkState.PENDING
        return created or fork.state is ForkState.CONFIRMED

    def drop(self) -> None:
        if self.handles:
            self.drop_handle(self.random.choice(self.handles))

    def drop_handle(self, handle: Handle) -> None:
        self.handles.remove(handle)
        if handle.fork is None:
            handle.value.local -= 1
            self.note_freed(handle.value)
        else:
            self.perform(handle.worker, self.workers[handle.worker].drop(handle.fork))

    def time_out(self) -> None:
        pending = [
            (handle.worker, handle.fork)
            for handle in self.handles
            if handle.fork and handle.fork.origin and not handle.value.failed
        ]
        if pending:
            worker, fork = self.random.choice(pending)
            self.perform(worker, self.workers[worker].settle(fork, ForkState.TIMED_OUT))

    def kill(self) -> None:
        victim = self.random.choice(list(self.workers))
        self.story.append(f"{victim} dies")
        del self.workers[victim]
        self.handles = [h for h in self.handles if h.worker != victim]
        self.undecoded = [(to, m) for to, m in self.undecoded if to != victim]
        for pair in [pair for pair in self.channels if pair[1] == victim]:
            del self.channels[pair]
        for survivor in self.workers:
            queue = self.channels.setdefault((victim, survivor), deque())
            while queue and self.random.random() < 0.5:
                queue.pop()
            queue.append(Lost())
        if not self.workers:
            self.undecoded.clear()

    # --- what must hold ----------------------------------------------------------------

    def check_safety(self) -> None:
        """No value is freed while the program can reach it."""
        for handle in self.handles:
            fork = handle.fork
            if fork is None or not self.counts_on(handle.value, fork.parent, fork.state):
                continue
            owned = self.workers[handle.value.owner].owned.get(handle.value.rref_id)
            assert owned is not None, "a reachable value was freed"
            if fork.state is ForkState.CONFIRMED:
                assert owned.forks.get(fork.fork_id) == handle.worker, "a fork is not counted"
        messages = [m for q in self.channels.values() for m in q if isinstance(m, Passed)]
        for message in messages + [m for _, m in self.undecoded]:
            if self.counts_on(message.value, message.parent, ForkState.PENDING):
                owner = self.workers[message.value.owner]
                known = message.value.rref_id in owner.owned
                assert known, "a value was freed while a reference to it travelled"

    def counts_on(self, value: Value, parent: int, state: ForkState) -> bool:
        """Tell whether the value must be there for a reference in this state."""
        if value.owner not in self.workers or not value.created:
            return False
        if state is ForkState.PENDING:  # a parent that died may take the value along
            return parent in self.workers
        return state is ForkState.CONFIRMED

    def check_quiet(self) -> None:
        """With no message under way, the owners count exactly what the program holds."""
        expected: dict[int, dict[int, int]] = {}
        for handle in self.handles:
            if (fork := handle.fork) and handle.value.owner in self.workers:
                assert fork.state is not ForkState.PENDING, "a fork stays pending"
                if fork.state in (ForkState.CONFIRMED, ForkState.TIMED_OUT):
                    expected.setdefault(fork.rref_id, {})[fork.fork_id] = handle.worker
        actual = {
            rref_id: owned.forks
            for counts in self.workers.values()
            for rref_id, owned in counts.owned.items()
        }
        assert actual == expected, "an owner counts forks that nobody holds"

    def check_empty(self) -> None:
        """With nothing held, all books are empty and each value was freed once."""
        for counts in self.workers.values():
            assert not any(counts.counters().values()), f"left over: {counts.counters()}"
        for value in self.values.values():
            if value.owner in self.workers and value.created and self.was_seen(value):
                assert value.freed == 1, f"value freed {value.freed} times"

    def was_seen(self, value: Value) -> bool:
        return worker_of(value.rref_id) in self.workers

    def run(self) -> None:
        for _ in range(self.random.randint(10, 120)):
            if not self.workers:
                return
            self.step()
        self.drain()
        self.check_safety()
        self.check_quiet()
        while self.handles:
            self.drop()
        self.drain()
        self.check_empty()


def run_histories(count: int, counts_class: type[ReferenceCounts] = ReferenceCounts) -> None:
    for seed in range(count):
        simulation = Simulation(seed, counts_class)
        try:
            simulation.run()
        except AssertionError as error:
            story = "\n".join(simulation.story[-60:])
            raise AssertionError(f"seed {seed}: {error}\n{story}") from error


@pytest.mark.deadline(60 + HISTORIES / 100)
def test_histories_random_keep_all_books() -> None:
    run_histories(HISTORIES)


# --- the simulator itself must notice broken machines ------------------------------------


class ForgetsChildren(ReferenceCounts):
    """Breaks invariant 3: a parent does not wait for its children."""

    def pass_on(self, fork: Fork, to: int) -> int:
        child = super().pass_on(fork, to)
        fork.children.clear()
        return child


class RegistersLate(ReferenceCounts):
    """Breaks invariant 2: the owner gives forks out without counting them."""

    def share(self, rref_id: int, value: Any, to: int) -> int:
        return self.new_id()


class NeverReclaims(ReferenceCounts):
    """Breaks invariant 6: forks of lost workers stay."""

    def lose(self, worker: int) -> list[Any]:
        self.lost.add(worker)
        return []


class NeverParks(ReferenceCounts):
    """Breaks invariant 5: a fork request that overtakes the creation is refused."""

    def on_fork_request(self, user: int, rref_id: int, fork_id: int) -> list[Any]:
        if rref_id in self.owned:
            return super().on_fork_request(user, rref_id, fork_id)
        return [Answer(user, fork_id, False)]


class DeletesPending(ReferenceCounts):
    """Breaks invariant 4: a pending fork is reported as ended."""

    def drop(self, fork: Fork) -> list[Any]:
        if fork.state is ForkState.PENDING and not fork.origin:
            self.used.pop(fork.fork_id, None)
            return [End(fork.owner, fork.rref_id, fork.fork_id)]
        return super().drop(fork)


class KeepsRevoked(ReferenceCounts):
    """Keeps the early fork of a message that never left."""

    def unshare(self, rref_id: int, fork_id: int) -> list[Any]:
        return []


@pytest.mark.parametrize(
    "broken",
    [
        ForgetsChildren,
        RegistersLate,
        NeverReclaims,
        NeverParks,
        DeletesPending,
        KeepsRevoked,
    ],
)
def test_simulator_broken_machine_is_noticed(broken: type[ReferenceCounts]) -> None:
    with pytest.raises(AssertionError, match="seed"):
        run_histories(1000, broken)
