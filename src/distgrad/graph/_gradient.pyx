# cython: auto_pickle=False, autotestdict=False
"""Gradients: brought into shape, added up, and stored at leaves."""

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.stdlib cimport qsort
from libc.string cimport memcmp

from distgrad.graph._kernels cimport DIVIDE, MULTIPLY, NEGATIVE, SUBTRACT, Kernel, add_into
from distgrad.graph._node cimport (
    AccumulateGrad, Meta, Node, TensorBase, mark_written, meta_dtype, meta_shape, same_meta, wrap,
)

import numpy as np

from distgrad.errors import GraphError

cnp.import_array()

cdef extern from "Python.h":
    object PyObject_Vectorcall(object callable, PyObject **args, size_t n, PyObject *names)
    PyObject *PyList_GET_ITEM(object items, Py_ssize_t i) noexcept
    PyObject *PyDict_GetItemWithError(object table, object key) except? NULL
    Py_ssize_t Py_REFCNT(PyObject *object) noexcept
    int PyThread_acquire_lock(void *lock, int wait) noexcept nogil
    void PyThread_release_lock(void *lock) noexcept nogil

cdef object numpy_add = np.add

cdef Py_ssize_t WORTHWHILE = 2048  # bytes; less travels in the same piece as the message itself


cdef inline bint is_exclusive(PyObject *array) noexcept:
    """Invariant 5, for an array of which the caller holds one reference.

    A view counts if it shows all of an array that nobody else refers to.
    """
    cdef PyObject *base
    if Py_REFCNT(array) > 1 or not cnp.PyArray_CheckExact(<object>array):
        return False
    if not cnp.PyArray_CHKFLAGS(<cnp.ndarray>array, cnp.NPY_ARRAY_WRITEABLE):
        return False
    if cnp.PyArray_CHKFLAGS(<cnp.ndarray>array, cnp.NPY_ARRAY_OWNDATA):
        return True
    base = cnp.PyArray_BASE(<cnp.ndarray>array)
    return (
        base != NULL
        and Py_REFCNT(base) == 1
        and cnp.PyArray_CheckExact(<object>base)
        and cnp.PyArray_CHKFLAGS(<cnp.ndarray>base, cnp.NPY_ARRAY_OWNDATA)
        and cnp.PyArray_NBYTES(<cnp.ndarray>base) == cnp.PyArray_NBYTES(<cnp.ndarray>array)
        and (cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>array)
             or cnp.PyArray_IS_F_CONTIGUOUS(<cnp.ndarray>array))
    )


cdef bint is_own(PyObject *array) noexcept:
    """Whether an array of which the caller holds one reference may be given away to be written.

    Memory that is not an array's, as that of a message, belongs to the one array made of it.
    """
    cdef int i
    cdef PyObject *base
    if is_exclusive(array):
        return True
    if (Py_REFCNT(array) > 1 or not cnp.PyArray_CheckExact(<object>array)
            or not cnp.PyArray_CHKFLAGS(<cnp.ndarray>array, cnp.NPY_ARRAY_WRITEABLE)):
        return False
    base = cnp.PyArray_BASE(<cnp.ndarray>array)
    if base == NULL or isinstance(<object>base, np.ndarray):
        return False
    for i in range(cnp.PyArray_NDIM(<cnp.ndarray>array)):
        if (cnp.PyArray_STRIDE(<cnp.ndarray>array, i) == 0
                and cnp.PyArray_DIM(<cnp.ndarray>array, i) > 1):
            return False
    return True


cdef int own(list gradients) except -1:
    """Make gradients writable for whoever gets the list: those it alone has, copies of others."""
    cdef Py_ssize_t i
    cdef PyObject *gradient
    for i in range(len(gradients)):
        gradient = PyList_GET_ITEM(gradients, i)
        if cnp.PyArray_CheckExact(<object>gradient) and not is_own(gradient):
            gradients[i] = cnp.PyArray_NewCopy(<cnp.ndarray>gradient, cnp.NPY_KEEPORDER)
    return 0


cdef object sum_axes(object gradient, tuple shape):
    """Undo broadcasting: sum `gradient` (array or Tensor) down to `shape`."""
    cdef int extra = gradient.ndim - len(shape)
    if extra < 0:
        return None
    axes = [i for i in range(gradient.ndim)
            if i < extra or (shape[i - extra] == 1 and gradient.shape[i] != 1)]
    if axes:
        gradient = gradient.sum(axis=tuple(axes), keepdims=True)
    if gradient.shape[extra:] != shape:
        return None
    return gradient.reshape(shape) if extra else gradient


