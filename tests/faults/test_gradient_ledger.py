"""The ledger: no gradient is lost or counted twice, whatever breaks.

Every way a gradient can take to a leaf multiplies it by a power of two of its own. So the
gradient of a leaf is a sum of distinct powers: a missing bit names a lost message, a carry a
duplicate. Worlds of real processes run passes while connections break, messages are late and
workers are killed. ``--long`` injects 1 000 faults; ``-s`` shows what happened.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.errors import BackwardError, DistgradError, RpcTimeoutError, WorkerLostError
from distgrad.testing import World
from distgrad.transport.stream import TcpTransport, UnixTransport

# Importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
faulty = importlib.import_module("faulty")

WORKERS = 6
ROUNDS = 3  # a world
MOST_BITS = 50  # that a float64 adds without rounding
CALL_S, PASS_S = 10.0, 20.0


class Ledger:
    """What this process did in a round: open contexts, and what was passed how often."""

    def __init__(self) -> None:
        self.weights: dict[int, Any] = {}  # by size: a leaf that calls multiply with
        self.open: list[Any] = []
        self.lock = threading.Lock()

    def weight(self, size: int) -> Any:
        with self.lock:
            if size not in self.weights:
                self.weights[size] = dg.tensor(np.ones(size), requires_grad=True)
            return self.weights[size]


ledger = Ledger()


@rpc.expose
def carry(x: Any, route: list[tuple[int, int]], bit: int) -> Any:
    """Pass a value along a route of (worker, bit); each hop adds two terms of its own."""
    y = x * 2.0**bit + ledger.weight(x.size) * 2.0 ** (bit + 1)
    if route:
        (to, next_bit), *rest = route
        y = y + rpc.rpc_sync(to, carry, args=(x, rest, next_bit), timeout=CALL_S)
    return y


Entry = dict[str, Any]


def run_passes(rank: int, chance: random.Random) -> list[Entry]:
    return [run_pass(rank, chance) for _ in range(2)]


def run_pass(rank: int, chance: random.Random) -> Entry:
    size = chance.choice([1, 1, 20_000])
    x = dg.tensor(np.ones(size), requires_grad=True)
    context = dist_autograd.context().__enter__()
    ledger.open.append(context)
    expected: Counter[int] = Counter({rank: 0})  # by worker: what its weight must get
    own, bit = 0, 0  # what x must get
    loss = x.sum() * 0.0
    while bit < MOST_BITS - 8 and chance.random() < 0.9:
        hops = [chance.randrange(WORKERS) for _ in range(chance.randint(1, 4))]
        route = [(to, bit + 2 * k) for k, to in enumerate(hops)]
        bit += 2 * len(hops)
        (to, first), *rest = route
        try:
            y = rpc.rpc_sync(to, carry, args=(x, rest, first), timeout=CALL_S)
        except DistgradError:
            continue  # somebody is lost; its sends must not keep the pass waiting
        if chance.random() < 0.2:
            continue  # unused
        loss = loss + y.sum()
        for to, power in route:
            own += 1 << power
            expected[to] += 2 << power
    error = None
    try:
        dist_autograd.backward(context, [loss], timeout=PASS_S)
    except BackwardError as failure:
        error = type(failure.__cause__).__name__
        if isinstance(failure.__cause__, RpcTimeoutError):  # nobody saw that a message was lost
            raise
    return {
        "context": int(context), "size": size, "own": own, "expected": dict(expected),
        "error": error, "found": total(context.gradient(x), size),
    }  # fmt: skip


def total(gradient: Any, size: int) -> int:
    """Return what all elements of a gradient are."""
    values = np.zeros(1) if gradient is None else np.unique(gradient.numpy())
    assert len(values) == 1, values
    return int(values[0])


def look(rank: int, asked: list[tuple[int, int]]) -> dict[int, int]:
    """Return what this worker's weight got, by context; contexts unknown here are left out."""
    return {
        context_id: total(
            dist_autograd.get_gradients(context_id).get(ledger.weight(size)), size
        )
        for context_id, size in asked
        if dist_autograd.is_valid_context(context_id)
    }  # fmt: skip


def release(rank: int) -> Counter[str]:
    """Leave all contexts of this worker; return the faults that it met."""
    injected = faulty.plan.injected
    faulty.plan.arm({})
    while ledger.open:
        ledger.open.pop().__exit__(None, None, None)
    return injected


def left(rank: int) -> int:
    return sum(dist_autograd.debug_info().values())


