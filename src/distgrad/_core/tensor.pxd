"""Tensor for other extensions."""

from distgrad._core.node cimport TensorBase


cdef class Tensor(TensorBase):
    pass
