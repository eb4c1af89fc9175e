"""Own loops for small float arrays, where NumPy's call overhead exceeds the arithmetic.

Each function returns None where it does not apply, or where a floating-point exception
occurred: the caller then asks NumPy, which warns or raises as `numpy.errstate` says.
"""

cimport numpy as cnp
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact

cdef extern from "fenv.h" nogil:
    int FE_INVALID, FE_DIVBYZERO, FE_OVERFLOW
    int feclearexcept(int flags)

cdef extern from "graph/kernels.h" nogil:
    int dg_raised(int flags)
    void dg_run_f64(int kernel, const double *a, Py_ssize_t step_a, const double *b,
                    Py_ssize_t step_b, double *out, Py_ssize_t n)
    void dg_run_f32(int kernel, const float *a, Py_ssize_t step_a, const float *b,
                    Py_ssize_t step_b, float *out, Py_ssize_t n)
    void dg_add_into_f64(double *sum, const double *part, Py_ssize_t n)
    void dg_add_into_f32(float *sum, const float *part, Py_ssize_t n)
    void dg_fill_f64(double *out, double value, Py_ssize_t n)
    void dg_fill_f32(float *out, float value, Py_ssize_t n)
    double dg_sum_f64(const double *a, Py_ssize_t n)
    float dg_sum_f32(const float *a, Py_ssize_t n)
    enum Kernel "dg_kernel":
        NO_KERNEL "DG_NONE"
        ADD "DG_ADD"
        SUBTRACT "DG_SUBTRACT"
        MULTIPLY "DG_MULTIPLY"
        DIVIDE "DG_DIVIDE"
        NEGATIVE "DG_NEGATIVE"
        EXP "DG_EXP"
        TANH "DG_TANH"
        SQRT "DG_SQRT"
        SQUARE "DG_SQUARE"
        RELU "DG_RELU"
        SIGMOID "DG_SIGMOID"
        SUM "DG_SUM"
        RESHAPE "DG_RESHAPE"
        GETITEM "DG_GETITEM"

cdef enum:
    SMALL = 8192            # elements; above, NumPy's own loops are as fast
    SMALL_SUM = 1024
    FILLED = 1 << 16        # a gradient of one number is a view above, an array up to this size
    UNLOCKED = 1 << 14      # elements; from here on the GIL is released
    EXACT = 1 << 24         # integers up to here are exact in float32


cdef inline bint is_loopable(object array) noexcept:
    """A contiguous float array."""
    if not cnp.PyArray_CheckExact(array):
        return False
    cdef int typenum = cnp.PyArray_TYPE(<cnp.ndarray>array)
    return (
        (typenum == cnp.NPY_FLOAT64 or typenum == cnp.NPY_FLOAT32)
        and cnp.PyArray_CHKFLAGS(
            <cnp.ndarray>array, cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED)
        and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>array)
    )


cdef inline bint is_plain(object array, Py_ssize_t limit) noexcept:
    """A contiguous float array of at most so many elements."""
    return is_loopable(array) and cnp.PyArray_SIZE(<cnp.ndarray>array) <= limit


cdef inline bint is_small(object array) noexcept:
    return is_plain(array, SMALL)


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
        dg_run_f64(kernel, <const double *>a, step_a, <const double *>b, step_b,
                   <double *>cnp.PyArray_DATA(out), n)
    else:
        dg_run_f32(kernel, <const float *>a, step_a, <const float *>b, step_b,
                   <float *>cnp.PyArray_DATA(out), n)
    if dg_raised(flags):
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


cdef inline bint add_into(object target, object other) noexcept:
    """Add in place; False if it does not apply. Overflow passes without a warning here."""
    cdef Py_ssize_t n = 1, nbytes
    cdef int i
    cdef char *out
    cdef char *part
    if not (is_loopable(target) and is_loopable(other)
            and is_alike(<cnp.ndarray>target, <cnp.ndarray>other)):
        return False
    for i in range(cnp.PyArray_NDIM(<cnp.ndarray>target)):
        n *= cnp.PyArray_DIM(<cnp.ndarray>target, i)
    nbytes = n * (8 if cnp.PyArray_TYPE(<cnp.ndarray>target) == cnp.NPY_FLOAT64 else 4)
    out = <char *>cnp.PyArray_DATA(<cnp.ndarray>target)
    part = <char *>cnp.PyArray_DATA(<cnp.ndarray>other)
    if out < part + nbytes and part < out + nbytes:
        return False
    if n >= UNLOCKED:
        with nogil:
            add_doubles_or_floats(cnp.PyArray_TYPE(<cnp.ndarray>target), out, part, n)
    else:
        add_doubles_or_floats(cnp.PyArray_TYPE(<cnp.ndarray>target), out, part, n)
    return True


cdef inline void add_doubles_or_floats(int typenum, void *out, void *part,
                                       Py_ssize_t n) noexcept nogil:
    if typenum == cnp.NPY_FLOAT64:
        dg_add_into_f64(<double *>out, <const double *>part, n)
    else:
        dg_add_into_f32(<float *>out, <const float *>part, n)


cdef inline object small_sum(object array):
    """Sum of all elements, with the bits that NumPy gives."""
    cdef int flags = FE_INVALID | FE_OVERFLOW
    cdef cnp.ndarray out
    if not is_plain(array, SMALL_SUM):
        return None
    out = cnp.PyArray_SimpleNew(0, NULL, cnp.PyArray_TYPE(<cnp.ndarray>array))
    if cnp.PyArray_TYPE(<cnp.ndarray>array) == cnp.NPY_FLOAT64:
        (<double *>cnp.PyArray_DATA(out))[0] = dg_sum_f64(
            <const double *>cnp.PyArray_DATA(<cnp.ndarray>array),
            cnp.PyArray_SIZE(<cnp.ndarray>array))
    else:
        (<float *>cnp.PyArray_DATA(out))[0] = dg_sum_f32(
            <const float *>cnp.PyArray_DATA(<cnp.ndarray>array),
            cnp.PyArray_SIZE(<cnp.ndarray>array))
    if dg_raised(flags):
        feclearexcept(flags)
        return None
    return out


cdef inline object filled(int ndim, cnp.npy_intp *dims, int typenum, object number):
    """An array of one number, which is an array without dimensions of the same dtype."""
    cdef cnp.ndarray out
    if not (is_plain(number, 1) and cnp.PyArray_NDIM(<cnp.ndarray>number) == 0
            and cnp.PyArray_TYPE(<cnp.ndarray>number) == typenum
            and cnp.PyArray_MultiplyList(dims, ndim) <= FILLED):
        return None
    out = cnp.PyArray_SimpleNew(ndim, dims, typenum)
    if typenum == cnp.NPY_FLOAT64:
        dg_fill_f64(<double *>cnp.PyArray_DATA(out),
                    (<double *>cnp.PyArray_DATA(<cnp.ndarray>number))[0], cnp.PyArray_SIZE(out))
    else:
        dg_fill_f32(<float *>cnp.PyArray_DATA(out),
                    (<float *>cnp.PyArray_DATA(<cnp.ndarray>number))[0], cnp.PyArray_SIZE(out))
    return out


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
