"""Own loops for small float arrays, where NumPy's call overhead exceeds the arithmetic.

Each function returns None where it does not apply, or where a floating-point exception
occurred: the caller then asks NumPy, which warns or raises as `numpy.errstate` says.
"""

cimport numpy as cnp
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact

cdef extern from "fenv.h" nogil:
    int FE_INVALID, FE_DIVBYZERO, FE_OVERFLOW
    int fetestexcept(int flags)
    int feclearexcept(int flags)

cdef enum:
    SMALL = 1024        # elements; above, NumPy is as fast
    EXACT = 1 << 24     # integers up to here are exact in float32

cdef enum Kernel:
    NO_KERNEL
    ADD
    SUBTRACT
    MULTIPLY
    DIVIDE
    NEGATIVE
    EXP
    TANH
    SQRT
    SQUARE
    RELU
    SIGMOID

ctypedef fused real:
    float
    double


cdef inline void run(Kernel kernel, const real *a, Py_ssize_t step_a, const real *b,
                     Py_ssize_t step_b, real *out, Py_ssize_t n) noexcept nogil:
    """Forward of the binary ones, ``a * derivative(b)`` of the others; `b` is their result.

    SQUARE takes its argument for `b`. A step is 1, or 0 for a scalar.
    """
    cdef Py_ssize_t i
    if kernel == ADD:
        for i in range(n):
            out[i] = a[i * step_a] + b[i * step_b]
    elif kernel == SUBTRACT:
        for i in range(n):
            out[i] = a[i * step_a] - b[i * step_b]
    elif kernel == MULTIPLY or kernel == EXP:
        for i in range(n):
            out[i] = a[i * step_a] * b[i * step_b]
    elif kernel == DIVIDE:
        for i in range(n):
            out[i] = a[i * step_a] / b[i * step_b]
    elif kernel == NEGATIVE:
        for i in range(n):
            out[i] = -a[i]
    elif kernel == TANH:
        for i in range(n):
            out[i] = a[i] * (1 - b[i] * b[i])
    elif kernel == SQRT:
        for i in range(n):
            out[i] = a[i] / (2 * b[i])
    elif kernel == SQUARE:
        for i in range(n):
            out[i] = a[i] * (2 * b[i])
    elif kernel == RELU:
        for i in range(n):
            out[i] = a[i] * (b[i] > 0)
    elif kernel == SIGMOID:
        for i in range(n):
            out[i] = a[i] * b[i] * (1 - b[i])


cdef inline bint is_small(object array) noexcept:
    if not cnp.PyArray_CheckExact(array):
        return False
    cdef int typenum = cnp.PyArray_TYPE(<cnp.ndarray>array)
    return (
        (typenum == cnp.NPY_FLOAT64 or typenum == cnp.NPY_FLOAT32)
        and cnp.PyArray_CHKFLAGS(
            <cnp.ndarray>array, cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED)
        and cnp.PyArray_SIZE(<cnp.ndarray>array) <= SMALL
        and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>array)
    )


