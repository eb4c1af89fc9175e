# cython: language_level=3
"""Adding up gradients: the engine's own function, and the loop that C would write."""

cimport numpy as cnp
from cpython.object cimport PyObject

from distgrad.graph._gradient cimport add_gradients

import numpy as np

cnp.import_array()

cdef extern from *:
    """
    static __attribute__((noinline)) void add_loop(double *restrict sum,
                                                   const double *restrict part, ptrdiff_t n) {
        for (ptrdiff_t i = 0; i < n; i++) sum[i] += part[i];
    }
    """
    void add_loop(double *total, double *part, Py_ssize_t n) nogil


def by_engine(Py_ssize_t n, int times):
    """Add float64[n] to a gradient that nobody else sees, through the engine."""
    cdef cnp.ndarray total = np.zeros(n), part = np.ones(n)
    for _ in range(times):
        add_gradients(<PyObject *>total, <PyObject *>part, False)
    if times and (<object>total)[0] != times:
        raise AssertionError("cannot measure: the sum was not made in place")


def by_loop(Py_ssize_t n, int times):
    """Add float64[n] in a loop compiled for this processor."""
    cdef cnp.ndarray total = np.zeros(n), part = np.ones(n)
    for _ in range(times):
        add_loop(<double *>cnp.PyArray_DATA(total), <double *>cnp.PyArray_DATA(part), n)
