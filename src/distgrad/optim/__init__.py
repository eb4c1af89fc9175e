"""Optimizers: update parameters in place, from ``.grad`` or from given gradients."""

from distgrad.optim.adam import Adam, AdamW
from distgrad.optim.optimizer import Optimizer
from distgrad.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer"]
