"""The C API of Python and NumPy as the codec uses it.

Most functions take borrowed pointers: looking at an object does not change its reference
count, and the encoder decides by the count.
"""

cimport numpy as cnp
from cpython.object cimport PyObject, PyTypeObject

cdef extern from "Python.h":
    PyTypeObject PyUnicode_Type, PyLong_Type, PyFloat_Type, PyTuple_Type, PyList_Type
    PyTypeObject PyDict_Type, PyBytes_Type, PySet_Type, PyFrozenSet_Type, PyComplex_Type
    PyTypeObject PySlice_Type, PyRange_Type
    PyObject *Py_None
    PyObject *Py_True
    PyObject *Py_False
    PyObject *Py_Ellipsis
    ctypedef struct Py_complex:
        double real
        double imag
    PyTypeObject *Py_TYPE(PyObject *)
    Py_ssize_t Py_REFCNT(PyObject *)
    void Py_XDECREF(PyObject *)
    void increment "Py_INCREF" (PyObject *)
    void decrement "Py_DECREF" (PyObject *)
    void PyErr_Clear()
    long long PyLong_AsLongLongAndOverflow(PyObject *, int *) except? -1
    double PyFloat_AS_DOUBLE(PyObject *)
    Py_complex PyComplex_AsCComplex(PyObject *)
    const char *PyUnicode_AsUTF8AndSize(PyObject *, Py_ssize_t *)
    char *PyBytes_AS_STRING(PyObject *)
    Py_ssize_t PyBytes_GET_SIZE(PyObject *)
    Py_ssize_t PyTuple_GET_SIZE(PyObject *)
    PyObject *PyTuple_GET_ITEM(PyObject *, Py_ssize_t)
    Py_ssize_t PyList_GET_SIZE(PyObject *)
    PyObject *PyList_GET_ITEM(PyObject *, Py_ssize_t)
    Py_ssize_t PyDict_Size(PyObject *)
    int PyDict_Next(PyObject *, Py_ssize_t *, PyObject **, PyObject **)
    PyObject *PyDict_GetItemWithError(PyObject *, PyObject *) except? NULL
    object PyTuple_New(Py_ssize_t)
    void PyTuple_SET_ITEM(object, Py_ssize_t, object)
    object PyList_New(Py_ssize_t)
    void PyList_SET_ITEM(object, Py_ssize_t, object)
    int PyDict_SetItem(object, object, object) except -1
    int PySet_Add(object, object) except -1
    object PyLong_FromLongLong(long long)
    object PyFloat_FromDouble(double)
    object PyComplex_FromDoubles(double, double)
    object PyBytes_FromStringAndSize(const char *, Py_ssize_t)
    object PyUnicode_DecodeUTF8(const char *, Py_ssize_t, const char *)
    bint PyUnicode_IS_COMPACT_ASCII(PyObject *)
    void *PyUnicode_DATA(PyObject *)
    Py_ssize_t PyUnicode_GET_LENGTH(PyObject *)
    int PyObject_GetBuffer(object, Py_buffer *, int) except -1
    void PyBuffer_Release(Py_buffer *)
    int PyBuffer_FillInfo(Py_buffer *, object, void *, Py_ssize_t, int, int) except -1
    Py_buffer *PyMemoryView_GET_BUFFER(object)
    enum:
        PyBUF_SIMPLE
        PyBUF_WRITABLE

cdef extern from "numpy/arrayobject.h":
    PyTypeObject PyArray_Type
    object PyArray_NewFromDescr(
        PyTypeObject *, cnp.PyArray_Descr *, int, cnp.npy_intp *, cnp.npy_intp *, void *, int,
        PyObject *
    )
    object PyArray_Scalar(void *, cnp.PyArray_Descr *, PyObject *)
