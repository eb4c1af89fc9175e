"""GraphTask: the pass as distributed autograd drives it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad._core import GradientTable, GraphTask, Node, gradient_edge, set_history

Gradients = tuple[np.ndarray[Any, Any] | None, ...]


class Send(Node):
    """Hands delivered gradients to the tensors that were sent."""

    def __init__(self, *tensors: dg.Tensor) -> None:
        super().__init__([gradient_edge(t) for t in tensors], len(tensors))

    def apply(self, grads: Gradients) -> Gradients:
        return grads


class Recv(Node):
    """Collects gradients of received tensors."""

    def __init__(self, *arrays: Any) -> None:
        super().__init__([], len(arrays))
        self.boundary = True
        self._arrays = arrays

    @property
    def tensors(self) -> list[dg.Tensor]:
        """Fresh tensors with this node as their history, which it does not hold."""
        tensors = [dg.tensor(a) for a in self._arrays]
        for slot, tensor in enumerate(tensors):
            set_history(tensor, self, slot)
        return tensors


def leaf(*values: float) -> dg.Tensor:
    return dg.tensor(values, requires_grad=True)


def test_task_boundary_is_handed_out_with_all_slots() -> None:
    recv = Recv([1.0, 2.0], [3.0], 4.0)
    a, b, _ = recv.tensors
    loss = (a * a).sum() + b.sum()
    task = GraphTask([(loss, np.ones(()))])
    assert task.reaches(recv)
    ((node, grads),) = task.run()
    assert node is recv
    assert [None if g is None else g.tolist() for g in grads] == [[2.0, 4.0], [1.0], None]
    assert task.done
    assert task.run() == []


def test_task_does_not_reach_a_dangling_boundary() -> None:
    recv, x = Recv(1.0), leaf(1.0)
    assert not GraphTask([(x * 2, np.ones(1))]).reaches(recv)


def test_task_waits_for_sends() -> None:
    x = leaf(2.0)
    h = x * 3
    send = Send(h)
    task = GraphTask([(h * h, np.ones(1))], sends=[send])
    assert task.run() == []
    assert x.grad is None
    assert not task.done
    task.deliver(send, [np.array([100.0])])
    task.run()
    assert task.done
    assert x.grad.tolist() == [3.0 * (2 * 6.0 + 100.0)]


def test_task_none_counts_down_without_arithmetic() -> None:
    recv = Recv([1.0])
    send = Send(recv.tensors[0] * 2)
    task = GraphTask([], sends=[send])
    assert task.run() == []
    task.deliver(send, None)
    assert task.run() == [(recv, None)]
    assert task.done


@pytest.mark.parametrize("kept", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_task_gradient_that_repeats_goes_out_and_in_without_the_copies(kept: Any) -> None:
    shape = (20, 30, 40)
    extents = tuple(n if i in kept else 1 for i, n in enumerate(shape))
    weights = np.arange(float(np.prod(extents))).reshape(extents)
    recv = Recv(np.ones(shape))
    (received,) = recv.tensors
    repeated = np.broadcast_to(weights, shape)
    ((_, (gradient,)),) = GraphTask([(received * 2.0, repeated)]).run()
    assert gradient.shape == (shape if kept == (0, 1, 2) else extents)
    x = dg.tensor(np.zeros(shape), requires_grad=True)
    for sent in (x, x * 1.0):
        x.grad = None
        send = Send(sent)
        task = GraphTask([], sends=[send])
        task.deliver(send, [gradient])
        task.run()
        np.testing.assert_array_equal(x.grad, repeated * 2.0)
    send = Send(x)
    with pytest.raises(dg.GraphError, match="shape"):
        GraphTask([], sends=[send]).deliver(send, [np.ones((20, 30, 7))])


def test_task_deliver_twice_or_to_a_stranger_raises() -> None:
    send = Send(leaf(1.0))
    task = GraphTask([], sends=[send])
    with pytest.raises(dg.GraphError, match="1 slots, not 0"):
        task.deliver(send, [])
    task.deliver(send, None)
    for node in (send, Send(leaf(1.0))):
        with pytest.raises(dg.GraphError, match="does not wait"):
            task.deliver(node, None)


def total_of(gradients: list[Any], recorded: Sequence[int], delivered: Sequence[int]) -> bytes:
    """Return the bits of a sum: the sends are recorded and resolved in any order."""
    x = dg.tensor(np.zeros(gradients[0].shape), requires_grad=True)
    sends = {number: Send(x) for number in recorded}
    table = GradientTable()
    task = GraphTask([], sends=list(sends.values()), table=table)
    for number in delivered:
        task.deliver(sends[number], [gradients[number]])
        task.run()
    return bytes(table.get(x).numpy().tobytes())


@pytest.mark.parametrize("layout", ["C", "F", "reversed"])
def test_task_sums_have_the_same_bits_in_any_order(layout: str) -> None:
    """Threads record sends as they come, so not even the order of the edges is the program's."""
    drawn = [np.array([[1.0, 0.3], [-0.7, 0.0]]) * size for size in (1e16, 1.0, -1e16, 0.1)]
    gradients = [
        np.asfortranarray(g) if layout == "F" else g[::-1] if layout == "reversed" else g
        for g in drawn
    ]
    orders = list(itertools.permutations(range(4)))
    found = {total_of(gradients, a, b) for a in orders for b in orders[::5]}
    assert len(found) == 1
    in_order = {sum(gradients[k] for k in order).tobytes() for order in orders}
    assert found < in_order


