"""Steps of distributed optimizers: all workers that live come to one outcome, whoever dies.

A simulated network delivers messages between two workers in order. A worker that dies may
take the last of what it sent with it; who was connected to it learns of its death after the
rest has arrived, others when they turn to it.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict, deque
from typing import Any

import pytest

from distgrad.optim.protocol import Answer, Ask, Outcome, Settle, StepBook

HISTORIES = int(os.environ.get("DISTGRAD_PROGRAMS", "2000"))
OPTIMIZER, STEPS = 7, 3


class Member:
    """A worker: its book, and the steps that its parameters have made."""

    def __init__(self, number: int, book: StepBook) -> None:
        self.number, self.book = number, book
        self.alive = True
        self.applied: list[int] = []
        self.prepared: set[int] = set()
        self.settled: set[int] = set()


class Network:
    """Workers, what is on its way between them, and the coordinator's program."""

    def __init__(self, seed: int, book: type[StepBook]) -> None:
        self.choices = random.Random(seed)
        size = self.choices.randrange(2, 6)
        self.members = [Member(i, book(i)) for i in range(size)]
        self.owners = list(range(self.choices.randrange(2), size))  # with the coordinator or not
        self.line = (0, *range(1, size))
        self.wires: dict[tuple[int, int], deque[tuple[Any, ...]]] = defaultdict(deque)
        self.met: set[frozenset[int]] = set()
        self.decided: dict[int, bool] = {}
        self.votes: dict[int, bool] = {}
        self.step = 0

    # --- the coordinator ---------------------------------------------------------------------

    def next_step(self) -> None:
        self.step += 1
        self.votes = {}
        self.members[0].book.begin(self.step, OPTIMIZER, self.line)
        for owner in self.owners:
            if owner == 0:
                self.wires[0, 0].append(("compute", self.step))
            elif owner in self.members[0].book.lost:
                self.wires[owner, 0].append(("lost", None))
            else:
                self.send(0, owner, "prepare", self.step)

    def on_vote(self, owner: int, vote: bool) -> None:
        self.votes.setdefault(owner, vote)
        if self.step not in self.decided and len(self.votes) == len(self.owners):
            commit = self.decided[self.step] = all(self.votes.values())
            self.act(self.members[0], self.members[0].book.decide(self.step, commit))
            for other in self.line[1:]:
                self.send(0, other, "decide", (self.step, commit))
            if self.step < STEPS:
                self.next_step()

    # --- everybody ---------------------------------------------------------------------------

    def vote(self, member: Member, step: int) -> None:
        if self.choices.random() < 0.1:
            self.act(member, member.book.decide(step, False))
            vote = False
        else:
            vote = member.book.prepare(step)
            if vote:
                member.prepared.add(step)
        if member.number == 0:
            self.on_vote(0, vote)
        else:
            self.send(member.number, 0, "vote", (step, vote))

    def act(self, member: Member, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Settle(step, commit):
                    assert step not in member.settled
                    member.settled.add(step)
                    if commit and member.number in self.owners:
                        assert step in member.prepared
                        member.applied.append(step)
                case Ask(to, step, optimizer, line):
                    body = (step, optimizer, line)
                    if not self.send(member.number, to, "question", body):
                        self.act(member, member.book.lose(to))
                case Answer((asker, step), outcome):
                    self.send(member.number, asker, "answer", (step, outcome))

    def send(self, source: int, to: int, kind: str, body: Any) -> bool:
        """Send; False if the receiver is dead and was never met, so that this is noticed now."""
        pair = frozenset((source, to))
        if not self.members[to].alive:
            if pair not in self.met and kind in ("prepare", "decide"):
                self.wires[to, source].append(("lost", None))
                self.met.add(pair)
            return pair in self.met
        self.met.add(pair)
        self.wires[source, to].append((kind, body))
        return True

    def kill(self, victim: int) -> None:
        self.members[victim].alive = False
        for other in self.members:
            wire = self.wires[victim, other.number]
            for _ in range(self.choices.randrange(len(wire) + 1)):
                wire.pop()
            if frozenset((victim, other.number)) in self.met:
                wire.append(("lost", None))

    def deliver(self, source: int, to: int) -> None:
        kind, body = self.wires[source, to].popleft()
        member = self.members[to]
        if not member.alive:
            return
        match kind:
            case "prepare":
                if member.book.begin(body, OPTIMIZER, self.line):
                    self.wires[to, to].append(("compute", body))
            case "compute":
                self.vote(member, body)
            case "decide":
                self.act(member, member.book.decide(*body))
            case "vote":
                if body[0] == self.step:
                    self.on_vote(source, body[1])
            case "question":
                self.act(member, member.book.on_question(source, (source, body[0]), *body))
            case "answer":
                self.act(member, member.book.on_answer(body[0], source, body[1]))
            case "lost":
                self.act(member, member.book.lose(source))
                if to == 0 and source in self.owners:
                    self.on_vote(source, False)

    def run(self) -> None:
        self.next_step()
        deadly = self.choices.choice([0.0, 0.01, 0.05, 0.2])
        while ready := [pair for pair, wire in self.wires.items() if wire]:
            self.deliver(*self.choices.choice(ready))
            living = [m.number for m in self.members if m.alive]
            if len(living) > 1 and self.choices.random() < deadly:
                # The coordinator more often: without it things become difficult.
                self.kill(0 if living[0] == 0 and self.choices.random() < 0.4
                          else self.choices.choice(living))  # fmt: skip

    def check(self) -> None:
        living = [m for m in self.members if m.alive and m.number in self.owners]
        for member in self.members:
            assert not (member.alive and member.book.steps), "a step never ends"
            assert len(member.book.committed) <= 1
        paths = {tuple(member.applied) for member in living}
        assert len(paths) <= 1, f"owners disagree: {paths}"
        for path in paths:
            for step, commit in self.decided.items():
                if self.members[0].alive or not commit:
                    assert (step in path) == commit


def run_history(seed: int, book: type[StepBook] = StepBook) -> Network:
    network = Network(seed, book)
    network.run()
    network.check()
    return network


def run_histories(n: int, book: type[StepBook]) -> None:
    for seed in range(n):
        run_history(seed, book)


def test_steps_random_histories_have_one_outcome() -> None:
    outcomes: dict[str, int] = defaultdict(int)
    for seed in range(HISTORIES):
        network = run_history(seed)
        lost = not network.members[0].alive
        living = [m for m in network.members if m.alive and m.number in network.owners]
        undecided = network.step not in network.decided
        outcomes["coordinator lost in a step"] += lost and undecided and bool(living)
        outcomes["committed without it"] += lost and any(
            network.decided.get(step) and step == network.step for m in living for step in m.applied
        )
    assert min(outcomes.values()) > HISTORIES / 400, outcomes


class AnswersEarly(StepBook):
    """Says that it does not know while a decision is on its way."""

    def on_question(self, asker: Any, token: Any, step: Any, optimizer: Any, line: Any) -> Any:
        found = self.steps.get(step)
        if found is not None and found.prepared and line[0] != self.worker_id:
            return [Answer(token, Outcome.UNDECIDED)]
        return super().on_question(asker, token, step, optimizer, line)


class CommitsAlone(StepBook):
    """Drops a step without the others when the coordinator is lost."""

    def lose(self, worker: int) -> Any:
        actions = super().lose(worker)
        for step, found in list(self.steps.items()):
            if found.line[0] == worker and found.prepared:
                actions += self.decide(step, False)
        return actions


class Forgetful(StepBook):
    """Does not remember what it committed."""

    def decide(self, step: int, commit: bool) -> Any:
        actions = super().decide(step, commit)
        self.committed.clear()
        return actions


class Patient(StepBook):
    """Waits for a head that it never was connected to."""

    def on_answer(self, step: int, peer: int, outcome: Outcome) -> Any:
        return []


@pytest.mark.parametrize("broken", [AnswersEarly, CommitsAlone, Forgetful, Patient])
def test_simulator_broken_book_is_noticed(broken: type[StepBook]) -> None:
    with pytest.raises(AssertionError):
        run_histories(20 * HISTORIES, broken)


def test_steps_of_one_optimizer_leave_one_number() -> None:
    book = StepBook(1)
    for step in range(1, 100):
        assert book.begin(step, OPTIMIZER, (0, 1, 2))
        assert book.prepare(step)
        assert book.decide(step, True) == [Settle(step, True)]
    assert book.committed == {OPTIMIZER: 99}
    book.forget(lambda optimizer: optimizer != OPTIMIZER)
    assert book.committed == {}


def test_step_of_a_lost_coordinator_is_not_begun() -> None:
    book = StepBook(1)
    book.lose(0)
    assert not book.begin(1, OPTIMIZER, (0, 1, 2))
    assert book.steps == {}


def test_step_question_after_the_decision_is_answered_at_once() -> None:
    book = StepBook(1)
    book.begin(1, OPTIMIZER, (0, 1, 2))
    book.prepare(1)
    assert book.on_question(2, "token", 1, OPTIMIZER, (0, 1, 2)) == [
        Ask(0, 1, OPTIMIZER, (0, 1, 2))
    ]
    assert book.decide(1, True) == [Settle(1, True), Answer("token", Outcome.COMMITTED)]
    assert book.on_question(2, "later", 1, OPTIMIZER, (0, 1, 2)) == [
        Answer("later", Outcome.COMMITTED)
    ]
