"""A distributed step when a process dies at any message of it: on all that live, or on none."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad._core import Tensor
from distgrad.errors import DistgradError, WorkerLostError
from distgrad.message import StepDecide, StepPrepare, StepQuestion, code_of
from distgrad.optim import SGD, DistributedOptimizer
from distgrad.testing import World

PATIENCE_S = 20.0
OLD, NEW = 1.0, 0.5
COORDINATOR, OWNERS = 0, (1, 2, 3)
MIDDLE = 2

# Of each process its own.
weights: list[Tensor] = []
kept: dict[str, Any] = {}


@rpc.expose
def make_weights() -> Any:
    weights.extend(Tensor(np.full(5, OLD), requires_grad=True) for _ in range(2))
    return [rpc.RRef(weight) for weight in weights]


@rpc.expose
def sum_weights() -> Any:
    return sum(weight.sum() for weight in weights)


def make_optimizer(rank: int, owners: tuple[int, ...]) -> None:
    rrefs = [rref for owner in owners for rref in rpc.rpc_sync(owner, make_weights)]
    kept["optimizer"], kept["owners"] = DistributedOptimizer(SGD, rrefs, lr=0.5), owners


def step(rank: int) -> str:
    """Step once; return what went wrong."""
    with dist_autograd.context() as context_id:
        living = [owner for owner in kept["owners"] if reaches(owner)]
        sums = [rpc.rpc_sync(owner, sum_weights) for owner in living]
        dist_autograd.backward(context_id, sums)
        try:
            kept["optimizer"].step(context_id)
        except DistgradError as error:
            return str(error)
    return ""


def reaches(owner: int) -> bool:
    try:
        rpc.rpc_sync(owner, make_ready)
    except WorkerLostError:
        return False
    return True


@rpc.expose
def make_ready() -> None:
    """Do nothing."""


def values_once_settled(rank: int) -> list[float]:
    """Wait until no step is under way here, and return the values of all parameters."""
    until, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while {n for name, n in rpc.debug_info().items() if name.startswith("optim.")} != {0}:
        assert time.monotonic() < until, f"a step never ends: {rpc.debug_info()}"
        pause.wait(0.005)
    return [float(value) for weight in weights for value in weight.data]


# --- where to die -----------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(call: Callable[..., Any], n: int, when: str, counts: Callable[..., bool]) -> Any:
    """Wrap a function so that the process dies before or after its n-th call that counts."""
    seen = iter(range(1, 1000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        last = counts(*args) and next(seen) == n
        if last and when == "before":
            die()
        value = call(*args, **kwargs)
        if last:
            die()
        return value

    return wrapped


def die_at_message(rank: int, when: str, kind: type) -> None:
    """Die when a message of this kind has arrived, or when it was taken in."""
    worker = rpc.current_worker()
    handler = worker.agent.handlers[code_of(kind)].handler
    worker.register(kind, around(handler, 1, when, lambda *args: True), inline=True)


def die_at_send(rank: int, when: str, kind: type, n: int) -> None:
    """Die before or after the n-th message of this kind is sent."""
    worker: Any = rpc.current_worker()
    name = "post" if kind is StepDecide else "request"
    call = getattr(worker, name)
    setattr(worker, name, around(call, n, when, lambda to, body: type(body) is kind))


def die_at_answer(rank: int, when: str) -> None:
    """Die before or after the answer that the step is prepared."""
    worker: Any = rpc.current_worker()
    table, agent, prepared = worker.extensions["optim"], worker.agent, threading.Event()
    prepare = table.prepare

    def note(*args: Any) -> Any:
        answer = prepare(*args)
        prepared.set()
        return answer

    table.prepare = note
    agent.reply = around(agent.reply, 1, when, lambda *args: prepared.is_set())


# --- tests --------------------------------------------------------------------------------------


def run_step(
    victims: dict[int, tuple[Any, ...]], owners: tuple[int, ...] = OWNERS
) -> tuple[set[float], str | None]:
    """Step while the victims die; return the values of the living owners, and what was raised."""
    with World(4, transport="unix") as world:
        world.run(make_optimizer, owners, ranks=[COORDINATOR])
        for rank, (arm, *args) in victims.items():
            world.run(arm, *args, ranks=[rank])
        report: str | None = None
        try:
            (report,) = world.run(step, ranks=[COORDINATOR])
        except WorkerLostError:
            assert COORDINATOR in victims
        living = [owner for owner in owners if owner not in victims]
        values = world.run(values_once_settled, ranks=living)
        if COORDINATOR not in victims and not report:
            # The loss came after the decision; the next step names who is lost.
            (report,) = world.run(step, ranks=[COORDINATOR])
            assert report
            again = world.run(values_once_settled, ranks=living)
            assert again == values
        world._members._killed.update(victims)  # type: ignore[union-attr]
    return {value for of_worker in values for value in of_worker}, report


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((die_at_message, "before", StepPrepare), OLD),
        ((die_at_answer, "before"), OLD),
        ((die_at_answer, "after"), NEW),
        ((die_at_message, "before", StepDecide), NEW),
        ((die_at_message, "after", StepDecide), NEW),
    ],
    ids=["request", "prepared", "answered", "decision", "applied"],
)
def test_step_owner_killed_is_named_and_the_others_agree(
    point: tuple[Any, ...], expected: float
) -> None:
    values, report = run_step({MIDDLE: point})
    assert values == {expected}
    assert "the optimizer on worker 'worker2' failed" in str(report)


@pytest.mark.parametrize(
    ("when", "kind", "n", "expected"),
    [
        ("before", StepPrepare, 1, OLD),
        ("before", StepPrepare, 2, OLD),
        ("before", StepPrepare, 3, OLD),
        ("after", StepPrepare, 3, OLD),
        ("before", StepDecide, 1, OLD),
        ("before", StepDecide, 2, NEW),
        ("before", StepDecide, 3, NEW),
        ("after", StepDecide, 3, NEW),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_step_coordinator_killed_leaves_the_owners_agreed(
    when: str, kind: type, n: int, expected: float
) -> None:
    values, report = run_step({COORDINATOR: (die_at_send, when, kind, n)})
    assert values == {expected}
    assert report is None


@pytest.mark.parametrize("n", [1, 2])
def test_step_coordinator_that_owns_parameters_is_killed(n: int) -> None:
    victims = {COORDINATOR: (die_at_send, "before", StepDecide, n)}
    values, _ = run_step(victims, owners=(0, 1, 2, 3))
    assert values == {OLD if n == 1 else NEW}


@pytest.mark.parametrize(
    ("n", "head", "expected"),
    [
        (1, (die_at_message, "before", StepQuestion), OLD),
        (1, (die_at_send, "before", StepQuestion, 1), OLD),
        (2, (die_at_message, "before", StepQuestion), OLD),  # it alone had stepped
        (3, (die_at_message, "before", StepQuestion), NEW),  # and so had another
        (1, (die_at_message, "after", StepPrepare), OLD),
    ],
    ids=["asked", "asks", "knew", "another knows", "unprepared"],
)
def test_step_head_killed_after_the_coordinator_leaves_the_rest_agreed(
    n: int, head: tuple[Any, ...], expected: float
) -> None:
    values, _ = run_step({COORDINATOR: (die_at_send, "before", StepDecide, n), 1: head})
    assert values == {expected}