cdef object fit(object gradient, Meta *meta, Node node, bint create):
    """Bring a gradient to the shape and dtype of the value it belongs to, or raise."""
    if create:
        if not isinstance(gradient, TensorBase):
            gradient = wrap(np.asarray(gradient))
    else:
        if isinstance(gradient, TensorBase):
            gradient = (<TensorBase>gradient).array
        elif not cnp.PyArray_CheckExact(gradient):
            gradient = np.asarray(gradient)
    if meta.ndim < 0:
        return gradient
    cdef cnp.ndarray array = (<TensorBase>gradient).array if create else gradient
    if same_meta(meta, array):
        return gradient
    shape = meta_shape(meta)
    fitted = gradient if gradient.shape == shape else sum_axes(gradient, shape)
    if fitted is None:
        raise GraphError(
            f"cannot use a gradient of {node.name()}: it has shape {gradient.shape}, "
            f"the value it belongs to {shape}"
        )
    dtype = meta_dtype(meta)
    if fitted.dtype.kind == "c" and dtype.kind != "c":
        fitted = fitted.real
    if fitted.dtype != dtype:
        fitted = fitted.astype(dtype)
    return fitted if create else np.asarray(fitted)


cdef object condense(object gradient):
    """Cut a gradient that is the same all along some axes to extent 1 there, for a message.

    The gradient of a sum is one number, whatever the size of what was summed up.
    """
    cdef cnp.ndarray array
    cdef bint repeats = False
    cdef int i
    if not cnp.PyArray_CheckExact(gradient):
        return gradient
    array = gradient
    if cnp.PyArray_NBYTES(array) <= WORTHWHILE:
        return gradient
    cuts = []
    for i in range(cnp.PyArray_NDIM(array)):
        same = cnp.PyArray_STRIDE(array, i) == 0 and cnp.PyArray_DIM(array, i) > 1
        cuts.append(slice(0, 1) if same else slice(None))
        repeats = repeats or same
    return array[tuple(cuts)] if repeats else gradient


cdef object scaled(Kernel kernel, int argument, object gradient, object x, object y):
    """The rule of a product with a number, or the like, for a gradient that repeats; else None.

    What comes out repeats as well: the work is that of what differs.
    """
    other = y if argument == 0 else x
    if kernel == MULTIPLY or (kernel == DIVIDE and argument == 0):
        if type(other) is not float and type(other) is not int and not (
            cnp.PyArray_CheckExact(other) and (<cnp.ndarray>other).ndim == 0
            and (<cnp.ndarray>other).descr.kind == c"f"
        ):
            return None
    elif kernel != NEGATIVE and (kernel != SUBTRACT or argument == 0):
        return None
    part = condense(gradient)
    if part is gradient:
        return None
    if kernel == MULTIPLY:
        part = part * other
    elif kernel == DIVIDE:
        part = part / other
    else:
        part = -part
    return np.broadcast_to(part, gradient.shape)


cdef object spread_out(object gradient, Meta *meta):
    """Undo `condense`, for a gradient of a value of which all but the contents is known."""
    cdef cnp.ndarray array
    cdef int i
    if not cnp.PyArray_CheckExact(gradient) or (<cnp.ndarray>gradient).ndim != meta.ndim:
        return gradient
    array = gradient
    if same_meta(meta, array):
        return gradient
    shape = meta_shape(meta)
    for i in range(meta.ndim):
        if cnp.PyArray_DIM(array, i) != 1 and cnp.PyArray_DIM(array, i) != shape[i]:
            return gradient
    return np.broadcast_to(gradient, shape)


cdef object add_gradients(PyObject *first, PyObject *second, bint create):
    """Sum of two gradients of one slot; either is overwritten if it is exclusive."""
    cdef PyObject *args[3]
    cdef size_t n = 3
    if create:
        return <object>first + <object>second
    args[0] = first
    args[1] = second
    if is_exclusive(first):
        if add_into(<object>first, <object>second):
            return <object>first
        args[2] = first
    elif is_exclusive(second):
        args[2] = second
    else:
        n = 2
        one, other = condense(<object>first), condense(<object>second)
        if one is not <object>first and other is not <object>second:
            shape = (<object>first).shape
            if shape == (<object>second).shape:
                return np.broadcast_to(one + other, shape)
    total = PyObject_Vectorcall(numpy_add, args, n, NULL)
    return total if cnp.PyArray_CheckExact(total) else np.asarray(total)


cdef struct Term:
    PyObject *gradient
    char *data          # its elements in C order
    Py_ssize_t nbytes


cdef int by_content(const void *first, const void *second) noexcept nogil:
    cdef const Term *a = <const Term *>first
    cdef const Term *b = <const Term *>second
    if a.nbytes != b.nbytes:
        return 1 if a.nbytes > b.nbytes else -1
    return memcmp(a.data, b.data, a.nbytes)


cdef int sort_gradients(PyObject **gradients, int n) except -1:
    """Bring gradients into an order that depends on nothing but their elements."""
    cdef int i
    cdef cnp.ndarray array
    cdef list copies = []
    cdef Term *terms = <Term *>PyMem_Malloc(n * sizeof(Term))
    if terms == NULL:
        raise MemoryError()
    try:
        for i in range(n):
            gradient = <object>gradients[i]
            array = (<TensorBase>gradient).array if isinstance(gradient, TensorBase) else gradient
            if not cnp.PyArray_IS_C_CONTIGUOUS(array):
                array = cnp.PyArray_NewCopy(array, cnp.NPY_CORDER)
                copies.append(array)
            terms[i].gradient = gradients[i]
            terms[i].data = cnp.PyArray_BYTES(array)
            terms[i].nbytes = cnp.PyArray_NBYTES(array)
        qsort(terms, n, sizeof(Term), by_content)
        for i in range(n):
            gradients[i] = terms[i].gradient
    finally:
        PyMem_Free(terms)
    return 0


