"""What the steps of distributed optimizers come to, as a state machine without I/O.

One `StepBook` a worker. Events go in as method calls; what has to be applied, dropped, asked
or answered comes out as a list of actions. ``docs/protocol/step.md`` explains why all
workers that live come to one outcome.

Terms. A step has a *line*: its coordinator, then the owners of its parameters by id. The
*head* is the first of the line that is not lost; it alone may decide what is not decided.

Invariants, cited by the tests:

1. A worker that is prepared waits for a decision; before that it may drop the step alone.
2. The coordinator decides to commit only when all owners are prepared.
3. Who is asked by another answers only what is decided, or if all before the asker are lost:
   then nobody can decide but the asker, and nothing decided by those is on its way.
4. A head that is no coordinator commits if anybody behind it has, and aborts otherwise.
5. A commit is remembered until the next commit of the same optimizer: its owners were all
   prepared for that, so they knew of this one. A step that nobody remembers is aborted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

__all__ = ["Action", "Answer", "Ask", "Outcome", "Settle", "StepBook"]


class Outcome(IntEnum):
    """What a worker knows of a step."""

    UNDECIDED = 0  # prepared; whether it happens is not known
    COMMITTED = 1
    ABORTED = 2


class Settle(NamedTuple):
    """Apply the step on this worker, or drop what there is of it."""

    step: int
    commit: bool


class Ask(NamedTuple):
    """Ask a worker of the line what it knows; the answer goes to `StepBook.on_answer`."""

    to: int
    step: int
    optimizer: int
    line: tuple[int, ...]


class Answer(NamedTuple):
    """Answer the question that ``token`` stands for."""

    token: Any
    outcome: Outcome


Action = Settle | Ask | Answer


@dataclass(slots=True)
class _Step:
    """A step that is not decided here."""

    optimizer: int
    line: tuple[int, ...]
    begun: bool = False  # this worker has its request, and locks or waits for locks
    prepared: bool = False
    asked: set[int] = field(default_factory=set)
    answered: set[int] = field(default_factory=set)  # do not know it either
    waiting: list[tuple[int, Any]] = field(default_factory=list)  # who asks, token


class StepBook:
    """The steps that one worker coordinates or takes part in.

    Parameters
    ----------
    worker_id
        Whose book it is.
    """

    def __init__(self, worker_id: int) -> None:
        self.worker_id = worker_id
        self.lost: set[int] = set()
        self.steps: dict[int, _Step] = {}
        self.committed: dict[int, int] = {}  # optimizer -> its last step

    def begin(self, step: int, optimizer: int, line: tuple[int, ...]) -> bool:
        """Note a step; False if its coordinator is lost, so that it must not be prepared."""
        if line[0] in self.lost:
            return False
        self.steps.setdefault(step, _Step(optimizer, line)).begun = True
        return True

    def prepare(self, step: int) -> bool:
        """Note that an owner is ready to commit; False if the step was dropped meanwhile."""
        found = self.steps.get(step)
        if found is not None:
            found.prepared = True
        return found is not None

    def decide(self, step: int, commit: bool) -> list[Action]:
        """Take in the decision, of this worker or another; later ones have no effect."""
        found = self.steps.pop(step, None)
        if found is None:
            return []
        if commit:
            self.committed[found.optimizer] = step
        outcome = Outcome.COMMITTED if commit else Outcome.ABORTED
        actions: list[Action] = [Settle(step, commit)] if found.begun else []
        return actions + [Answer(token, outcome) for _, token in found.waiting]

    def lose(self, worker: int) -> list[Action]:
        """Note that a worker is gone."""
        self.lost.add(worker)
        actions: list[Action] = []
        for step, found in list(self.steps.items()):
            if worker in found.line:
                found.waiting = [entry for entry in found.waiting if entry[0] != worker]
                actions += self._pursue(step, found)
        return actions

    def on_question(
        self, asker: int, token: Any, step: int, optimizer: int, line: tuple[int, ...]
    ) -> list[Action]:
        """Take in the question of a worker of the line."""
        if self.committed.get(optimizer) == step:
            return [Answer(token, Outcome.COMMITTED)]
        if step not in self.steps and line[0] == self.worker_id:
            return [Answer(token, Outcome.ABORTED)]
        found = self.steps.setdefault(step, _Step(optimizer, line))
        found.waiting.append((asker, token))
        return self._pursue(step, found)

    def on_answer(self, step: int, peer: int, outcome: Outcome) -> list[Action]:
        """Take in what another worker knows."""
        found = self.steps.get(step)
        if found is None:
            return []
        if outcome is not Outcome.UNDECIDED:
            return self.decide(step, outcome is Outcome.COMMITTED)
        found.answered.add(peer)
        return self._pursue(step, found)

    def forget(self, is_alive: Callable[[int], bool]) -> None:
        """Forget the commits of optimizers that are gone, unless their coordinator is lost."""
        self.committed = {
            optimizer: step
            for optimizer, step in self.committed.items()
            if is_alive(optimizer) or step >> 48 in self.lost
        }

    # --- without the coordinator -----------------------------------------------------------

    def _pursue(self, step: int, found: _Step) -> list[Action]:
        """Do what brings a step nearer to its end."""
        if not found.begun and not found.waiting:
            del self.steps[step]  # only others wanted to know
            return []
        coordinator = found.line[0]
        if found.begun and not found.prepared and coordinator in self.lost:
            return self.decide(step, commit=False)  # invariant 1
        head = next(worker for worker in found.line if worker not in self.lost)
        if head == self.worker_id:
            return [] if head == coordinator else self._lead(step, found)
        if head == coordinator and not found.waiting:
            return []  # it will tell
        return self._answer_head(step, found, head) + self._ask(step, found, [head])

    def _lead(self, step: int, found: _Step) -> list[Action]:
        """Decide once all behind have answered or are lost (invariant 4)."""
        behind = [w for w in found.line if w != self.worker_id and w not in self.lost]
        missing = [worker for worker in behind if worker not in found.answered]
        return self._ask(step, found, missing) if missing else self.decide(step, commit=False)

    def _ask(self, step: int, found: _Step, workers: list[int]) -> list[Action]:
        new = [worker for worker in workers if worker not in found.asked]
        found.asked.update(new)
        return [Ask(worker, step, found.optimizer, found.line) for worker in new]

    def _answer_head(self, step: int, found: _Step, head: int) -> list[Action]:
        """Answer the one before whom nobody lives any more (invariant 3)."""
        outcome = Outcome.UNDECIDED if found.prepared else Outcome.ABORTED
        tokens = [token for asker, token in found.waiting if asker == head]
        found.waiting = [entry for entry in found.waiting if entry[0] != head]
        return [Answer(token, outcome) for token in tokens]
