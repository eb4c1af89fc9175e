"""Parameter groups, state and refusals of the optimizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad._core import Tensor
from distgrad.optim import SGD, Adam, Optimizer


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values), requires_grad=True)


def ones(*params: Tensor) -> dict[Tensor, Tensor]:
    return {param: Tensor(np.ones(param.shape)) for param in params}


def test_groups_take_their_own_settings() -> None:
    a, b, c = leaf(1.0), leaf(1.0), leaf(1.0)
    optimizer = SGD([{"params": [a], "lr": 0.5}, {"params": b}], lr=0.25)
    optimizer.add_param_group({"params": [c], "lr": 0.125})
    optimizer.step(ones(a, b, c))
    assert [a.item(), b.item(), c.item()] == [0.5, 0.75, 0.875]


def test_groups_changed_setting_counts_from_the_next_step() -> None:
    param = leaf(1.0)
    optimizer = SGD([param], lr=0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step(ones(param))
    assert param.item() == 0.75


def test_step_without_gradients_takes_grad_and_skips_none() -> None:
    given, left = leaf(1.0), leaf(1.0)
    given.grad = Tensor(np.array([2.0]))
    SGD([given, left], lr=0.25).step()
    assert (given.item(), left.item()) == (0.5, 1.0)


def test_step_foreign_gradient_is_ignored() -> None:
    param, foreign = leaf(1.0), leaf(1.0)
    SGD([param], lr=1.0).step(ones(foreign))
    assert (param.item(), foreign.item()) == (1.0, 1.0)


def test_zero_grad_forgets_or_fills() -> None:
    param = leaf(1.0)
    optimizer = SGD([param])
    param.grad = Tensor(np.array([2.0]))
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is not None
    assert param.grad.item() == 0.0
    optimizer.zero_grad()
    assert param.grad is None


def test_prepare_given_up_changes_nothing() -> None:
    param = leaf(1.0, 2.0)
    optimizer = Adam([param], lr=0.1)
    optimizer.step(ones(param))
    before, kept = param.data.copy(), optimizer.state_dict()
    optimizer.prepare(ones(param))
    np.testing.assert_array_equal(param.data, before)
    np.testing.assert_equal(optimizer.state_dict(), kept)


@pytest.mark.parametrize("cls", [SGD, Adam])
def test_state_dict_loaded_continues_the_same_path(cls: type[Optimizer]) -> None:
    settings: dict[str, Any] = {"momentum": 0.9} if cls is SGD else {"amsgrad": True}
    first, second = leaf(1.0, 2.0), leaf(1.0, 2.0)
    whole, fresh = cls([first], lr=0.1, **settings), cls([second], lr=0.7, **settings)
    for _ in range(3):
        whole.step({first: Tensor(first.data * 0.5)})
    second.data[...] = first.data
    fresh.load_state_dict(whole.state_dict())
    for _ in range(3):
        whole.step({first: Tensor(first.data * 0.5)})
        fresh.step({second: Tensor(second.data * 0.5)})
    np.testing.assert_array_equal(first.data, second.data)


def test_state_dict_is_a_copy() -> None:
    param = leaf(1.0)
    optimizer = SGD([param], momentum=0.9)
    optimizer.step(ones(param))
    optimizer.state_dict()["state"][0]["velocity"][...] = 100.0
    assert optimizer.state[param]["velocity"] == 1.0


def test_state_dict_of_other_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its parameter groups differ .* \[1\] parameters"):
        SGD([leaf(1.0)]).load_state_dict(SGD([leaf(1.0), leaf(2.0)]).state_dict())


def test_gradient_of_another_shape_is_refused() -> None:
    param = leaf(1.0, 2.0)
    with pytest.raises(ValueError, match=r"shape \(2,\): its gradient has shape \(3,\)"):
        SGD([param]).step({param: Tensor(np.ones(3))})


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"lr": -1.0}, "lr=-1.0: it must be at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": -0.5}, "momentum=-0.5"),
        ({"nesterov": True}, "needs momentum"),
    ],
)
def test_sgd_bad_setting_is_refused(settings: dict[str, Any], fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        SGD([leaf(1.0)], **settings)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_adam_bad_betas_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"each must be in \[0, 1\)"):
        Adam([leaf(1.0)], betas=betas)


def test_parameters_that_cannot_be_optimized_are_refused() -> None:
    param = leaf(1.0)
    with pytest.raises(ValueError, match="there are no parameters"):
        SGD([])
    with pytest.raises(TypeError, match="pass a list"):
        SGD(param)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot optimize float"):
        SGD([1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no leaf that requires grad"):
        SGD([Tensor(np.ones(1))])
    with pytest.raises(ValueError, match="twice"):
        SGD([param, param])


def test_repr_shows_the_settings() -> None:
    text = repr(SGD([leaf(1.0)], lr=0.5))
    assert text.startswith("SGD(lr=0.5, momentum=0.0")
    assert text.endswith("1 parameters)")