class Trial:
    """One world, some rounds, and what came of them."""

    def __init__(self, transport: str, seed: int) -> None:
        self.transport = transport
        self.seed = seed
        self.chance = random.Random(f"{transport}{seed}")
        self.faults: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        with World(WORKERS, transport=self.transport, timeout=90.0) as world:
            try:
                for number in range(ROUNDS):
                    self.run_round(world, number)
            except BaseException as error:
                error.add_note(f"{self.transport}, --seed {self.seed}")
                raise
            world.kill(self.living(world)[0])  # what is left of it cannot leave in good order

    def living(self, world: World) -> list[int]:
        processes = world._members._processes  # type: ignore[union-attr]
        return [rank for rank in range(WORKERS) if processes[rank].is_alive()]

    def planned(self, victim: bool) -> dict[int, tuple[str, bool, float]]:
        """Return the faults of one worker in one round."""
        chance, faults = self.chance, {}
        for _ in range(chance.randint(0, 2)):
            faults[chance.randint(1, 12)] = ("delay", True, chance.uniform(0.001, 0.02))
        if chance.random() < 0.3:
            faults[chance.randint(1, 8)] = ("drop", chance.random() < 0.5, 0.0)
        if victim:
            faults[chance.randint(1, 8)] = ("kill", chance.random() < 0.5, 0.0)
        return faults

    def run_round(self, world: World, number: int) -> None:
        living = self.living(world)
        victim = self.chance.choice(living) if len(living) > 3 else -1
        jobs = {
            rank: (f"{self.seed}/{number}/{rank}", self.planned(rank == victim), rank == victim)
            for rank in living
        }
        others = [rank for rank in living if rank != victim]
        world.run(start, jobs, ranks=others)
        if victim >= 0:
            with suppress(WorkerLostError):  # it may be dead before it answers
                world.run(start, jobs, ranks=[victim])
        entries = [e for r in living if r != victim for e in world.run(finish, ranks=[r])[0]]
        for entry in entries:
            self.outcomes[entry["error"] or "done"] += 1
        if victim >= 0:
            with suppress(ProcessLookupError):  # it did come to send so many messages
                world.kill(victim)
            living.remove(victim)
            self.faults["kill"] += 1
        asked = [(entry["context"], entry["size"]) for entry in entries]
        found = dict(zip(living, world.run(look, asked, ranks=living), strict=True))
        for entry in entries:
            check(entry, found)
        for injected in world.run(release, ranks=living):
            self.faults += injected
        nothing_left(world, living)


def start(rank: int, jobs: dict[int, Any]) -> None:
    """Start this worker's part of a round on a thread of its own."""
    from distgrad.rpc.activity import activity

    mine, (seed, faults, _) = activity.get(), jobs[rank]
    faulty.plan.arm(faults)
    results: list[Any] = []

    def body() -> None:
        activity.set(mine)
        try:
            results.append(run_passes(rank, random.Random(seed)))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=body, daemon=True)
    running[:] = [thread, results]
    thread.start()


running: list[Any] = []


def finish(rank: int) -> list[Entry]:
    thread, results = running
    thread.join(80)
    assert not thread.is_alive(), "a pass or call did not end"
    if isinstance(results[0], BaseException):
        raise results[0]
    entries: list[Entry] = results[0]
    return entries


def check(entry: Entry, found: dict[int, dict[int, int]]) -> None:
    """A pass that is done has delivered all, one that failed nothing twice."""
    pairs = [("its leaf", entry["found"], entry["own"])]
    pairs += [
        (f"the weight of worker {rank}", found[rank][entry["context"]], bits)
        for rank, bits in entry["expected"].items()
        if rank in found and entry["context"] in found[rank]
    ]
    for what, there, due in pairs:
        if entry["error"] is None:
            assert there == due, f"{what} got {there:#x}, not {due:#x}: {entry}"
        assert there & ~due == 0, f"{what} got {there:#x} of {due:#x}: {entry}"


def nothing_left(world: World, living: list[int]) -> None:
    """Wait until all contexts are forgotten by all workers."""
    pause = threading.Event()
    for _ in range(400):
        counts = world.run(left, ranks=living)
        if not any(counts):
            return
        pause.wait(0.05)
    raise AssertionError(f"contexts or passes are left: {dict(zip(living, counts, strict=True))}")


@pytest.mark.deadline(3600)
@pytest.mark.parametrize("transport", [UnixTransport, TcpTransport], ids=["unix", "tcp"])
def test_ledger_every_gradient_once_whatever_breaks(
    transport: Any, extent: Callable[[int, int], int], seed: int
) -> None:
    wanted, worlds = extent(15, 500), 0
    faults: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    while faults.total() < wanted:
        trial = Trial(transport.scheme, seed + worlds)
        with faulty.installed(transport):
            trial.run()
        faults += trial.faults
        outcomes += trial.outcomes
        worlds += 1
    print(f"\n{transport.scheme}: {worlds} worlds, faults {dict(faults)}, passes {dict(outcomes)}")
    assert outcomes["done"] > 0
