"""Optimizers that give every number a step size of its own.

The two parts of complex parameters are treated as two real ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distgrad.optim import _updates
from distgrad.optim.checks import check_at_least, check_betas, check_pair
from distgrad.optim.optimizer import Array, Optimizer, Parameters, as_real, zeros

__all__ = ["Adadelta", "Adagrad", "Adamax", "RMSprop", "Rprop"]


class _Adaptive(Optimizer):
    """Prepares the gradient as all these optimizers want it."""

    #: Settings that must not be negative.
    _not_negative: tuple[str, ...] = ("lr",)

    def _check(self, settings: dict[str, Any]) -> None:
        check_at_least(0, **{name: settings[name] for name in self._not_negative})

    def _update(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        data, gradient = as_real(data), as_real(gradient)
        if group["maximize"]:
            gradient = -gradient
        if group.get("weight_decay"):
            gradient = gradient + group["weight_decay"] * data
        state["step"] = state.get("step", 0) + 1
        self._descend(data, gradient, state, group)

    def _descend(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError


def _blend(mean: Array, keep: float, value: Array) -> Array:
    """Let a running mean keep a part of itself and take the rest from ``value``."""
    mean *= keep
    mean += (1 - keep) * value
    return mean


class Adagrad(_Adaptive):
    """Adagrad (Duchi, Hazan and Singer, 2011).

    With gradient ``g``, parameter ``p`` and step number ``t``, a step is::

        g <- g + weight_decay * p
        s <- s + g**2
        p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Parameters
    ----------
    params
        The parameters or parameter groups.
    lr, lr_decay
        The learning rate, and how fast it falls.
    weight_decay
        Strength of the L2 penalty.
    initial_accumulator_value
        Where ``s`` starts.
    eps
        Keeps the divisor away from zero.
    maximize
        Ascend instead.
    """

    _not_negative = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        settings: dict[str, Any] = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, {**settings, "maximize": maximize})

    def _fused(self, group: dict[str, Any]) -> _updates.Update:
        return _updates.adagrad(group)

    def _descend(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if "sum" not in state:
            state["sum"] = np.full_like(data, group["initial_accumulator_value"])
        state["sum"] += gradient * gradient
        rate = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
        data -= rate * gradient / (np.sqrt(state["sum"]) + group["eps"])


class RMSprop(_Adaptive):
    """RMSprop (Hinton, 2012), centred as in Graves (2013) on request.

    With gradient ``g`` and parameter ``p``, a step is::

        g <- g + weight_decay * p
        s <- alpha * s + (1 - alpha) * g**2
        m <- alpha * m + (1 - alpha) * g                           (if centered)
        d <- g / (sqrt(s - m**2 if centered else s) + eps)
        v <- momentum * v + d
        p <- p - lr * v

    Parameters
    ----------
    params
        The parameters or parameter groups.
    lr
        The learning rate.
    alpha
        How much the running means keep.
    eps
        Keeps the divisor away from zero.
    weight_decay
        Strength of the L2 penalty.
    momentum
        How much of the velocity is kept.
    centered
        Divide by the deviation instead of the root of the square.
    maximize
        Ascend instead.
    """

    _not_negative = ("lr", "alpha", "eps", "weight_decay", "momentum")

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        settings: dict[str, Any] = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        super().__init__(params, {**settings, "centered": centered, "maximize": maximize})

    def _fused(self, group: dict[str, Any]) -> _updates.Update:
        return _updates.rmsprop(group)

    def _descend(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        alpha = group["alpha"]
        square = _blend(zeros(state, "square", data), alpha, gradient * gradient)
        if group["centered"]:
            mean = _blend(zeros(state, "mean", data), alpha, gradient)
            square = square - mean * mean
        direction = gradient / (np.sqrt(square) + group["eps"])
        if group["momentum"]:
            velocity = zeros(state, "velocity", data)
            velocity *= group["momentum"]
            velocity += direction
            direction = velocity
        data -= group["lr"] * direction


class Adadelta(_Adaptive):
    """Adadelta (Zeiler, 2012).

    With gradient ``g`` and parameter ``p``, a step is::

        g <- g + weight_decay * p
        s <- rho * s + (1 - rho) * g**2
        d <- sqrt((u + eps) / (s + eps)) * g
        u <- rho * u + (1 - rho) * d**2
        p <- p - lr * d

    Parameters
    ----------
    params
        The parameters or parameter groups.
    lr
        Scales the step.
    rho
        How much the running means keep.
    eps
        Keeps the first steps away from zero.
    weight_decay
        Strength of the L2 penalty.
    maximize
        Ascend instead.
    """

    _not_negative = ("lr", "rho", "eps", "weight_decay")

    def __init__(
        self,
        params: Parameters,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        settings: dict[str, Any] = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "maximize": maximize})

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        if settings["rho"] > 1:
            raise ValueError(f"cannot use rho={settings['rho']!r}: it must be in [0, 1]")

    def _fused(self, group: dict[str, Any]) -> _updates.Update:
        return _updates.adadelta(group)

    def _descend(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        rho, eps = group["rho"], group["eps"]
        square = _blend(zeros(state, "square", data), rho, gradient * gradient)
        moved = zeros(state, "moved", data)
        delta = np.sqrt(moved + eps) / np.sqrt(square + eps) * gradient
        _blend(moved, rho, delta * delta)
        data -= group["lr"] * delta


class Adamax(_Adaptive):
    """Adamax: Adam with the maximum norm (Kingma and Ba, 2015).

    With gradient ``g``, parameter ``p`` and step number ``t``, a step is::

        g <- g + weight_decay * p
        m <- beta1 * m + (1 - beta1) * g
        u <- max(beta2 * u, abs(g) + eps)
        p <- p - lr / (1 - beta1**t) * m / u

    Parameters
    ----------
    params
        The parameters or parameter groups.
    lr
        The learning rate.
    betas
        How much the mean and the norm keep.
    eps
        Keeps the divisor away from zero.
    weight_decay
        Strength of the L2 penalty.
    maximize
        Ascend instead.
    """

    _not_negative = ("lr", "eps", "weight_decay")

    def __init__(
        self,
        params: Parameters,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "maximize": maximize})

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_betas(settings["betas"])

    def _fused(self, group: dict[str, Any]) -> _updates.Update:
        return _updates.adamax(group)

    def _descend(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        mean = _blend(zeros(state, "mean", data), beta1, gradient)
        norm = zeros(state, "norm", data)
        np.maximum(beta2 * norm, np.abs(gradient) + group["eps"], out=norm)
        data -= group["lr"] / (1 - beta1 ** state["step"]) * mean / norm


class Rprop(_Adaptive):
    """Resilient propagation (Riedmiller and Braun, 1993): only signs of gradients count.

    Each number has a step size, which grows while its gradient keeps the sign and shrinks
    when the sign changes; after a change that number rests for one step.

    Parameters
    ----------
    params
        The parameters or parameter groups.
    lr
        The first step size.
    etas
        Factors by which step sizes shrink and grow.
    step_sizes
        The smallest and the largest.
    maximize
        Ascend instead.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50.0),
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "etas": etas, "step_sizes": step_sizes}
        super().__init__(params, {**settings, "maximize": maximize})

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        expected = "expected 0 < shrink < 1 < grow"
        check_pair("etas", settings["etas"], lambda a, b: 0 < a < 1 < b, expected)
        expected = "expected 0 < smallest <= largest"
        check_pair("step_sizes", settings["step_sizes"], lambda a, b: 0 < a <= b, expected)

    def _fused(self, group: dict[str, Any]) -> _updates.Update:
        return _updates.rprop(group)

    def _descend(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        previous = zeros(state, "previous", data)
        if "size" not in state:
            state["size"] = np.full_like(data, group["lr"])
        agreement = gradient * previous
        shrink, grow = group["etas"]
        size = state["size"]
        factor = np.where(agreement > 0, grow, np.where(agreement < 0, shrink, 1.0))
        size *= factor.astype(size.dtype, copy=False)
        np.clip(size, *group["step_sizes"], out=size)
        previous[...] = np.where(agreement < 0, 0.0, gradient)
        data -= np.sign(previous) * size
