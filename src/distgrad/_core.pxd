"""Tensor for other extensions."""

from distgrad.graph._node cimport TensorBase


cdef class Tensor(TensorBase):
    pass
