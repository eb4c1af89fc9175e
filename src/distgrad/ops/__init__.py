"""Differentiable NumPy: gradient rules, one file a family of functions.

Importing this package teaches `distgrad.Tensor` what NumPy's functions mean.
"""

from distgrad.ops import elementwise, indexing, linalg, nn, reduce, shape

__all__ = ["elementwise", "indexing", "linalg", "nn", "reduce", "shape"]