cdef inline bint is_alike(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Same dtype and shape."""
    cdef int i, ndim = cnp.PyArray_NDIM(a)
    if ndim != cnp.PyArray_NDIM(b) or cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(b):
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


cdef inline bint read_scalar(object value, double *out) except -1:
    """Read a Python number that every float dtype takes as it is, or rounds like a float."""
    cdef int overflow = 0
    cdef long number
    if PyFloat_CheckExact(value):
        out[0] = PyFloat_AS_DOUBLE(value)
        return -1e30 < out[0] < 1e30
    if PyLong_CheckExact(value):
        number = PyLong_AsLongAndOverflow(value, &overflow)
        out[0] = <double>number
        return not overflow and -EXACT <= number <= EXACT
    return False


cdef inline object compute(Kernel kernel, cnp.ndarray like, const void *a, Py_ssize_t step_a,
                           const void *b, Py_ssize_t step_b):
    cdef int flags = FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW
    cdef Py_ssize_t n = cnp.PyArray_SIZE(like)
    cdef cnp.ndarray out = cnp.PyArray_SimpleNew(
        cnp.PyArray_NDIM(like), cnp.PyArray_DIMS(like), cnp.PyArray_TYPE(like))
    if cnp.PyArray_TYPE(like) == cnp.NPY_FLOAT64:
        run[double](kernel, <const double *>a, step_a, <const double *>b, step_b,
                    <double *>cnp.PyArray_DATA(out), n)
    else:
        run[float](kernel, <const float *>a, step_a, <const float *>b, step_b,
                   <float *>cnp.PyArray_DATA(out), n)
    if fetestexcept(flags):
        feclearexcept(flags)
        return None
    return out


cdef inline object small_binary(Kernel kernel, object a, object b):
    """Two small arrays of one dtype and shape, or one and a Python number."""
    cdef double scalar = 0
    cdef float narrow
    cdef const void *number = &scalar
    if is_small(a):
        if is_small(b):
            if not is_alike(<cnp.ndarray>a, <cnp.ndarray>b):
                return None
            return compute(kernel, <cnp.ndarray>a, cnp.PyArray_DATA(<cnp.ndarray>a), 1,
                           cnp.PyArray_DATA(<cnp.ndarray>b), 1)
        if read_scalar(b, &scalar):
            if cnp.PyArray_TYPE(<cnp.ndarray>a) == cnp.NPY_FLOAT32:
                narrow = <float>scalar
                number = &narrow
            return compute(kernel, <cnp.ndarray>a, cnp.PyArray_DATA(<cnp.ndarray>a), 1, number, 0)
    elif is_small(b) and read_scalar(a, &scalar):
        if cnp.PyArray_TYPE(<cnp.ndarray>b) == cnp.NPY_FLOAT32:
            narrow = <float>scalar
            number = &narrow
        return compute(kernel, <cnp.ndarray>b, number, 0, cnp.PyArray_DATA(<cnp.ndarray>b), 1)
    return None


cdef inline object small_negative(object a):
    if not is_small(a):
        return None
    return compute(NEGATIVE, <cnp.ndarray>a, cnp.PyArray_DATA(<cnp.ndarray>a), 1,
                   cnp.PyArray_DATA(<cnp.ndarray>a), 1)


cdef inline bint small_add_into(object target, object other) noexcept:
    """Add in place; False if it does not apply. Overflow passes without a warning here."""
    cdef void *out
    if not (is_small(target) and is_small(other)
            and is_alike(<cnp.ndarray>target, <cnp.ndarray>other)):
        return False
    out = cnp.PyArray_DATA(<cnp.ndarray>target)
    if cnp.PyArray_TYPE(<cnp.ndarray>target) == cnp.NPY_FLOAT64:
        run[double](ADD, <double *>out, 1, <double *>cnp.PyArray_DATA(<cnp.ndarray>other), 1,
                    <double *>out, cnp.PyArray_SIZE(<cnp.ndarray>target))
    else:
        run[float](ADD, <float *>out, 1, <float *>cnp.PyArray_DATA(<cnp.ndarray>other), 1,
                   <float *>out, cnp.PyArray_SIZE(<cnp.ndarray>target))
    return True


cdef inline object small_gradient(Kernel kernel, int argument, object g, object x, object y,
                                  object answer):
    """The gradient rule of an operation with a kernel, for real arrays of one shape."""
    if kernel == ADD or (kernel == SUBTRACT and argument == 0):
        return g
    if kernel == NEGATIVE or kernel == SUBTRACT:
        return small_negative(g)
    if kernel == MULTIPLY or (kernel == DIVIDE and argument == 0):
        return small_binary(kernel, g, y if argument == 0 else x)
    if kernel == SQUARE:
        return small_binary(kernel, g, x)
    if kernel == DIVIDE:
        return None
    return small_binary(kernel, g, answer)
