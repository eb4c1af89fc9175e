"""A small graph of linear functions over the integers, as `BackwardPass` drives it.

Every tensor knows its value as a linear function of the leaves, so that the gradient of a
leaf is known exactly before any pass runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Vertex:
    """A node: its output is the sum of factor times input over the edges."""

    edges: list[tuple[Vertex, int, int]]  # node, slot of the node, factor
    slots: int = 1
    leaf: str = ""
    boundary: bool = False
    message_id: int = 0
    peer: int = -1
    breaks: bool = False  # its rule raises
    used: bool = False  # ran without retain

    def apply(self, grads: Sequence[int | None], retain: bool) -> list[int | None]:
        if self.breaks:
            raise ArithmeticError("this rule is broken")
        if self.used:
            raise LookupError("this node was run before, without retain")
        self.used = not retain
        if self.peer >= 0:
            return list(grads)
        assert grads[0] is not None
        return [grads[0] * factor for _, _, factor in self.edges]


@dataclass(eq=False)
class Value:
    """A tensor: an output of a node, and what it is worth in terms of the leaves."""

    vertex: Vertex
    slot: int
    weights: dict[str, int]


def leaf(name: str) -> Value:
    return Value(Vertex([], leaf=name), 0, {name: 1})


def combine(terms: Sequence[tuple[int, Value]], breaks: bool = False) -> Value:
    """Return the sum of factor times value."""
    weights: dict[str, int] = {}
    for factor, value in terms:
        for name, weight in value.weights.items():
            weights[name] = weights.get(name, 0) + factor * weight
    edges = [(value.vertex, value.slot, factor) for factor, value in terms]
    return Value(Vertex(edges, breaks=breaks), 0, weights)


def send_vertex(values: Sequence[Value], message_id: int, peer: int) -> Vertex:
    edges = [(value.vertex, value.slot, 1) for value in values]
    return Vertex(edges, slots=len(values), message_id=message_id, peer=peer)


def received(values: Sequence[Value], message_id: int, peer: int) -> tuple[Vertex, list[Value]]:
    vertex = Vertex([], slots=len(values), boundary=True, message_id=message_id, peer=peer)
    return vertex, [Value(vertex, slot, v.weights) for slot, v in enumerate(values)]


@dataclass(eq=False)
class IntegerTask:
    """One pass over the local part; the same contract as the core's GraphTask."""

    roots: Iterable[Value]
    sends: Iterable[Vertex]
    retain: bool
    table: dict[str, int]
    waits: dict[Vertex, int] = field(default_factory=dict)
    inputs: dict[Vertex, list[int | None]] = field(default_factory=dict)
    ready: deque[Vertex] = field(default_factory=deque)
    to_run: int = 0

    def __post_init__(self) -> None:
        self.unresolved = set(self.sends)
        roots = list(self.roots)
        todo = [*self.unresolved, *(value.vertex for value in roots)]
        seen = set()
        while todo:
            vertex = todo.pop()
            if vertex in seen:
                continue
            seen.add(vertex)
            self.waits.setdefault(vertex, 0)
            for target, _, _ in vertex.edges:
                self.waits[target] = self.waits.get(target, 0) + 1
                todo.append(target)
        self.to_run = len(seen)
        self.inputs = {vertex: [None] * vertex.slots for vertex in seen}
        for value in roots:
            self.waits[value.vertex] += 1
        for value in roots:
            self._arrive(value.vertex, value.slot, 1)

    @property
    def done(self) -> bool:
        return not self.unresolved and self.to_run == 0

    def reaches(self, vertex: Vertex) -> bool:
        return vertex in self.waits

    def deliver(self, vertex: Vertex, grads: Sequence[int | None] | None) -> None:
        self.unresolved.remove(vertex)  # KeyError: resolved twice
        if grads is not None:
            self.inputs[vertex] = list(grads)
        self.ready.append(vertex)

    def run(self) -> list[tuple[Vertex, tuple[int | None, ...] | None]]:
        out = []
        while self.ready:
            vertex = self.ready.popleft()
            self.to_run -= 1
            grads = self.inputs.pop(vertex)
            empty = all(grad is None for grad in grads)
            if vertex.boundary:
                out.append((vertex, None if empty else tuple(grads)))
            elif vertex.leaf:
                if not empty:
                    self.table[vertex.leaf] = self.table.get(vertex.leaf, 0) + (grads[0] or 0)
            else:
                nothing = [None] * len(vertex.edges)
                results = nothing if empty else vertex.apply(grads, self.retain)
                for (target, slot, _), grad in zip(vertex.edges, results, strict=True):
                    self._arrive(target, slot, grad)
        return out

    def _arrive(self, vertex: Vertex, slot: int, grad: int | None) -> None:
        if grad is not None:
            self.inputs[vertex][slot] = (self.inputs[vertex][slot] or 0) + grad
        self.waits[vertex] -= 1
        if self.waits[vertex] == 0:
            self.ready.append(vertex)
