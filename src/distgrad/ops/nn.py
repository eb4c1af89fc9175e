"""Functions of neural networks: each one node, stable for large inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from distgrad.ops.indexing import plain
from distgrad.ops.registry import conj, defvjp, spread

__all__ = [
    "cross_entropy",
    "gelu",
    "log_softmax",
    "logsumexp",
    "mse_loss",
    "relu",
    "sigmoid",
    "softmax",
    "softplus",
]

GELU_SCALE = float(np.sqrt(2.0 / np.pi))


def _relu(x: Any) -> Any:
    return np.maximum(x, 0)


def _sigmoid(x: Any) -> Any:
    return 0.5 * (np.tanh(0.5 * x) + 1)


def _logsumexp(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0).astype(x.dtype)
    sums = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True)) + top
    return sums if keepdims else np.squeeze(sums, axis)


def _softmax(x: Any, axis: int = -1) -> Any:
    weights = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return weights / np.sum(weights, axis=axis, keepdims=True)


def _softmax_rule(g: Any, ans: Any, x: Any, axis: int = -1) -> Any:
    weights = conj(ans)
    return weights * (g - np.sum(g * weights, axis=axis, keepdims=True))


def _log_softmax(x: Any, axis: int = -1) -> Any:
    return x - _logsumexp(x, axis, keepdims=True)


#: max(x, 0); the gradient at 0 is 0.
relu = defvjp(_relu, lambda g, ans, x: g * np.greater(ans, 0), needs=("a",), name="relu")

#: 1 / (1 + exp(-x)).
sigmoid = defvjp(
    _sigmoid, lambda g, ans, x: g * conj(ans * (1 - ans)), needs=("a",), name="sigmoid"
)

#: log(1 + exp(x)).
softplus = defvjp(
    lambda x: np.logaddexp(x, np.zeros((), x.dtype)),
    lambda g, ans, x: g * sigmoid(x),
    needs=("x",),
    name="softplus",
)

#: log(sum(exp(x))) over axes.
logsumexp = defvjp(
    _logsumexp,
    lambda g, ans, x, axis=None, keepdims=False: (
        spread(g, x.ndim, axis, keepdims) * conj(np.exp(x - spread(ans, x.ndim, axis, keepdims)))
    ),
    needs=("xa",),
    name="logsumexp",
)

#: exp(x) / sum(exp(x)) along one axis.
softmax = defvjp(_softmax, _softmax_rule, needs=("a",), name="softmax")

#: Logarithm of `softmax`.
log_softmax = defvjp(
    _log_softmax,
    lambda g, ans, x, axis=-1: g - conj(np.exp(ans)) * np.sum(g, axis=axis, keepdims=True),
    needs=("a",),
    name="log_softmax",
)


def gelu(x: Any) -> Any:
    """Gaussian error linear unit, in its tanh form."""
    return 0.5 * x * (1 + np.tanh(GELU_SCALE * (x + 0.044715 * x * x * x)))


def _picked(x: Any, labels: Any) -> tuple[Any, ...]:
    return (*np.indices(labels.shape, sparse=True), labels)


def _cross_entropy(logits: Any, labels: Any, reduction: str = "mean") -> Any:
    losses = -_log_softmax(logits)[_picked(logits, labels)]
    if reduction == "none":
        return losses
    return np.mean(losses) if reduction == "mean" else np.sum(losses)


def _cross_entropy_rule(g: Any, ans: Any, logits: Any, labels: Any, reduction: str = "mean") -> Any:
    """Softmax minus one-hot labels, for each loss as much as it counts."""
    hits = np.zeros(logits.shape, logits.dtype)
    hits[_picked(logits, labels)] = 1
    weight = np.expand_dims(g, -1) if reduction == "none" else g
    if reduction == "mean":
        weight = weight / max(labels.size, 1)
    return weight * (conj(softmax(logits)) - hits)


_CROSS_ENTROPY = defvjp(
    _cross_entropy, _cross_entropy_rule, None, needs=("xy", ""), name="cross_entropy"
)


def cross_entropy(logits: Any, labels: Any, reduction: str = "mean") -> Any:
    """Return the negative log-likelihood of labels under softmax(logits).

    Parameters
    ----------
    logits
        Shape (..., classes).
    labels
        Integers of shape (...), each below the number of classes.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"``.

    Returns
    -------
    Tensor
        A scalar, or the shape of `labels` for ``"none"``.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cannot reduce losses: {reduction!r} is not 'mean', 'sum' or 'none'")
    labels = np.asarray(plain(labels))
    if labels.dtype.kind not in "iu":
        raise TypeError(f"cannot use labels: {labels.dtype} is not an integer dtype")
    return _CROSS_ENTROPY(logits, labels, reduction=reduction)


def mse_loss(prediction: Any, target: Any) -> Any:
    """Return the mean of squared differences."""
    return np.mean(np.square(prediction - target))
