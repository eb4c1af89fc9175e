"""Random programs of all operations that have a check, for one worker or cut over several.

A program is a list of steps; a step calls a case of `test_rules` with earlier results. `alone`
runs it on one worker without any messages, `split` over several: each step runs on a worker
of its own choice, and the results travel by value, by reference, or through a third worker.

Between two steps stands `fitted`: it brings any result into the shape and the domain of the next
argument, with factors from -1 to 1, in fresh arrays. So cases of all kinds can follow each other,
values stay bounded, and every step computes the same bits wherever it runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from test_rules import CASES

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad._core import GraphTask
from distgrad.autograd.functions import SendRpcBackward

__all__ = ["Program", "alone", "collect", "draw", "exact_cases", "largest_terms", "split"]

Source = tuple[int, int]  # number of a value, and which of its tensors (modulo their number)
Values = list[Any]  # the tensors that a step returned

EVERY_CASE = [case for name in CASES for case in CASES[name]]
WAYS = ("call", "call", "later", "kept", "relayed")


@dataclass(frozen=True)
class Step:
    """One operation.

    Its result comes back (``call``), comes back while the program goes on (``later``), stays
    where it was computed until a step asks for it (``kept``), or was computed by a worker that
    ``via`` asked (``relayed``).
    """

    case: int
    sources: tuple[Source, ...]
    worker: int
    way: str
    via: int
    detached: bool


@dataclass(frozen=True)
class Program:
    """Steps over some leaves, and the results that are its roots, with their gradients."""

    seed: int
    exact: bool  # integers: every sum is exact, in any order
    workers: int
    driver: int
    owners: tuple[int, ...]  # of the leaves
    steps: tuple[Step, ...]
    roots: tuple[tuple[Source, float], ...]
    passes: int


def draw(seed: int) -> Program:
    """Draw a program; every fourth computes with integers."""
    chance = random.Random(seed)
    workers = chance.randint(2, 5)
    exact = seed % 4 == 0
    cases = exact_cases() if exact else range(len(EVERY_CASE))
    owners = tuple(chance.randrange(workers) for _ in range(chance.randint(1, 3)))
    steps: list[Step] = []

    def source() -> Source:
        known = len(owners) + len(steps)
        recent = chance.random() < 0.5
        return chance.randrange(max(0, known - 3) if recent else 0, known), chance.randrange(3)

    for _ in range(chance.randint(2, 12)):
        case = chance.choice(cases)
        steps.append(
            Step(
                case,
                tuple(source() for _ in EVERY_CASE[case][1]),
                chance.randrange(workers),
                chance.choice(WAYS),
                chance.randrange(workers),
                chance.random() < 0.03,
            )
        )
    weight = (lambda: float(chance.randint(1, 4))) if exact else (lambda: chance.uniform(-2, 2))
    roots = tuple((source(), weight()) for _ in range(chance.randint(1, 3)))
    return Program(
        seed, exact, workers, chance.randrange(workers), owners, tuple(steps), roots,
        chance.choice([1, 1, 2]),
    )  # fmt: skip


# --- one step --------------------------------------------------------------------------------


def fitted(value: Any, example: Any, exact: bool) -> Any:
    """Return a tensor like an example, near its values, that depends on a value."""
    flat = value.reshape(-1)
    if flat.dtype.kind == "c":
        flat = flat.real + flat.imag
    if flat.size == 0:
        flat = np.expand_dims(np.sum(flat), 0)
    taken = np.take(flat, np.arange(example.size) % flat.size).reshape(example.shape)
    if exact:
        return whole(example) + np.remainder(taken, 3.0)
    return example + 0.05 * np.sin(20.0 * taken)


def whole(example: np.ndarray) -> np.ndarray:
    """Return small integers, three apart, in the order of the elements of an example."""
    ranks = np.argsort(np.argsort(example, axis=None)).reshape(example.shape)
    return 3.0 * (ranks - example.size // 2)


def computed(case: int, exact: bool, arguments: Values) -> Values:
    """Run one case; returns all its tensors."""
    function, examples = EVERY_CASE[case]
    pairs = zip(arguments, examples, strict=True)
    result = function(*[fitted(value, example.data, exact) for value, example in pairs])
    return list(result) if isinstance(result, tuple | list) else [result]


def leaf(program_seed: int, exact: bool, number: int) -> Any:
    """Return a leaf of a program, a new one each time."""
    numbers = np.random.default_rng([program_seed, number])
    if exact:
        values: Any = numbers.integers(-5, 6, (2, 3)).astype(float)
    else:
        values = numbers.normal(size=(2, 3)).astype("float32" if number == 2 else "float64")
    return dg.tensor(values, requires_grad=True)


def rooted(program: Program, values: Callable[[Source], Any]) -> tuple[list[Any], list[Any]]:
    """Return what the pass starts from, and the gradients: the first root is a scalar."""
    roots, grads = [], []
    for number, (source, weight) in enumerate(program.roots):
        root = fitted(values(source), np.zeros(2), program.exact)
        root, grad = (root.sum() * weight, 1.0) if number == 0 else (root, [weight, 1.0])
        if root.requires_grad:
            roots.append(root)
            grads.append(np.asarray(grad, float))
    return roots, grads


# --- on one worker ---------------------------------------------------------------------------


def alone(program: Program) -> tuple[list[Values], list[list[Any]]]:
    """Return the values of all leaves and steps, and their gradients or None."""
    leaves = [leaf(program.seed, program.exact, k) for k in range(len(program.owners))]
    values: list[Values] = [[x] for x in leaves]

    def value_of(source: Source) -> Any:
        tensors = values[source[0]]
        return tensors[source[1] % len(tensors)]

    for step in program.steps:
        made = computed(step.case, program.exact, [value_of(s) for s in step.sources])
        values.append([tensor.detach() for tensor in made] if step.detached else made)
    roots, grads = rooted(program, value_of)
    every = [tensor for tensors in values for tensor in tensors if tensor.requires_grad]
    found = dg.grad(roots, every, grads, allow_unused=True) if roots else [None] * len(every)
    gradients = iter(None if g is None else program.passes * g.numpy() for g in found)
    return values, [[next(gradients) if t.requires_grad else None for t in v] for v in values]


def largest_terms(
    program: Program, values: list[Values], gradients: list[list[Any]]
) -> list[np.ndarray]:
    """Return for each element of each leaf the largest term of the sum that is its gradient.

    Written out, a gradient is a sum over all ways from a root to the leaf, element by element,
    of the products of the derivatives on the way. A gradient that was summed up on the way, and
    what follows from it further on, counts as a term where it is larger.
    """
    terms = [[np.zeros(tensor.shape) for tensor in tensors] for tensors in values]

    def reached(number: int, place: int) -> Any:
        """What leads to a value is done; its own gradient is a term of what follows."""
        gradient, term = gradients[number][place], terms[number][place]
        return term if gradient is None else np.maximum(term, np.abs(gradient), out=term)

    for (number, pick), weight in program.roots:
        place = pick % len(values[number])
        raise_terms(
            lambda value: [fitted(value, np.zeros(2), program.exact)],
            [values[number][place]],
            [np.full(2, program.passes * max(abs(weight), 1.0))],
            [terms[number][place]],
        )
    for number, step in reversed(list(enumerate(program.steps, len(program.owners)))):
        places = [(n, pick % len(values[n])) for n, pick in step.sources]
        if not step.detached:
            raise_terms(
                lambda *arguments, step=step: computed(step.case, program.exact, list(arguments)),
                [values[n][k] for n, k in places],
                [reached(number, k) for k in range(len(values[number]))],
                [terms[n][k] for n, k in places],
            )
    return [reached(number, 0) for number in range(len(program.owners))]


def raise_terms(
    function: Callable[..., Values], inputs: Values, terms: list[Any], into: list[Any]
) -> None:
    """Take the terms of the outputs of a function to those of its inputs, element by element."""
    own = [dg.tensor(tensor.data, requires_grad=True) for tensor in inputs]
    for output, term in zip(function(*own), terms, strict=True):
        if not output.requires_grad:
            continue
        for index in np.ndindex(output.shape):
            if term[index] == 0.0:
                continue
            for one in (1.0, 1.0j) if output.dtype.kind == "c" else (1.0,):
                for target, size in zip(into, sizes(output, index, one, own), strict=True):
                    np.maximum(target, size * term[index], out=target)


def sizes(output: Any, index: tuple[int, ...], one: complex, inputs: Values) -> list[Any]:
    """Return how large the derivatives of an element are, or the terms in a rule's own sums.

    Terms that cancel each other in a rule, or in a function of several operations, are seen by
    what they leave: rounding errors, other ones for each gradient that it is called with.
    """
    found: list[list[Any]] = [[] for _ in inputs]
    for factor in (1.0, 1.0 / 3.0, 0.7, 1.9, 0.9, 1.1, 0.3, 1.7):
        seed = np.zeros(output.shape, output.dtype)
        seed[index] = one * factor
        other = SendRpcBackward([dg.tensor([0.0], requires_grad=True)], 0, 0)
        task = GraphTask([(output, seed)], sends=[other], inputs=inputs, retain_graph=True)
        task.deliver(other, None)
        task.run()
        for each, gradient in zip(found, task.captured, strict=True):
            each.append(0.0 if gradient is None else gradient / factor)
    return [
        np.maximum(np.abs(each[0]), max_apart(each) / (2.0 * np.finfo(output.dtype).eps))
        for each in found
    ]


def max_apart(values: list[Any]) -> Any:
    return np.max([np.abs(value - values[0]) for value in values[1:]], axis=0)


@cache
def exact_cases() -> list[int]:
    """Return the cases that take integers to integers, and so do their derivatives."""
    return [number for number in range(len(EVERY_CASE)) if is_exact(number)]


def is_exact(case: int) -> bool:
    examples = EVERY_CASE[case][1]
    for trial in range(6):
        numbers = np.random.default_rng(trial)
        inputs = [dg.tensor(numbers.integers(-9, 9, e.shape) * 1.0, requires_grad=True)
                  for e in examples]  # fmt: skip
        with np.errstate(all="ignore"):
            try:
                outputs = computed(case, True, inputs)
                found = [output.data for output in outputs]
                for output in outputs:
                    seed = numbers.integers(-9, 9, output.shape).astype(output.dtype)
                    got = dg.grad([output], inputs, [seed], allow_unused=True, retain_graph=True)
                    found += [gradient.numpy() for gradient in got if gradient is not None]
            except (ArithmeticError, np.linalg.LinAlgError):
                return False
        if not all(
            np.isrealobj(a) and np.array_equal(a, np.rint(a)) and np.isfinite(a).all()
            for a in found
        ):
            return False
    return True


# --- over several workers --------------------------------------------------------------------

_leaves: dict[tuple[int, int, int], Any] = {}  # by worker, context and number: this process' own


@rpc.expose
def give_leaf(seed: int, exact: bool, number: int) -> Any:
    """Return a leaf of this worker in the current context."""
    key = (rpc.get_worker_info().id, int(dist_autograd.current_context()), number)
    return _leaves.setdefault(key, leaf(seed, exact, number))


@rpc.expose
def serve(seed: int, exact: bool, case: int, detached: bool, arguments: list[Any]) -> Values:
    """Fetch the arguments of a step from where they are, and compute it."""
    me = rpc.get_worker_info().id
    found = []
    for kind, value, more in arguments:
        if kind == "leaf":
            owner, number = value, more
            ask = give_leaf if owner == me else lambda *a, to=owner: rpc.rpc_sync(to, give_leaf, a)
            found.append(ask(seed, exact, number))
        elif kind == "kept":
            tensors = value.to_here()
            found.append(tensors[more % len(tensors)])
        else:
            found.append(value)
    made = computed(case, exact, found)
    return [tensor.detach() for tensor in made] if detached else made


@rpc.expose
def relay(to: int, *arguments: Any) -> Values:
    """Have another worker compute a step."""
    result: Values = rpc.rpc_sync(to, serve, arguments)
    return result


def split(rank: int, program: Program) -> tuple[int, bytes]:
    """Run a program from this worker; leaves its context open for `collect`."""
    context = dist_autograd.context().__enter__()
    values: list[Any] = [("leaf", owner, k) for k, owner in enumerate(program.owners)]

    def argument(source: Source) -> Any:
        number, pick = source
        value = values[number]
        if isinstance(value, rpc.Future):
            value = values[number] = value.wait()
        if isinstance(value, rpc.RRef):
            return "kept", value, pick
        if isinstance(value, tuple):
            return value
        return "here", value[pick % len(value)], 0

    for step in program.steps:
        values.append(start(program, step, [argument(source) for source in step.sources]))

    def value_of(source: Source) -> Any:
        kind, value, more = argument(source)
        if kind == "leaf":
            return rpc.rpc_sync(value, give_leaf, (program.seed, program.exact, more))
        if kind == "kept":
            tensors = value.to_here()
            return tensors[more % len(tensors)]
        return value

    roots, grads = rooted(program, value_of)
    for _ in range(program.passes if roots else 0):
        context.backward(*roots, grads=grads, retain_graph=True, timeout=30)
    with dg.no_grad():  # all calls have ended before the leaves are forgotten
        for number in range(len(values)):
            value_of((number, 0))
    _open[int(context)] = context
    return int(context), b"".join(root.data.tobytes() for root in roots)


def start(program: Program, step: Step, arguments: list[Any]) -> Any:
    what = (program.seed, program.exact, step.case, step.detached, arguments)
    if step.way == "kept":
        return rpc.remote(step.worker, serve, what)
    if step.way == "later":
        return rpc.rpc_async(step.worker, serve, what)
    if step.way == "relayed":
        return rpc.rpc_sync(step.via, relay, (step.worker, *what))
    return serve(*what) if step.worker == rpc.get_worker_info().id else rpc.rpc_sync(
        step.worker, serve, what
    )  # fmt: skip


_open: dict[int, Any] = {}


def collect(rank: int, context_id: int) -> dict[int, Any]:
    """Return the gradients of this worker's leaves, by their numbers, and forget the leaves."""
    found = {}
    for worker, context, number in list(_leaves):
        if (worker, context) == (rank, context_id):
            mine = _leaves.pop((worker, context, number))
            gradient = dist_autograd.get_gradients(context_id).get(mine)
            found[number] = None if gradient is None else gradient.numpy().copy()
    return found


def leave(rank: int, context_id: int) -> None:
    """Leave the context that `split` left open."""
    _open.pop(context_id).__exit__(None, None, None)
