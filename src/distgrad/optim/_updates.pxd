"""Fused steps of optimizers over the parameters of a group."""

cimport numpy as cnp

from distgrad.graph._node cimport TensorBase

cdef extern from "optim/kernels.h" nogil:
    struct Rates "dg_rates":
        double lr, decay, eps
        double keep, take, keep2, take2
        double scale, rest
        double low, high, least, most
        int maximize, nesterov, centered, first

ctypedef void (*Kernel64)(
    Py_ssize_t, double **, double **, const double *, const Rates *) noexcept nogil
ctypedef void (*Kernel32)(
    Py_ssize_t, float **, float **, const float *, const Rates *) noexcept nogil

cdef enum:
    MOST_ARRAYS = 4     # a parameter and its state


cdef class Update:
    cdef Kernel64 run64
    cdef Kernel32 run32
    cdef Rates rates            # the settings; what depends on the number of the step is set anew
    cdef tuple names            # of the arrays of the state, in the order of the kernel
    cdef double fill            # what they hold before the first step: the last of them this
    cdef bint counts            # the state has the number of steps
    cdef double lr, beta, beta2, lr_decay   # what those settings are made of
    cdef bint corrects          # divides by what running means lack in their first steps
    cdef long step              # that `rates` are set for

    cdef int set_step(self, long step) except -1
    cdef bint apply(self, cnp.ndarray data, object gradient, dict state,
                    cnp.ndarray target, dict fresh) except -1
    cdef object first(self, cnp.ndarray data, Py_ssize_t number)
    cdef int run(self, int typenum, Py_ssize_t n, void **source, void **sink,
                 const void *gradient) except -1
    cdef void launch(self, int typenum, Py_ssize_t n, void **source, void **sink,
                     const void *gradient, const Rates *rates) noexcept nogil


cdef class Change:
    cdef TensorBase param
    cdef cnp.ndarray values     # new while the step is prepared, then old; None before the first
    cdef dict state             # that goes with them
    cdef dict before            # while the step is prepared: what it found; None for nothing
