# cython: language_level=3
"""Adding up gradients: the engine's own function, and the loop that C would write."""

cimport numpy as cnp
from cpython.object cimport PyObject

from distgrad.graph._gradient cimport add_gradients

import numpy as np

cnp.import_array()

cdef enum:
    MAPPED = 1 << 17    # bytes; the C library maps blocks from here on
    PAGE = 4096

cdef extern from *:
    """
    static __attribute__((noinline)) void add_loop(double *restrict sum,
                                                   const double *restrict part, ptrdiff_t n) {
        for (ptrdiff_t i = 0; i < n; i++) sum[i] += part[i];
    }
    """
    void add_loop(double *total, double *part, Py_ssize_t n) nogil


cdef class Sums:
    """A gradient of float64[n], and one of ones that is added to it.

    A loop in C takes half or twice the time, depending on where its arrays lie. Here they lie at
    the beginning of a page, where it is fastest; those large enough to be mapped by
    themselves 16 bytes behind, as NumPy gets no others.
    """

    cdef cnp.ndarray total, part

    def __init__(self, Py_ssize_t n):
        cdef size_t offset = 0 if n * sizeof(double) < MAPPED else 16
        self.total = zeros_at(offset, n)
        self.part = zeros_at(offset, n)
        self.part.fill(1)

    def by_engine(self, int times):
        """Add to the gradient, which nobody else sees, through the engine."""
        self.total.fill(0)
        for _ in range(times):
            add_gradients(<PyObject *>self.total, <PyObject *>self.part, False)
        if times and (<object>self.total)[0] != times:
            raise AssertionError("cannot measure: the sum was not made in place")

    def by_loop(self, int times):
        """Add in a loop compiled for this processor."""
        self.total.fill(0)
        for _ in range(times):
            add_loop(<double *>cnp.PyArray_DATA(self.total),
                     <double *>cnp.PyArray_DATA(self.part), cnp.PyArray_SIZE(self.total))


cdef object zeros_at(size_t offset, Py_ssize_t n):
    """Return an array of NumPy's own that begins so many bytes after the beginning of a page."""
    passed_over = []
    for _ in range(10_000):
        array = np.zeros(n)
        if <size_t>cnp.PyArray_DATA(array) % PAGE == offset:
            return array
        passed_over.append(array)
    raise MemoryError(f"cannot place float64[{n}] {offset} bytes after the beginning of a page")
