"""Steps of the optimizers, against formulas written out for one number at a time."""

from __future__ import annotations

import inspect
import tracemalloc
from collections.abc import Callable, Iterator
from math import sqrt
from typing import Any

import numpy as np
import pytest

from distgrad import optim
from distgrad._core import Tensor
from distgrad.errors import GraphError
from distgrad.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Optimizer,
    RMSprop,
    Rprop,
)

STEPS = 7
Rule = Callable[..., Iterator[float]]


def sgd(
    p: float,
    gradients: list[float],
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Iterator[float]:
    v = 0.0
    for t, g in enumerate(gradients):
        g += weight_decay * p
        v = g if t == 0 else momentum * v + (1 - dampening) * g
        if momentum:
            g = g + momentum * v if nesterov else v
        p -= lr * g
        yield p


def adam(
    p: float,
    gradients: list[float],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
) -> Iterator[float]:
    m = s = largest = 0.0
    for t, g in enumerate(gradients, start=1):
        if decoupled_weight_decay:
            p -= lr * weight_decay * p
        else:
            g += weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * g**2
        largest = max(largest, s)
        square = largest if amsgrad else s
        p -= lr * m / (1 - betas[0] ** t) / (sqrt(square) / sqrt(1 - betas[1] ** t) + eps)
        yield p


def adamw(p: float, gradients: list[float], lr: float, **settings: Any) -> Iterator[float]:
    return adam(p, gradients, lr, **{"weight_decay": 0.01, **settings}, decoupled_weight_decay=True)


def adagrad(
    p: float,
    gradients: list[float],
    lr: float,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> Iterator[float]:
    s = initial_accumulator_value
    for t, g in enumerate(gradients):
        g += weight_decay * p
        s += g**2
        p -= lr / (1 + t * lr_decay) * g / (sqrt(s) + eps)
        yield p


def rmsprop(
    p: float,
    gradients: list[float],
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> Iterator[float]:
    s = m = v = 0.0
    for g in gradients:
        g += weight_decay * p
        s = alpha * s + (1 - alpha) * g**2
        m = alpha * m + (1 - alpha) * g
        v = momentum * v + g / (sqrt(s - m**2 if centered else s) + eps)
        p -= lr * v
        yield p


def adadelta(
    p: float,
    gradients: list[float],
    lr: float,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Iterator[float]:
    s = u = 0.0
    for g in gradients:
        g += weight_decay * p
        s = rho * s + (1 - rho) * g**2
        d = sqrt((u + eps) / (s + eps)) * g
        u = rho * u + (1 - rho) * d**2
        p -= lr * d
        yield p


def adamax(
    p: float,
    gradients: list[float],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Iterator[float]:
    m = u = 0.0
    for t, g in enumerate(gradients, start=1):
        g += weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        u = max(betas[1] * u, abs(g) + eps)
        p -= lr / (1 - betas[0] ** t) * m / u
        yield p


def rprop(
    p: float,
    gradients: list[float],
    lr: float,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
) -> Iterator[float]:
    size, before = lr, 0.0
    for g in gradients:
        if g * before < 0:
            size, g = size * etas[0], 0.0
        elif g * before > 0:
            size *= etas[1]
        size = min(max(size, step_sizes[0]), step_sizes[1])
        p -= size * ((g > 0) - (g < 0))
        before = g
        yield p


CASES: list[tuple[type[Optimizer], Rule, dict[str, Any]]] = [
    (SGD, sgd, {"lr": 0.1}),
    (SGD, sgd, {"lr": 0.1, "momentum": 0.9}),
    (SGD, sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    (SGD, sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (SGD, sgd, {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    (Adam, adam, {"lr": 0.05}),
    (Adam, adam, {"lr": 0.05, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
    (Adam, adam, {"lr": 0.05, "betas": (0.9, 0.5), "amsgrad": True}),
    (Adam, adam, {"lr": 0.05, "maximize": True}),
    (Adam, adam, {"lr": 0.05, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    (AdamW, adamw, {"lr": 0.05}),
    (AdamW, adamw, {"lr": 0.05, "betas": (0.5, 0.8), "eps": 1e-3, "maximize": True}),
    (AdamW, adamw, {"lr": 0.05, "weight_decay": 0.3, "amsgrad": True}),
    (Adagrad, adagrad, {"lr": 0.1}),
    (
        Adagrad,
        adagrad,
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.2, "initial_accumulator_value": 0.3},
    ),
    (Adagrad, adagrad, {"lr": 0.1, "eps": 1e-2, "maximize": True}),
    (RMSprop, rmsprop, {"lr": 0.01}),
    (RMSprop, rmsprop, {"lr": 0.05, "eps": 1e-2, "maximize": True}),
    (RMSprop, rmsprop, {"lr": 0.01, "alpha": 0.5, "momentum": 0.9, "weight_decay": 0.1}),
    (RMSprop, rmsprop, {"lr": 0.05, "alpha": 0.5, "centered": True}),
    (Adadelta, adadelta, {"lr": 1.0}),
    (Adadelta, adadelta, {"lr": 0.5, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1}),
    (Adadelta, adadelta, {"lr": 0.5, "maximize": True}),
    (Adamax, adamax, {"lr": 0.05}),
    (Adamax, adamax, {"lr": 0.05, "eps": 1e-2}),
    (Adamax, adamax, {"lr": 0.05, "betas": (0.5, 0.6), "weight_decay": 0.1, "maximize": True}),
    (Rprop, rprop, {"lr": 0.1}),
    (Rprop, rprop, {"lr": 0.1, "etas": (0.3, 3.0), "step_sizes": (0.05, 0.25)}),
    (Rprop, rprop, {"lr": 0.1, "maximize": True}),
]

#: Options of torch that choose how it computes, not what.
HOW = {"foreach", "fused", "capturable", "differentiable"}


def options(cls: Any) -> dict[str, Any]:
    """Return the options of an optimizer and their defaults."""
    found = dict(inspect.signature(cls).parameters)
    del found["params"]
    return {name: option.default for name, option in found.items()}


@pytest.mark.parametrize("name", [name for name in optim.__all__ if name[0].isupper()])
def test_every_option_of_every_optimizer_is_compared(name: str) -> None:
    cls = getattr(optim, name)
    if cls in (Optimizer, optim.DistributedOptimizer):
        return
    defaults = options(cls)
    cases = [settings for kind, _, settings in CASES if kind is cls]
    compared = {k for settings in cases for k, v in settings.items() if v != defaults[k]}
    assert compared == defaults.keys()


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={setting}" for key, setting in value.items())
    return str(getattr(value, "__name__", value))


def random_case(shape: tuple[int, ...], steps: int = STEPS) -> tuple[Tensor, list[np.ndarray]]:
    random = np.random.default_rng(7)
    param = Tensor(random.standard_normal(shape), requires_grad=True)
    return param, [random.standard_normal(shape) for _ in range(steps)]


@pytest.mark.parametrize(("cls", "rule", "settings"), CASES, ids=name_of)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("phases", [1, 2])
def test_step_follows_the_formula(
    cls: type[Optimizer], rule: Rule, settings: dict[str, Any], shape: tuple[int, ...], phases: int
) -> None:
    param, gradients = random_case(shape)
    memory = param.data
    given_to_rule = {k: v for k, v in settings.items() if k != "maximize"}
    sign = -1.0 if settings.get("maximize") else 1.0
    paths = [
        list(rule(p, [sign * float(g.reshape(-1)[i]) for g in gradients], **given_to_rule))
        for i, p in enumerate(param.data.reshape(-1).tolist())
    ]
    optimizer = cls([param], **settings)
    for t, gradient in enumerate(gradients):
        given = {param: Tensor(gradient.copy())}
        if phases == 1:
            optimizer.step(given)
        else:
            optimizer.prepare(given).commit()
        expected = np.reshape([path[t] for path in paths], shape)
        np.testing.assert_allclose(param.data, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(given[param].data, gradient)
    assert np.shares_memory(param.data, memory) == (phases == 1)


@pytest.mark.parametrize(("cls", "rule", "settings"), CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("phases", [1, 2])
def test_step_of_the_kernel_has_the_bits_of_the_formula(
    cls: type[Optimizer], rule: Rule, settings: dict[str, Any], dtype: Any, phases: int
) -> None:
    plain: Any = type(cls.__name__, (cls,), {"_fused": Optimizer._fused})
    random = np.random.default_rng(11)
    values = random.standard_normal((4, 33)).astype(dtype)
    fused, written = (Tensor(values.copy(), requires_grad=True) for _ in range(2))
    kernel, formula = cls([fused], **settings), plain([written], **settings)
    for _ in range(STEPS):
        gradient = Tensor(random.standard_normal((4, 33)).astype(dtype))
        if phases == 1:
            kernel.step({fused: gradient})
        else:
            kernel.prepare({fused: gradient}).commit()
        formula.step({written: gradient})
        np.testing.assert_array_equal(fused.data, written.data)
    np.testing.assert_equal(kernel.state_dict(), formula.state_dict())


@pytest.mark.parametrize(("cls", "rule", "settings"), CASES, ids=name_of)
@pytest.mark.parametrize("phases", [1, 2])
def test_step_allocates_no_arrays_once_it_has_its_state(
    cls: type[Optimizer], rule: Rule, settings: dict[str, Any], phases: int
) -> None:
    params = [Tensor(np.ones(20_000), requires_grad=True) for _ in range(3)]
    given = {param: Tensor(np.ones(20_000)) for param in params}
    optimizer = cls(params, **settings)

    def step() -> None:
        optimizer.step(given) if phases == 1 else optimizer.prepare(given).commit()

    for _ in range(2):
        step()
    tracemalloc.start()
    try:
        step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000  # an array has 160 000 bytes


def test_step_memory_that_others_see_is_not_written_again() -> None:
    param = Tensor(np.ones(2), requires_grad=True)
    optimizer = Adam([param], lr=0.1)
    given, seen = {param: Tensor(np.ones(2))}, []
    for _ in range(4):
        optimizer.prepare(given).commit()
        view = param.data[:1]
        seen.append((view, view.copy(), optimizer.state[param]["mean"]))
    assert all(view == then for view, then, _ in seen)
    assert len({id(mean) for *_, mean in seen}) == 4


def test_step_own_formula_is_not_replaced_by_a_kernel() -> None:
    class Backwards(SGD):
        def _update(self, data: Any, gradient: Any, state: Any, group: Any) -> None:
            data += group["lr"] * gradient

    param = Tensor(np.ones(2), requires_grad=True)
    Backwards([param], lr=0.5).step({param: Tensor(np.ones(2))})
    np.testing.assert_array_equal(param.data, [1.5, 1.5])


@pytest.mark.parametrize("cls", list(dict.fromkeys(cls for cls, _, _ in CASES)))
def test_options_are_those_of_torch(cls: type[Optimizer]) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    expected = options(getattr(torch.optim, cls.__name__))
    assert options(cls) == {name: v for name, v in expected.items() if name not in HOW}


@pytest.mark.parametrize(("cls", "rule", "settings"), CASES, ids=name_of)
def test_step_equals_torch(cls: type[Optimizer], rule: Rule, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    param, gradients = random_case((3, 4), steps=100)
    twin = torch.nn.Parameter(torch.from_numpy(param.data.copy()))
    own, other = cls([param], **settings), getattr(torch.optim, cls.__name__)([twin], **settings)
    for gradient in gradients:
        twin.grad = torch.from_numpy(gradient)
        own.step({param: Tensor(gradient)})
        other.step()
        np.testing.assert_allclose(param.data, twin.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cls", "rule", "settings"), CASES, ids=name_of)
def test_step_complex_parameter_moves_as_two_real_ones(
    cls: type[Optimizer], rule: Rule, settings: dict[str, Any]
) -> None:
    param, gradients = random_case((2, 6))
    whole = Tensor(param.data.copy().view(np.complex128), requires_grad=True)
    apart, together = cls([param], **settings), cls([whole], **settings)
    for gradient in gradients:
        apart.step({param: Tensor(gradient)})
        together.step({whole: Tensor(gradient.view(np.complex128))})
    np.testing.assert_allclose(whole.data.view(float), param.data, rtol=1e-12)


def test_step_float32_keeps_its_dtype() -> None:
    param = Tensor(np.ones(3, np.float32), requires_grad=True)
    optimizer = Adam([param], lr=0.1)
    optimizer.step({param: Tensor(np.ones(3, np.float32))})
    assert param.data.dtype == np.float32
    assert optimizer.state[param]["mean"].dtype == np.float32


@pytest.mark.parametrize("phases", [1, 2])
def test_step_graph_that_saved_the_old_values_is_refused(phases: int) -> None:
    param = Tensor(np.ones(2), requires_grad=True)
    loss = (param * param).sum()
    optimizer = SGD([param], lr=0.1)
    given = {param: Tensor(np.ones(2))}
    if phases == 1:
        optimizer.step(given)
    else:
        optimizer.prepare(given).commit()
    with pytest.raises(GraphError):
        loss.backward()