def test_task_sums_with_nones_and_a_root() -> None:
    x = leaf(1.0)
    sends = [Send(x) for _ in range(4)]
    table = GradientTable()
    task = GraphTask([(x, np.array([2.0])), (x, np.array([4.0]))], sends=sends, table=table)
    for send, gradient in zip(sends, [None, 8.0, None, 16.0], strict=True):
        task.deliver(send, None if gradient is None else [np.array([gradient])])
    task.run()
    assert task.done
    assert table.get(x).tolist() == [30.0]


def test_task_never_writes_a_delivered_buffer() -> None:
    x = leaf(1.0)
    first, second = Send(x), Send(x)
    buffers = [np.array([1.0]), np.array([2.0])]
    table = GradientTable()
    task = GraphTask([], sends=[first, second], table=table)
    task.deliver(first, [buffers[0]])
    task.deliver(second, [buffers[1]])
    task.run()
    assert table.get(x).tolist() == [3.0]
    assert [b.tolist() for b in buffers] == [[1.0], [2.0]]


def test_table_keeps_gradients_apart_from_grad() -> None:
    x, y = leaf(1.0), leaf(2.0)
    table = GradientTable()
    for _ in range(3):
        GraphTask([(x * y, np.ones(1))], table=table).run()
    found = table.as_dict()
    assert len(table) == 2
    assert (found[x].tolist(), found[y].tolist()) == ([6.0], [3.0])
    assert x.grad is None
    table.clear()
    assert table.get(x) is None


def test_table_hands_out_gradients_nobody_else_sees() -> None:
    x, y = leaf(1.0), leaf(2.0)
    table = GradientTable()
    seed = np.ones(1)
    GraphTask([(x + y, seed)], table=table).run()
    table.get(x)[0] = 7.0
    assert (table.get(y).tolist(), seed.tolist()) == ([1.0], [1.0])
    assert table.get(x) is table.get(x)


def test_task_failure_names_the_node() -> None:
    class Broken(Recv):
        def apply(self, grads: Gradients) -> Gradients:
            raise ValueError("broken")

    node = Broken(1.0)
    node.boundary = False
    task = GraphTask([(node.tensors[0] * 2, np.ones(()))])
    with pytest.raises(ValueError, match="broken"):
        task.run()
    assert task.failed_node == "Broken"


def test_task_create_graph_hands_out_tensors() -> None:
    recv = Recv([3.0])
    a = recv.tensors[0]
    ((_, grads),) = GraphTask([((a * a).sum(), np.ones(()))], create_graph=True).run()
    assert isinstance(grads[0], dg.Tensor)
    assert grads[0].requires_grad
    ((_, second),) = GraphTask([(grads[0].sum(), np.ones(()))]).run()
    assert second[0].tolist() == [2.0]


def test_two_tasks_may_walk_one_graph_at_once() -> None:
    x = leaf(2.0)
    h = x * x
    send = Send(h)
    tables = [GradientTable(), GradientTable()]
    tasks = [GraphTask([], sends=[send], retain_graph=True, table=t) for t in tables]
    for i, task in enumerate(tasks):
        task.deliver(send, [np.array([10.0**i])])
    for task in reversed(tasks):
        task.run()
    assert [t.get(x).tolist() for t in tables] == [[4.0], [40.0]]


def test_apply_with_wrong_number_of_gradients_raises() -> None:
    class Short(Send):
        def apply(self, grads: Gradients) -> Gradients:
            return ()

    send = Short(leaf(1.0))
    task = GraphTask([], sends=[send])
    task.deliver(send, [np.ones(1)])
    with pytest.raises(dg.GraphError, match="0 gradients for 1 edges"):
        task.run()


def test_node_edge_to_missing_slot_raises() -> None:
    with pytest.raises(ValueError, match="no slot 1"):
        Node([(Send(leaf(1.0)), 1)], 1)


def test_deep_python_chain_is_freed_without_recursion() -> None:
    x = leaf(1.0)
    node: Node = Send(x)
    for _ in range(100_000):
        node = Node([(node, 0)], 1)
    del node
