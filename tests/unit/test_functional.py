"""Derivatives of functions, nested ones too, and checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad.functional import checkpoint, hessian, hvp, jacobian, jvp, value_and_grad, vjp
from distgrad.testing import gradcheck, gradgradcheck

X = np.array([0.5, -1.0, 2.0])
V = np.array([1.0, 2.0, -0.5])


def cubes(x: Any) -> Any:
    return (x**3).sum()


def leaf(*values: float) -> dg.Tensor:
    return dg.tensor(values, requires_grad=True)


def test_jvp_is_the_jacobian_times_the_tangent() -> None:
    matrix = np.arange(6.0).reshape(2, 3)
    value, derivative = jvp(lambda x, y: matrix @ np.sin(x) + y, (X, np.ones(2)), (V, np.ones(2)))
    np.testing.assert_allclose(value.numpy(), matrix @ np.sin(X) + 1)
    np.testing.assert_allclose(derivative.numpy(), matrix @ (np.cos(X) * V) + 1)


def test_jvp_of_a_constant_is_zero() -> None:
    assert jvp(lambda x: np.sign(x), (X,), (V,))[1].tolist() == [0.0, 0.0, 0.0]
    assert jvp(lambda x: dg.ones(2), (X,), (V,))[1].tolist() == [0.0, 0.0]


def test_jacobian_has_value_shape_then_argument_shape() -> None:
    found = jacobian(lambda x: np.outer(x, x))(X)
    assert found.shape == (3, 3, 3)
    expected = np.einsum("ik,j->ijk", np.eye(3), X) + np.einsum("jk,i->ijk", np.eye(3), X)
    np.testing.assert_allclose(found.numpy(), expected)
    first, second = jacobian(lambda x, y: x * y, (0, 1))(X, V)
    np.testing.assert_allclose(first.numpy(), np.diag(V))
    np.testing.assert_allclose(second.numpy(), np.diag(X))
    assert jacobian(lambda x: x[:0])(X).shape == (0, 3)


def test_hessian_equals_known_one() -> None:
    np.testing.assert_allclose(hessian(cubes)(X).numpy(), np.diag(6 * X))
    blocks = hessian(lambda x, y: (x * x * y).sum(), (0, 1))(X, V)
    np.testing.assert_allclose(blocks[0][0].numpy(), np.diag(2 * V))
    np.testing.assert_allclose(blocks[0][1].numpy(), np.diag(2 * X))
    np.testing.assert_allclose(blocks[1][1].numpy(), np.zeros((3, 3)))


def test_hvp_equals_hessian_times_vector() -> None:
    value, (product,) = hvp(cubes, (X,), (V,))
    assert value.item() == cubes(X)
    np.testing.assert_allclose(product.numpy(), 6 * X * V)
    assert hvp(lambda x: x.sum(), (X,), (V,))[1][0].tolist() == [0.0, 0.0, 0.0]


def test_derivatives_nest_to_the_fourth_order() -> None:
    f: Any = lambda x: x**5  # noqa: E731
    for _ in range(4):
        f = (lambda inner: lambda x: value_and_grad(inner)(x)[1])(f)
    assert f(np.array(2.0)).item() == pytest.approx(120 * 2.0)


def test_results_can_be_differentiated_by_tensors_that_require_grad() -> None:
    x = leaf(*X)
    _, gradient = value_and_grad(cubes)(x)
    gradient.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 6 * X)
    assert gradcheck(lambda x: hvp(cubes, (x,), (V,))[1][0], x)
    assert gradcheck(lambda x: jvp(np.sin, (x,), (V,))[1], x)
    assert gradcheck(lambda x: vjp(np.sin, x)[1](V)[0], x)


def test_plain_arguments_give_results_without_graph() -> None:
    value, gradient = value_and_grad(cubes)(X)
    assert not value.requires_grad
    assert not gradient.requires_grad
    with dg.no_grad():
        assert value_and_grad(cubes)(leaf(2.0))[1].tolist() == [12.0]


def test_function_that_returns_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"cubic(.|\n)*float"):
        value_and_grad(cubic)(X)


def cubic(_x: Any) -> Any:
    return 1.0


# ------------------------------------------------------------ checkpoint


def test_checkpoint_gives_the_same_gradients_and_runs_twice() -> None:
    calls = []

    def block(x: Any, factor: float) -> Any:
        calls.append(dg.is_grad_enabled())
        return np.tanh(x) * factor

    x = leaf(*X)
    y = checkpoint(block, x, 2.0)
    assert y.grad_fn.name() == "CheckpointBackward"
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 2 * (1 - np.tanh(X) ** 2))
    assert len(calls) == 2


def test_checkpoint_reaches_leaves_that_are_closed_over() -> None:
    weight, x = leaf(2.0), leaf(3.0)
    checkpoint(lambda x: x * weight, x).backward()
    assert (weight.grad.tolist(), x.grad.tolist()) == ([3.0], [2.0])


def test_checkpoint_refuses_computed_tensors_that_are_closed_over() -> None:
    hidden = leaf(2.0) * 2
    with pytest.raises(dg.GraphError, match=r"MultiplyBackward(.|\n)*pass it as an argument"):
        checkpoint(lambda x: x * hidden, leaf(1.0))


def test_checkpoint_of_several_results_and_higher_orders() -> None:
    def pair(x: Any) -> Any:
        return np.sin(x), x * x

    assert gradcheck(lambda x: checkpoint(pair, x), leaf(*X))
    assert gradgradcheck(lambda x: checkpoint(pair, x), leaf(*X))
    x = leaf(1.0)
    checkpoint(pair, x)[1].backward()
    assert x.grad.tolist() == [2.0]


def test_checkpoint_second_pass_and_modified_argument_raise() -> None:
    y = checkpoint(np.sin, leaf(1.0))
    y.backward()
    with pytest.raises(dg.GraphError, match="retain_graph"):
        y.backward()
    x, buffer = leaf(1.0), dg.ones(1)
    y = checkpoint(lambda x, b: x * b, x, buffer)
    buffer += 1
    with pytest.raises(dg.GraphError, match="modified"):
        y.backward()


def test_checkpoint_without_grad_is_a_plain_call() -> None:
    with dg.no_grad():
        assert checkpoint(np.sin, leaf(0.0)).grad_fn is None
