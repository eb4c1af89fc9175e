"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

from distgrad.optim import _updates
from distgrad.optim.checks import check_at_least
from distgrad.optim.optimizer import Array, Optimizer, Parameters

__all__ = ["SGD"]


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum as in Sutskever et al. (2013).

    With gradient ``g``, velocity ``v`` and parameter ``p``, a step is::

        g <- g + weight_decay * p
        v <- momentum * v + (1 - dampening) * g        (v <- g at the first step)
        p <- p - lr * (g + momentum * v if nesterov else v)

    Parameters
    ----------
    params
        The parameters or parameter groups.
    lr
        The learning rate.
    momentum
        How much of the velocity is kept.
    dampening
        How much of the gradient is kept out of the velocity.
    weight_decay
        Strength of the L2 penalty.
    nesterov
        Look ahead along the velocity; needs momentum and no dampening.
    maximize
        Ascend instead.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
        )

    def _check(self, settings: dict[str, Any]) -> None:
        names = ("lr", "momentum", "weight_decay")
        check_at_least(0, **{name: settings[name] for name in names})
        momentum, dampening = settings["momentum"], settings["dampening"]
        if settings["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"cannot use nesterov with momentum={momentum!r} and dampening={dampening!r}: "
                "it needs momentum and no dampening"
            )

    def _fused(self, group: dict[str, Any]) -> _updates.Update:
        return _updates.sgd(group)

    def _update(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        direction = -gradient if group["maximize"] else gradient
        if group["weight_decay"]:
            direction = direction + group["weight_decay"] * data
        if group["momentum"]:
            direction = _with_momentum(direction, state, group)
        data -= group["lr"] * direction


def _with_momentum(gradient: Array, state: dict[str, Any], group: dict[str, Any]) -> Array:
    velocity: Array | None = state.get("velocity")
    if velocity is None:
        velocity = state["velocity"] = gradient.copy()
    else:
        velocity *= group["momentum"]
        velocity += (1 - group["dampening"]) * gradient
    return gradient + group["momentum"] * velocity if group["nesterov"] else velocity
