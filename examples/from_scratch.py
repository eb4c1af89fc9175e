"""The idea of distributed autograd in one file: NumPy, a pipe, and nothing of distgrad.

A network is cut in two. This process has the data and the first weights, a second process
the other weights. Values cross the cut forward, gradients cross it backward:

* Sending a value makes it a *root* of the sender's part of the graph: its gradient will
  arrive from outside.
* Receiving a value makes a *leaf* of the receiver's part: once all its consumers have
  delivered, its gradient goes back to where the value came from.
* Each process counts, for each of its values, how many deliveries are missing. So nobody
  needs to see the whole graph, and it does not matter when a gradient arrives.
* "None" is a gradient. What the loss does not use is told so, and waits for nothing.

Run it: ``python examples/from_scratch.py``
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

Array = np.ndarray
Rule = Callable[[Array], Array]  # gradient of the result -> gradient of one input

STEPS, RATE = 200, 0.1


class Var:
    """A value, and for each value it was made from the rule that leads back to it."""

    def __init__(self, value: Array, *edges: tuple[Var, Rule]) -> None:
        self.value = value
        self.edges = edges


def matmul(a: Var, b: Var) -> Var:
    left, right = a.value, b.value
    return Var(left @ right, (a, lambda g: g @ right.T), (b, lambda g: left.T @ g))


def tanh(a: Var) -> Var:
    out = np.tanh(a.value)
    return Var(out, (a, lambda g: g * (1 - out**2)))


def mean_square_error(a: Var, target: Array) -> Var:
    difference = a.value - target
    return Var((difference**2).mean(), (a, lambda g: g * 2 * difference / difference.size))


class Peer:
    """One end of a pipe, and what crossed it since the last pass."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.sent: list[Var] = []
        self.received: list[Var] = []

    def send(self, var: Var) -> None:
        self.sent.append(var)
        self.pipe.send(var.value)

    def receive(self) -> Var:
        var = Var(self.pipe.recv())  # a leaf here: what it was made from is over there
        self.received.append(var)
        return var


class Pass:
    """One backward pass over this process's part of the graph."""

    def __init__(self, peer: Peer, *roots: Var) -> None:
        self.peer, self.roots = peer, roots
        self.sums: dict[Var, Array | None] = {}
        # Every root and every value sent is delivered once from outside.
        self.missing = Counter([*roots, *peer.sent])
        todo, seen = list(self.missing), set(self.missing)
        while todo:
            for parent, _ in todo.pop().edges:
                self.missing[parent] += 1
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)

    def run(self) -> dict[Var, Array]:
        """Return the gradients of the leaves that live in this process."""
        for var in self.peer.received:
            if var not in self.missing:  # leads to no root: nobody will ever deliver
                self.answer(var, None)
        for root in self.roots:
            self.deliver(root, np.ones_like(root.value))
        for _ in self.peer.sent:
            number, gradient = self.peer.pipe.recv()
            self.deliver(self.peer.sent[number], gradient)
        remote = set(self.peer.received)
        self.peer.sent, self.peer.received = [], []
        leaves = (v for v in self.sums if not v.edges and v not in remote)
        return {leaf: g for leaf in leaves if (g := self.sums[leaf]) is not None}

    def deliver(self, var: Var, gradient: Array | None) -> None:
        """Add a gradient to a value, and go on from each value that now has them all."""
        todo = [(var, gradient)]
        while todo:
            var, gradient = todo.pop()
            total = self.sums.get(var)
            self.sums[var] = total if gradient is None else add(total, gradient)
            self.missing[var] -= 1
            if not self.missing[var]:
                todo += self.leave(var, self.sums[var])

    def leave(self, var: Var, total: Array | None) -> list[tuple[Var, Array | None]]:
        if var in self.peer.received:
            self.answer(var, total)
        return [(parent, None if total is None else rule(total)) for parent, rule in var.edges]

    def answer(self, var: Var, gradient: Array | None) -> None:
        self.peer.pipe.send((self.peer.received.index(var), gradient))


def add(total: Array | None, gradient: Array) -> Array:
    return gradient if total is None else total + gradient


def serve(pipe: Connection, weights: Array) -> None:
    """The second process: the upper half of the network, and its weights."""
    peer, upper = Peer(pipe), Var(weights)
    for _ in range(STEPS):
        hidden = peer.receive()
        peer.send(matmul(hidden, upper))
        peer.send(tanh(hidden))  # the loss will not use this one
        upper = Var(upper.value - RATE * Pass(peer).run()[upper])
    pipe.send(upper.value)


def train_split(x: Array, y: Array, first: Array, second: Array) -> tuple[Array, Array, float]:
    """Train with the second half of the network in another process."""
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=serve, args=(far_end, second), daemon=True)
    process.start()
    peer, lower = Peer(pipe), Var(first)
    for _ in range(STEPS):
        peer.send(tanh(matmul(Var(x), lower)))
        output, _unused = peer.receive(), peer.receive()
        loss = mean_square_error(output, y)
        lower = Var(lower.value - RATE * Pass(peer, loss).run()[lower])
    upper = pipe.recv()
    process.join()
    return lower.value, upper, float(loss.value)


def train_alone(x: Array, y: Array, first: Array, second: Array) -> tuple[Array, Array, float]:
    """Train the same network in this process: the answer to compare with."""
    nobody = Peer(multiprocessing.Pipe()[0])
    lower, upper = Var(first), Var(second)
    for _ in range(STEPS):
        loss = mean_square_error(matmul(tanh(matmul(Var(x), lower)), upper), y)
        gradients = Pass(nobody, loss).run()
        lower = Var(lower.value - RATE * gradients[lower])
        upper = Var(upper.value - RATE * gradients[upper])
    return lower.value, upper.value, float(loss.value)


def main() -> None:
    rng = np.random.default_rng(0)
    x = np.stack([np.linspace(-2, 2, 64), np.ones(64)], axis=1)
    task = x, np.sin(x[:, :1]), rng.normal(size=(2, 16)), rng.normal(size=(16, 1)) / 4
    alone, split = train_alone(*task), train_split(*task)
    print(f"loss after {STEPS} steps: {alone[2]:.6f} alone, {split[2]:.6f} over two processes")
    same = np.array_equal(alone[0], split[0]) and np.array_equal(alone[1], split[1])
    print("the weights agree to the bit" if same else "the weights differ")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
