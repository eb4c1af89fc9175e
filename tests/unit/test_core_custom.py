"""Operations of the user: primitive and Function; derivatives of functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad.functional import value_and_grad, vjp
from distgrad.testing import gradcheck, gradgradcheck


class Cube(dg.Function):
    @staticmethod
    def forward(ctx: Any, x: dg.Tensor, factor: float) -> dg.Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x * x * factor

    @staticmethod
    def backward(ctx: Any, g: dg.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * 3 * x * x * ctx.factor, None


class Exponential(dg.Function):
    @staticmethod
    def forward(ctx: Any, x: dg.Tensor) -> dg.Tensor:
        result = np.exp(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, g: dg.Tensor) -> dg.Tensor:
        (result,) = ctx.saved_tensors
        return g * result


class Both(dg.Function):
    @staticmethod
    def forward(ctx: Any, x: dg.Tensor) -> tuple[dg.Tensor, dg.Tensor]:
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, first: dg.Tensor, second: dg.Tensor) -> dg.Tensor:
        return first * 2 + second * 3


def leaf(*values: float) -> dg.Tensor:
    return dg.tensor(values, requires_grad=True)


def test_function_derivatives_equal_differences() -> None:
    for f in (lambda x: Cube.apply(x, 2.0), Exponential.apply):
        assert gradcheck(f, leaf(0.5, 1.5))
        assert gradgradcheck(f, leaf(0.5, 1.5))


def test_function_records_one_node_with_its_name() -> None:
    y = Cube.apply(leaf(1.0), 2.0)
    assert y.grad_fn.name() == "CubeBackward"
    assert y.grad_fn.needs_input_grad == (True, False)


def test_function_missing_gradients_are_zeros() -> None:
    x = leaf(1.0)
    first, _ = Both.apply(x)
    first.backward()
    assert x.grad.tolist() == [2.0]


def test_function_second_pass_over_freed_values_says_so() -> None:
    y = Cube.apply(leaf(1.0), 2.0)
    y.backward()
    with pytest.raises(dg.GraphError, match=r"freed(.|\n)*retain_graph"):
        y.backward()


def test_function_saved_value_written_afterwards_raises() -> None:
    x, w = leaf(1.0), dg.tensor([2.0])
    y = Cube.apply(x * w, 1.0)
    y.grad_fn.saved_tensors[0][0] = 3.0
    with pytest.raises(dg.GraphError, match="was modified"):
        y.backward()


def test_primitive_records_with_its_rules() -> None:
    @dg.primitive
    def scale(x: Any, factor: Any, *, offset: float = 0.0) -> Any:
        return x * factor + offset

    scale.defvjp(lambda g, ans, x, factor, offset=0.0: g * factor, None)
    x = leaf(1.0)
    y = scale(x, 3.0, offset=1.0)
    y.backward()
    assert (y.tolist(), x.grad.tolist(), y.grad_fn.name()) == ([4.0], [3.0], "ScaleBackward")
    assert isinstance(scale(np.ones(1), 2.0), np.ndarray)
    with pytest.raises(TypeError, match="no gradient rule for argument 1"):
        scale(x, leaf(1.0))


def test_primitive_with_several_results_gets_all_gradients() -> None:
    @dg.primitive
    def halves(x: Any) -> Any:
        return x[:1], x[1:]

    halves.defvjp(lambda g, ans, x: np.concatenate(g))
    assert gradcheck(halves, leaf(1.0, 2.0))
    x = leaf(1.0, 2.0)
    halves(x)[1].backward()
    assert x.grad.tolist() == [0.0, 1.0]


def test_value_and_grad_of_chosen_arguments() -> None:
    value, (by_x, by_z) = value_and_grad(lambda x, y, z: (x * y * z).sum(), (0, 2))(
        np.ones(2), 3.0, np.full(2, 2.0)
    )
    assert (value.item(), by_x.tolist(), by_z.tolist()) == (12.0, [6.0, 6.0], [3.0, 3.0])


def test_vjp_pulls_back_repeatedly() -> None:
    value, pull = vjp(lambda x: x * x, np.array([3.0]))
    assert value.tolist() == [9.0]
    assert [pull(np.array([c]))[0].item() for c in (1.0, 2.0)] == [6.0, 12.0]


def test_gradcheck_finds_a_wrong_rule() -> None:
    @dg.primitive
    def wrong(x: Any) -> Any:
        return x * x

    wrong.defvjp(lambda g, ans, x: g * x)
    with pytest.raises(AssertionError, match="input 0"):
        gradcheck(wrong, leaf(1.0, 2.0))


class FiveTimes(dg.Function):
    """Its rule writes into the gradient that it gets."""

    @staticmethod
    def forward(ctx: Any, x: dg.Tensor) -> dg.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: dg.Tensor) -> dg.Tensor:
        g *= 5.0
        return g


@pytest.mark.parametrize("n", [3, 100_000])  # a gradient that repeats is a view above some size
def test_rule_may_write_into_the_gradient_it_gets(n: int) -> None:
    x, y = (dg.tensor(np.ones(n), requires_grad=True) for _ in range(2))
    ((FiveTimes.apply(x) + y) * 3.0).sum().backward()
    assert (x.grad[n - 1].item(), y.grad[n - 1].item()) == (15.0, 3.0)