# ---------------------------------------------------------------- gradients of leaves

cdef int store_gradient(TensorBase leaf, PyObject *gradient) except -1:
    """Add to ``.grad``: take an exclusive array, copy a shared one, then add in place."""
    cdef TensorBase old = <TensorBase>leaf.gradient
    if old is None:
        if isinstance(<object>gradient, TensorBase):
            leaf.gradient = <object>gradient
        elif is_exclusive(gradient):
            leaf.gradient = wrap(<object>gradient)
        else:
            leaf.gradient = wrap(cnp.PyArray_NewCopy(<cnp.ndarray>gradient, cnp.NPY_KEEPORDER))
    elif isinstance(<object>gradient, TensorBase):
        leaf.gradient = old + <object>gradient
    elif old.needs or not cnp.PyArray_ISWRITEABLE(old.array):
        leaf.gradient = wrap(numpy_add(old.array, <object>gradient))
    else:
        if not add_into(old.array, <object>gradient):
            numpy_add(old.array, <object>gradient, out=old.array)
        mark_written(old, "backward")
    return 0


@cython.final
cdef class GradientTable:
    """Gradients of leaves, kept apart from ``.grad``: those of one autograd context.

    An arriving array is kept as it is and not written while anybody else can see it; the
    second contribution allocates, later ones add in place. Passes may accumulate from
    several threads at once: the leaf's AccumulateGrad takes its lock.
    """

    def __cinit__(self):
        self.entries = {}

    def __len__(self):
        return len(self.entries)

    def clear(self):
        """Forget all gradients."""
        self.entries.clear()

    def get(self, TensorBase leaf not None):
        """Return the gradient of a leaf as a Tensor, which may be written, or None."""
        cdef PyObject *entry = PyDict_GetItemWithError(self.entries, leaf)
        if entry == NULL:
            return None
        if not isinstance(<object>entry, TensorBase):
            gradient = <object>entry if is_own(entry) else (<object>entry).copy()
            self.entries[leaf] = wrap(gradient)
        return self.entries[leaf]

    def as_dict(self):
        """Return {leaf: gradient}, in order of their arrival."""
        return {leaf: self.get(leaf) for leaf in list(self.entries)}


cdef int tabulate(GradientTable table, TensorBase leaf, PyObject *gradient) except -1:
    """Add to the leaf's entry, of which the table alone has a reference or others see it."""
    cdef PyObject *entry = PyDict_GetItemWithError(table.entries, leaf)
    if entry == NULL:
        table.entries[leaf] = <object>gradient
    elif not isinstance(<object>entry, TensorBase):
        total = add_gradients(entry, gradient, isinstance(<object>gradient, TensorBase))
        if <PyObject *>total != entry:
            table.entries[leaf] = total
    elif isinstance(<object>gradient, TensorBase):
        table.entries[leaf] = <object>entry + <object>gradient
    else:
        table.entries[leaf] = wrap(numpy_add((<TensorBase>entry).array, <object>gradient))
    return 0


cdef object fill(Node node, list grads):
    """Gradients of all outputs of an operation with several: zeros where none arrived."""
    cdef int i
    return tuple([
        np.zeros(meta_shape(&node.slots[i]), meta_dtype(&node.slots[i]))
        if gradient is None and node.slots[i].ndim >= 0 else gradient
        for i, gradient in enumerate(grads)
    ])


cdef object one_like(cnp.ndarray array):
    """The gradient of an array with one element with respect to itself."""
    cdef cnp.ndarray one = cnp.PyArray_ZEROS(
        cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array), cnp.PyArray_TYPE(array), 0)
    if cnp.PyArray_TYPE(one) == cnp.NPY_FLOAT64:
        (<double *>cnp.PyArray_DATA(one))[0] = 1
    elif cnp.PyArray_TYPE(one) == cnp.NPY_FLOAT32:
        (<float *>cnp.PyArray_DATA(one))[0] = 1
    else:
        (<object>one).fill(1)
    return one


cdef int accumulate(AccumulateGrad node, PyObject *gradient, GradientTable table) except -1:
    """Add a gradient of a leaf to the table, or to ``.grad`` without one."""
    if not PyThread_acquire_lock(node.lock, 0):
        with nogil:
            PyThread_acquire_lock(node.lock, 1)
    try:
        if table is None:
            store_gradient(node.variable, gradient)
        else:
            tabulate(table, node.variable, gradient)
    finally:
        PyThread_release_lock(node.lock)
    return 0
