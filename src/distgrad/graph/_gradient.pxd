"""Gradients: brought into shape, added up, and stored at leaves."""

cimport numpy as cnp
from cpython.object cimport PyObject

from distgrad.graph._kernels cimport Kernel
from distgrad.graph._node cimport AccumulateGrad, Meta, Node, TensorBase


cdef class GradientTable:
    cdef dict entries               # leaf -> ndarray, or Tensor once handed out


cdef int own(list gradients) except -1
cdef object sum_axes(object gradient, tuple shape)
cdef object fit(object gradient, Meta *meta, Node node, bint create)
cdef object condense(object gradient)
cdef object fill(Node node, list grads)
cdef object one_like(cnp.ndarray array)
cdef object scaled(Kernel kernel, int argument, object gradient, object x, object y)
cdef object spread_out(object gradient, Meta *meta)
cdef object add_gradients(PyObject *first, PyObject *second, bint create)
cdef int store_gradient(TensorBase leaf, PyObject *gradient) except -1
cdef int tabulate(GradientTable table, TensorBase leaf, PyObject *gradient) except -1
cdef int accumulate(AccumulateGrad node, PyObject *gradient, GradientTable table) except -1
cdef int sort_gradients(PyObject **gradients, int n) except -1
