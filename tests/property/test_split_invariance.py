"""The same program on one worker and cut over several gives the same values and gradients.

Random programs of all operations that have a check, cut over 2 to 5 workers whose messages wait
at random. ``--programs 2000 --seed 1`` runs more of them, ``--programs 1 --seed N`` one again;
``-s`` shows what was run and how far results were apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import faulty
import numpy as np
import pytest
import split_programs as programs

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.testing import World
from distgrad.transport.inproc import InprocTransport
from distgrad.transport.stream import UnixTransport

DELAY_S = 0.002  # of a message, at most

Worlds = Callable[[int, str], World]


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    """Worlds by size and transport, made when they are first needed; their messages wait."""
    made: dict[tuple[int, str], World] = {}
    with ExitStack() as stack:
        stack.enter_context(faulty.installed(InprocTransport, UnixTransport))

        def world(workers: int, transport: str = "inproc") -> World:
            key = workers, transport
            if key not in made:
                made[key] = stack.enter_context(World(workers, transport=transport))
            return made[key]

        faulty.plan.longest = DELAY_S
        stack.callback(setattr, faulty.plan, "longest", 0.0)
        yield world


def run_split(world: World, program: programs.Program) -> tuple[bytes, list[Any]]:
    """Return the roots' bits, and the gradients of the leaves, wherever they live."""
    driver, everybody = [program.driver], list(range(program.workers))
    context_id, roots = world.run(programs.split, program, ranks=driver)[0]
    found: dict[int, Any] = {}
    for part in world.run(programs.collect, context_id, ranks=everybody):
        found |= part
    world.run(programs.leave, context_id, ranks=driver)
    return roots, [found.get(k) for k in range(len(program.owners))]


def apart(found: list[Any], expected: list[Any], terms: list[Any]) -> float:
    """Return how far gradients are apart, each in ulp of the largest term in one of its sums."""
    furthest = 0.0
    for ours, theirs, term in zip(found, expected, terms, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            ulp = np.spacing(term.max().astype(ours.dtype))
            furthest = max(furthest, float((np.abs(ours - theirs) / ulp).max()))
    return furthest


def bits(gradients: list[Any]) -> list[bytes | None]:
    return [None if gradient is None else gradient.tobytes() for gradient in gradients]


def check(program: programs.Program, worlds: Worlds) -> float:
    """Run a program whole, cut, and cut again; return how far the cut gradients are off."""
    values, gradients = programs.alone(program)
    terms = programs.largest_terms(program, values, gradients)
    expected = [gradient for gradient, *_ in gradients[: len(program.owners)]]
    transport = "unix" if program.seed % 5 == 0 else "inproc"
    world = worlds(program.workers, transport)
    first, second = (run_split(world, program) for _ in range(2))
    assert first[0] == second[0]
    assert bits(first[1]) == bits(second[1])
    assert not program.exact or all(term.max() < 2.0**40 for term in terms)
    return apart(first[1], expected, terms)


@pytest.mark.deadline(3600)
def test_split_over_workers_same_gradients_and_the_same_bits_each_time(
    worlds: Worlds, pytestconfig: pytest.Config, extent: Callable[[int, int], int], seed: int
) -> None:
    count = pytestconfig.getoption("--programs") or extent(60, 2000)
    distances: Counter[int] = Counter()
    for number in range(seed, seed + count):
        program = programs.draw(number)
        try:
            distance = check(program, worlds)
            assert distance <= (0.0 if program.exact else 4.0)
        except BaseException as error:
            error.add_note(f"--programs 1 --seed {number}: {program}")
            raise
        distances[int(np.ceil(distance))] += 1
    print(f"\n--seed {seed}: {count} programs; ulp apart, how often: {sorted(distances.items())}")


weights: dict[int, Any] = {}  # by worker


@rpc.expose
def stage(x: Any, route: list[int]) -> Any:
    y = np.tanh(x @ weights[rpc.get_worker_info().id])
    return rpc.rpc_sync(route[0], stage, args=(y, route[1:])) if route else y


@rpc.expose
def bits_of_weight(context_id: int) -> bytes:
    mine = weights[rpc.get_worker_info().id]
    return bytes(dist_autograd.get_gradients(context_id)[mine].numpy().tobytes())


def pipeline(rank: int) -> tuple[bytes, ...]:
    """Run eight micro-batches at once through two stages, whose weights get eight terms each."""
    numbers = np.random.default_rng(0)
    for worker in (1, 2):
        weights[worker] = dg.tensor(numbers.normal(size=(5, 5)), requires_grad=True)
    batches = [dg.tensor(numbers.normal(size=(2, 5))) for _ in range(8)]
    with dist_autograd.context() as context_id:
        calls = [rpc.rpc_async(1, stage, args=(x, [2])) for x in batches]
        loss = sum(call.wait().sum() for call in calls)
        dist_autograd.backward(context_id, [loss], timeout=20)
        return tuple(rpc.rpc_sync(to, bits_of_weight, args=(int(context_id),)) for to in (1, 2))


def test_split_calls_served_at_once_sum_up_to_the_same_bits(worlds: Worlds) -> None:
    """Not even the order in which threads record what they send decides about bits."""
    found = {worlds(3).run(pipeline, ranks=[0])[0] for _ in range(25)}
    weights.clear()
    assert len(found) == 1
