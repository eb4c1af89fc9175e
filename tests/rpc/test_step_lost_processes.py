"""A distributed step when a process dies at any message of it: on all that live, or on none.

``DISTGRAD_STEP_DEATHS=1`` runs all histories of two deaths, where otherwise some are run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad._core import Tensor
from distgrad.errors import DistgradError, WorkerLostError
from distgrad.message import StepDecide, StepPrepare, StepQuestion, code_of
from distgrad.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    DistributedOptimizer,
    Optimizer,
    RMSprop,
    Rprop,
)
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


def make_optimizer(
    rank: int, owners: tuple[int, ...], cls: type[Optimizer], settings: dict[str, Any]
) -> None:
    rrefs = [rref for owner in owners for rref in rpc.rpc_sync(owner, make_weights)]
    kept["optimizer"], kept["owners"] = DistributedOptimizer(cls, rrefs, **settings), owners


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


def keep_part(rank: int) -> None:
    """Hold the optimizer here, which would go with the coordinator."""
    (kept["part"],) = rpc.current_worker().extensions["optim"].parts.values()


def check_state_goes_with_values(
    rank: int, cls: type[Optimizer], settings: dict[str, Any], values: set[float]
) -> None:
    """Compare values and state of the optimizer here with one that has stepped, or has not."""
    twins = [Tensor(np.full(5, OLD), requires_grad=True) for _ in weights]
    twin = cls(twins, **settings)
    if values != {OLD}:
        twin.step({weight: Tensor(np.ones(5)) for weight in twins})
    np.testing.assert_equal(kept["part"]._optimizer.state_dict(), twin.state_dict())
    for weight, other in zip(weights, twins, strict=True):
        np.testing.assert_array_equal(weight.data, other.data)


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


def die_at_outcome(rank: int, when: str) -> None:
    """Die before or after the answer to a question what a step has come to."""
    agent = rpc.current_worker().agent
    agent.reply = around(agent.reply, 1, when, lambda to, request, value: type(value) is int)  # type: ignore[method-assign]


# --- tests --------------------------------------------------------------------------------------


def run_step(
    victims: dict[int, tuple[Any, ...]],
    owners: tuple[int, ...] = OWNERS,
    cls: type[Optimizer] = SGD,
    **settings: Any,
) -> tuple[set[float], str | None]:
    """Step while the victims die; return the values of the living owners, and what was raised."""
    settings = settings or {"lr": 0.5, "momentum": 0.5}  # the first step is the same as without
    with World(4, transport="unix") as world:
        world.run(make_optimizer, owners, cls, settings, ranks=[COORDINATOR])
        world.run(keep_part, ranks=list(owners))
        for rank, (arm, *args) in victims.items():
            world.run(arm, *args, ranks=[rank])
        report: str | None = None
        try:
            (report,) = world.run(step, ranks=[COORDINATOR])
        except WorkerLostError:
            assert COORDINATOR in victims
        living = [owner for owner in owners if owner not in victims]
        values = world.run(values_once_settled, ranks=living)
        agreed = {value for of_worker in values for value in of_worker}
        world.run(check_state_goes_with_values, cls, settings, agreed, ranks=living)
        if COORDINATOR not in victims and not report:
            # The loss came after the decision; the next step names who is lost.
            (report,) = world.run(step, ranks=[COORDINATOR])
            assert report
            again = world.run(values_once_settled, ranks=living)
            assert again == values
        for victim in victims:  # also who had no occasion to die
            with suppress(ProcessLookupError):
                world.kill(victim)
    return agreed, report


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((die_at_message, "before", StepPrepare), OLD),
        ((die_at_message, "after", StepPrepare), OLD),
        ((die_at_answer, "before"), OLD),
        ((die_at_answer, "after"), NEW),
        ((die_at_message, "before", StepDecide), NEW),
        ((die_at_message, "after", StepDecide), NEW),
    ],
    ids=["request", "unprepared", "prepared", "answered", "decision", "applied"],
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


@pytest.mark.parametrize(
    ("cls", "commit"),
    [(kind, True) for kind in (Adam, AdamW, Adagrad, RMSprop, Adadelta, Adamax, Rprop)]
    + [(Adam, False), (Rprop, False)],
)
def test_step_of_every_optimizer_takes_its_state_along(cls: type[Optimizer], commit: bool) -> None:
    # One owner dies with the coordinator, and the others find out what the step has come to.
    point = (die_at_send, "before", StepDecide, 3 if commit else 1)
    victims = {COORDINATOR: point, 1: (die_at_message, "before", StepQuestion)}
    values, _ = run_step(victims, cls=cls, lr=0.5)
    assert (values == {OLD}) == (not commit)
    assert len(values) == 1


ALL_DEATHS = os.environ.get("DISTGRAD_STEP_DEATHS", "0") not in ("", "0")
# Of a question and of its answer: taken in or not, sent or not.
RECOVERY: list[tuple[Any, ...]] = [
    (die_at_message, "before", StepQuestion),
    (die_at_message, "after", StepQuestion),
    (die_at_send, "before", StepQuestion, 1),
    (die_at_send, "after", StepQuestion, 1),
    (die_at_send, "before", StepQuestion, 2),
    (die_at_send, "after", StepQuestion, 2),
    (die_at_outcome, "before"),
    (die_at_outcome, "after"),
]


@pytest.mark.parametrize("victim", OWNERS if ALL_DEATHS else (1, 3))
@pytest.mark.parametrize(
    "point", RECOVERY, ids=lambda p: "-".join(str(getattr(x, "__name__", x)) for x in p)
)
@pytest.mark.parametrize("told", (0, 1, 2) if ALL_DEATHS else (1,))
def test_step_killed_again_while_it_is_recovered(
    told: int, point: tuple[Any, ...], victim: int
) -> None:
    values, _ = run_step(
        {COORDINATOR: (die_at_send, "before", StepDecide, told + 1), victim: point}
    )
    if told == 0:
        assert values == {OLD}
    elif told == 2 or victim != 1:
        assert values == {NEW}  # one who was told lives
    else:
        assert values in ({OLD}, {NEW})
