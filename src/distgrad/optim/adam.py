"""Adam and AdamW."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from distgrad.optim import _updates
from distgrad.optim.checks import check_at_least, check_betas
from distgrad.optim.optimizer import Array, Optimizer, Parameters, as_real, zeros

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015), with AMSGrad (Reddi et al., 2018) on request.

    With gradient ``g``, parameter ``p`` and step number ``t``, a step is::

        g <- g + weight_decay * p
        m <- beta1 * m + (1 - beta1) * g
        s <- beta2 * s + (1 - beta2) * g**2
        p <- p - lr * (m / (1 - beta1**t)) / (sqrt(s / (1 - beta2**t)) + eps)

    AMSGrad puts the largest ``s`` so far in place of ``s``. The two parts of complex
    parameters are treated as two real ones.

    Parameters
    ----------
    params
        The parameters or parameter groups.
    lr
        The learning rate.
    betas
        How much the means of the gradient and of its square keep.
    eps
        Keeps the divisor away from zero.
    weight_decay
        Strength of the L2 penalty.
    amsgrad
        Let step sizes never grow again.
    maximize
        Ascend instead.
    decoupled_weight_decay
        Let the weights shrink by ``lr * weight_decay`` before each step, and leave the gradient as
        it is, as `AdamW` does.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
        )

    def _check(self, settings: dict[str, Any]) -> None:
        check_at_least(0, **{name: settings[name] for name in ("lr", "eps", "weight_decay")})
        check_betas(settings["betas"])

    def _fused(self, group: dict[str, Any]) -> _updates.Update:
        return _updates.adam(group)

    def _update(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        data, gradient = as_real(data), as_real(gradient)
        gradient = -gradient if group["maximize"] else gradient
        if group["weight_decay"]:
            if group["decoupled_weight_decay"]:
                data *= 1 - group["lr"] * group["weight_decay"]
            else:
                gradient = gradient + group["weight_decay"] * data
        _accumulate(data, state, gradient, group)
        _descend(data, state, group)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    The weights shrink by ``lr * weight_decay`` before each step, and the gradient stays
    as it is. The parameters are those of `Adam`; ``weight_decay`` is 0.01 by default.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
        )


def _accumulate(data: Array, state: dict[str, Any], gradient: Array, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    state["step"] = state.get("step", 0) + 1
    mean, square = zeros(state, "mean", data), zeros(state, "square", data)
    mean *= beta1
    mean += (1 - beta1) * gradient
    square *= beta2
    square += (1 - beta2) * gradient * gradient
    if group["amsgrad"]:
        largest = zeros(state, "largest_square", data)
        np.maximum(largest, square, out=largest)


def _descend(data: Array, state: dict[str, Any], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    divisor = np.sqrt(state["largest_square" if group["amsgrad"] else "square"])
    divisor /= sqrt(1 - beta2 ** state["step"])
    divisor += group["eps"]
    np.divide(state["mean"], divisor, out=divisor)
    divisor *= group["lr"] / (1 - beta1 ** state["step"])
    data -= divisor
