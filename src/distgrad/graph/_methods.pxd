"""Methods of Tensor that programs call most, without the detour over NumPy's functions."""

from distgrad.graph._node cimport TensorBase


cdef object total(TensorBase x)
cdef object reshape(TensorBase x, object shape)
cdef object get_item(TensorBase x, object index)
