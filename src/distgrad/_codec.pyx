"""The message codec: one value and a few header fields in, bytes out, and back.

``docs/wire-format.md`` is the contract; the tag and header tables here are compared with
it by a test. Invariants that the code below cites:

1. Nothing is allocated for a length before that length was checked against the bytes that
   are left and a limit. ``Reader.owed`` counts the elements that enclosing containers
   still wait for, so that nested containers cannot promise the same bytes twice.
2. What the encoder accepts, a decoder with the same limits accepts: both count depth,
   items, buffers and bytes in the same way.
3. A pointer in the memo is alive (the memo owns a reference), so equal pointers are one
   object. Objects with one reference cannot turn up twice and are not recorded.
4. Hooks run arbitrary code, so nothing borrowed from a container is used after a hook
   unless a reference is held.
"""

import dataclasses
import datetime
import enum
import re

import numpy as np

from distgrad.config import config
from distgrad.errors import DistgradError, ProtocolError, SerializationError

cimport cython
cimport numpy as cnp
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

cdef extern from "_crc32c.h":
    void crc32c_init() noexcept nogil
    uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil
    uint32_t crc32c_portable(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil

cdef extern from "float.h":
    int LDBL_MANT_DIG

# Borrowed pointers in, so that looking at an object does not change its reference count.
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

cnp.import_array()
crc32c_init()

cdef enum:
    VERSION = 1
    MUST_UNDERSTAND = 0xFF00    # flag bits that refuse a frame unless they are known
    CHECKED_NBYTES = 56         # bytes of the header under the crc
    ALIGNMENT = 64              # of arrays in the payload
    INLINE_ALIGNMENT = 16       # of arrays in the meta block
    TABLE_RESERVE = 128         # room for the buffer table before the value: 16 arrays
    RESERVE = HEADER_NBYTES + TABLE_RESERVE
    START_NBYTES = 1000         # first size of an encoder's block: within malloc's fast bins
    MEMO_START = 16
    DEPTH_CAP = 1000            # a level costs about 500 bytes of C stack
    MAX_DIMS = 64
    STRING_CACHE = 512
    BIGINT_NBYTES = 65536
    DESCRIBED = 0               # dtype code: a description follows
    BIG_ENDIAN = 0x80           # bit of the dtype code
    FORTRAN = 0x80              # bit of ndim
    SHARED = 0x20               # bit of a compound tag: a ref to it follows later

cdef enum:
    T_STR5 = 0x80
    T_NONE = 0xA0
    T_FALSE = 0xA1
    T_TRUE = 0xA2
    T_I64 = 0xA3
    T_BIGINT = 0xA4
    T_F64 = 0xA5
    T_COMPLEX = 0xA6
    T_STR = 0xA7
    T_BYTES = 0xA8
    T_ELLIPSIS = 0xA9
    T_RANGE = 0xAA
    T_SLICE = 0xAB
    T_SCALAR = 0xAC
    T_REF = 0xAD
    T_TUPLE = 0xC0
    T_LIST = 0xC1
    T_DICT = 0xC2
    T_SET = 0xC3
    T_FROZENSET = 0xC4
    T_ARRAY = 0xC5
    T_BUFFER = 0xC6
    T_TENSOR = 0xC7
    T_EXTENSION = 0xC8
    T_RECORD = 0xC9

TAGS = {
    "int7": 0x00, "str5": T_STR5, "none": T_NONE, "false": T_FALSE, "true": T_TRUE,
    "i64": T_I64, "bigint": T_BIGINT, "f64": T_F64, "complex": T_COMPLEX, "str": T_STR,
    "bytes": T_BYTES, "ellipsis": T_ELLIPSIS, "range": T_RANGE, "slice": T_SLICE,
    "scalar": T_SCALAR, "ref": T_REF, "tuple": T_TUPLE, "list": T_LIST, "dict": T_DICT,
    "set": T_SET, "frozenset": T_FROZENSET, "array": T_ARRAY, "buffer": T_BUFFER,
    "tensor": T_TENSOR, "extension": T_EXTENSION, "record": T_RECORD,
}

HEADER_FIELDS = (
    ("version", 0, 1), ("kind", 1, 1), ("flags", 2, 2), ("meta_nbytes", 4, 4),
    ("request_id", 8, 8), ("context_id", 16, 8), ("message_id", 24, 8), ("chain", 32, 8),
    ("deadline_us", 40, 4), ("num_buffers", 44, 2), ("reserved_a", 46, 2),
    ("payload_nbytes", 48, 8), ("crc", 56, 4), ("reserved_b", 60, 4),
)

DTYPES = {
    "described": DESCRIBED, "bool": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5,
    "uint8": 6, "uint16": 7, "uint32": 8, "uint64": 9, "float16": 10, "float32": 11,
    "float64": 12, "complex64": 13, "complex128": 14, "x87float": 15, "x87complex": 16,
    "quadfloat": 17, "quadcomplex": 18,
}


cdef struct Limits:
    int max_depth
    uint64_t max_meta_bytes
    uint64_t max_payload_bytes
    uint32_t max_items
    uint32_t max_buffers
    Py_ssize_t inline_array_bytes

cdef Limits limits

cdef object generic = np.generic
cdef uint8_t code_of_type[64]           # NumPy type number -> dtype code, 0: described
cdef PyObject *dtype_of_code[32]        # dtype code -> native dtype, or NULL
cdef PyObject *string_cache[STRING_CACHE]
cdef object tensor_type = None
cdef object tensor_unwrap = None
cdef object tensor_wrap = None
cdef dict codecs_by_type = {}           # class -> Extension or Record
cdef dict codecs_by_name = {}           # name on the wire -> the same


def _fill_dtype_tables():
    long_double, complex_long = {
        64: ("x87float", "x87complex"), 113: ("quadfloat", "quadcomplex"),
    }.get(LDBL_MANT_DIG, ("float64", "complex128"))
    names = {np.dtype(np.longdouble).num: long_double, np.dtype(np.clongdouble).num: complex_long}
    for char in "?bBhHiIlLqQefdgFDG":
        dtype = np.dtype(char)
        code = DTYPES[names.get(dtype.num, dtype.name)]
        code_of_type[dtype.num] = code
        if dtype_of_code[code] == NULL:
            Py_INCREF(dtype)
            dtype_of_code[code] = <PyObject *>dtype

_fill_dtype_tables()


def configure(
    *, max_depth=None, max_meta_bytes=None, max_payload_bytes=None, max_items=None,
    max_buffers=None, inline_array_bytes=None,
):
    """Change limits of this process; return those that were in force.

    ``configure(**configure(max_depth=8))`` changes nothing in the end. Arguments that are
    None stay. Frames in flight are not affected.

    Parameters
    ----------
    max_depth
        Deepest nesting of values, at most 1000.
    max_meta_bytes, max_payload_bytes
        Largest meta block (below 4 GiB) and payload.
    max_items
        Most elements of one container.
    max_buffers
        Most out-of-band arrays of one message, at most 65535.
    inline_array_bytes
        Arrays up to this size travel inside the meta block.
    """
    old = dict(limits)
    new = {name: value for name, value in dict(
        max_depth=max_depth, max_meta_bytes=max_meta_bytes, max_items=max_items,
        max_payload_bytes=max_payload_bytes, max_buffers=max_buffers,
        inline_array_bytes=inline_array_bytes,
    ).items() if value is not None}
    highest = dict(max_depth=DEPTH_CAP, max_meta_bytes=2**32 - 256, max_buffers=2**16 - 1,
                   max_payload_bytes=2**62, max_items=2**32 - 1, inline_array_bytes=2**31)
    for name, value in new.items():
        if not 0 <= value <= highest[name]:
            raise ValueError(f"cannot set {name} to {value}: expected 0 to {highest[name]}")
    global limits
    limits = old | new
    return old


# -- growing output -----------------------------------------------------------------------

# Where the encoder is: one a container that is being written, on the C stack.
cdef struct Step:
    Step *parent
    PyObject *container
    PyObject *key              # of a dict, or name of a field; NULL otherwise
    Py_ssize_t index           # of the element

cdef struct MemoEntry:
    PyObject *obj              # owned
    uint32_t offset            # of its tag

# Objects that may turn up again: a list that is searched, and a hash index once it is long.
cdef struct Memo:
    MemoEntry start[MEMO_START]
    MemoEntry *entries
    Py_ssize_t count
    Py_ssize_t capacity
    int32_t *index
    size_t mask

cdef struct Writer:
    uint8_t *start             # block: reserve for header and table, then the value
    uint8_t *cursor
    uint8_t *end
    PyObject *session          # borrowed from the caller of encode
    PyObject *arrays           # owned list of out-of-band arrays, NULL while there is none
    Py_ssize_t payload_nbytes
    Step *step
    int depth
    bint in_key                # inside a dict key or set element
    Memo memo


cdef inline size_t pad(size_t offset, size_t alignment) noexcept nogil:
    return (0 - offset) & (alignment - 1)


cdef inline size_t table_nbytes(size_t num_buffers) noexcept nogil:
    return (8 * num_buffers + INLINE_ALIGNMENT - 1) & ~<size_t>(INLINE_ALIGNMENT - 1)


cdef str path_of(Writer *w):
    """Name the value that is being written: ``args[1]['model'].lock``."""
    pieces = []
    cdef Step *step = w.step
    while step != NULL:
        container = <object>step.container
        if type(container) is dict:
            pieces.append(f"[{<object>step.key!r:.40}]" if step.key != NULL else ".keys()")
        elif isinstance(container, tuple) and hasattr(container, "_fields"):
            pieces.append("." + container._fields[<object>step.index])
        elif type(container) in (tuple, list):
            pieces.append(f"[{step.index}]")
        elif type(container) in (set, frozenset):
            pieces.append("{...}")
        elif step.key != NULL:
            pieces.append(f".{<object>step.key}")
        step = step.parent
    path = "".join(reversed(pieces))
    path = path[1:] if path.startswith(".") else "value" + path
    return path if len(path) <= 200 else f"{path[:100]} ... {path[len(path) - 90:]}"


cdef object refusal(Writer *w, str fact, str hint=None):
    return SerializationError(f"cannot send {path_of(w)}: {fact}", hint=hint)


cdef int grow(Writer *w, size_t nbytes) except -1:
    cdef size_t used = w.cursor - w.start
    cdef size_t capacity = w.end - w.start
    if used + nbytes > RESERVE + limits.max_meta_bytes:
        raise refusal(
            w, f"the message without its large arrays exceeds {limits.max_meta_bytes} bytes",
            "raise max_meta_bytes on all workers",
        )
    while capacity < used + nbytes:
        capacity *= 2
    block = <uint8_t *>realloc(w.start, capacity)
    if block == NULL:
        raise MemoryError
    w.start = block
    w.cursor = block + used
    w.end = block + capacity
    return 0


cdef inline int need(Writer *w, size_t nbytes) except -1:
    if <size_t>(w.end - w.cursor) < nbytes:
        return grow(w, nbytes)
    return 0


cdef inline int put_bytes(Writer *w, const void *data, size_t nbytes) except -1:
    need(w, nbytes)
    memcpy(w.cursor, data, nbytes)
    w.cursor += nbytes
    return 0


cdef inline int put_tag(Writer *w, uint8_t tag) except -1:
    need(w, 1)
    w.cursor[0] = tag
    w.cursor += 1
    return 0


cdef inline int put_sized(Writer *w, uint8_t tag, uint64_t size) except -1:
    """Write a tag and a u32; sizes beyond are refused by the limits of the callers."""
    cdef uint32_t short_size = <uint32_t>size
    need(w, 5)
    w.cursor[0] = tag
    memcpy(w.cursor + 1, &short_size, 4)
    w.cursor += 5
    return 0


cdef inline int put_word(Writer *w, uint8_t tag, const void *word) except -1:
    need(w, 9)
    w.cursor[0] = tag
    memcpy(w.cursor + 1, word, 8)
    w.cursor += 9
    return 0


# -- shared identity ----------------------------------------------------------------------

cdef inline size_t spread(PyObject *obj) noexcept:
    return ((<uintptr_t>obj >> 4) * <uint64_t>0x9E3779B97F4A7C15) >> 20


cdef MemoEntry *memo_find(Memo *memo, PyObject *obj) noexcept:
    cdef Py_ssize_t i
    cdef size_t slot
    if memo.index == NULL:
        for i in range(memo.count):
            if memo.entries[i].obj == obj:
                return &memo.entries[i]
        return NULL
    slot = spread(obj) & memo.mask
    while memo.index[slot] >= 0:
        if memo.entries[memo.index[slot]].obj == obj:
            return &memo.entries[memo.index[slot]]
        slot = (slot + 1) & memo.mask
    return NULL


cdef void memo_index(Memo *memo, Py_ssize_t i) noexcept:
    cdef size_t slot = spread(memo.entries[i].obj) & memo.mask
    while memo.index[slot] >= 0:
        slot = (slot + 1) & memo.mask
    memo.index[slot] = <int32_t>i


cdef int memo_grow(Memo *memo) except -1:
    cdef Py_ssize_t capacity = 2 * memo.capacity
    cdef Py_ssize_t i
    entries = <MemoEntry *>malloc(capacity * sizeof(MemoEntry))
    index = <int32_t *>malloc(2 * capacity * sizeof(int32_t))
    if entries == NULL or index == NULL:
        free(entries)
        free(index)
        raise MemoryError
    memcpy(entries, memo.entries, memo.count * sizeof(MemoEntry))
    if memo.entries != memo.start:
        free(memo.entries)
    free(memo.index)
    memo.entries, memo.capacity = entries, capacity
    memo.index, memo.mask = index, 2 * capacity - 1
    memset(index, 0xFF, 2 * capacity * sizeof(int32_t))
    for i in range(memo.count):
        memo_index(memo, i)
    return 0


cdef int memo_add(Memo *memo, PyObject *obj, uint32_t offset) except -1:
    if memo.count == memo.capacity:
        memo_grow(memo)
    increment(obj)
    memo.entries[memo.count].obj = obj
    memo.entries[memo.count].offset = offset
    memo.count += 1
    if memo.index != NULL:
        memo_index(memo, memo.count - 1)
    return 0


cdef void memo_clear(Memo *memo) noexcept:
    for i in range(memo.count):
        decrement(memo.entries[i].obj)
    if memo.entries != memo.start:
        free(memo.entries)
    free(memo.index)


cdef int recall(Writer *w, PyObject *obj, bint identity) except -1:
    """Write a ref and return 1 if `obj` was written before; otherwise remember it.

    Inside a key only objects with an identity of their own (`identity`) are referred to;
    tuples are written again, so that a receiver never hashes one object many times.
    """
    cdef MemoEntry *entry = memo_find(&w.memo, obj)
    cdef Step *step = w.step
    if entry == NULL:
        memo_add(&w.memo, obj, <uint32_t>(w.cursor - w.start - RESERVE))
        return 0
    while step != NULL:
        if step.container == obj:
            raise refusal(w, "it contains itself")
        step = step.parent
    if w.in_key and not identity:
        return 0
    w.start[RESERVE + entry.offset] |= SHARED
    put_sized(w, T_REF, entry.offset)
    return 1


# -- encoding values ----------------------------------------------------------------------

cdef int put_value(Writer *w, PyObject *obj) except -1:
    """Write any value: the exact types first, in the order of their frequency."""
    cdef PyTypeObject *cls = Py_TYPE(obj)
    cdef double number
    if cls == &PyUnicode_Type:
        return put_str(w, obj)
    if cls == &PyLong_Type:
        return put_int(w, obj)
    if obj == Py_None:
        return put_tag(w, T_NONE)
    if cls == &PyFloat_Type:
        number = PyFloat_AS_DOUBLE(obj)
        return put_word(w, T_F64, &number)
    if obj == Py_True or obj == Py_False:
        return put_tag(w, T_TRUE if obj == Py_True else T_FALSE)
    if (cls == &PyTuple_Type or cls == &PyArray_Type or cls == &PyDict_Type
            or cls == &PyList_Type or <PyObject *>cls == <PyObject *>tensor_type
            or cls == &PySet_Type or cls == &PyFrozenSet_Type):
        return put_compound(w, obj, cls, NULL)
    return put_rare(w, obj, cls)


cdef int put_rare(Writer *w, PyObject *obj, PyTypeObject *cls) except -1:
    cdef Py_complex number
    if cls == &PyBytes_Type:
        put_sized(w, T_BYTES, min(PyBytes_GET_SIZE(obj), 0xFFFFFFFF))
        return put_bytes(w, PyBytes_AS_STRING(obj), PyBytes_GET_SIZE(obj))
    codec = PyDict_GetItemWithError(<PyObject *>codecs_by_type, <PyObject *>cls)
    if codec != NULL:
        return put_compound(w, obj, cls, codec)
    if isinstance(<object>obj, generic):
        return put_scalar(w, <object>obj)
    if cls == &PyComplex_Type:
        number = PyComplex_AsCComplex(obj)
        put_word(w, T_COMPLEX, &number.real)
        return put_bytes(w, &number.imag, 8)
    if cls == &PySlice_Type or cls == &PyRange_Type:
        put_tag(w, T_SLICE if cls == &PySlice_Type else T_RANGE)
        return put_bounds(w, <object>obj)
    if obj == Py_Ellipsis:
        return put_tag(w, T_ELLIPSIS)
    if tensor_type is not None and isinstance(<object>obj, tensor_type):
        return put_compound(w, obj, <PyTypeObject *>tensor_type, NULL)
    raise refusal_of_type(w, <object>obj)


cdef object refusal_of_type(Writer *w, object obj):
    name = f"{type(obj).__module__}.{type(obj).__qualname__}"
    if isinstance(obj, np.ndarray):
        hint = "convert it with numpy.asarray"
    elif dataclasses.is_dataclass(obj) or isinstance(obj, enum.Enum | tuple):
        hint = "expose its class on both sides"
    else:
        hint = "send plain data, or register the type on both sides"
    return refusal(w, f"a value of type {name} has no form on the wire", hint)


cdef int put_int(Writer *w, PyObject *obj) except -1:
    cdef int overflow = 0
    cdef int64_t number = PyLong_AsLongLongAndOverflow(obj, &overflow)
    if overflow != 0:
        return put_bigint(w, <object>obj)
    if 0 <= number < 0x80:
        return put_tag(w, <uint8_t>number)
    return put_word(w, T_I64, &number)


cdef int put_bigint(Writer *w, object number) except -1:
    cdef Py_ssize_t nbytes = number.bit_length() // 8 + 1
    if nbytes > BIGINT_NBYTES:
        raise refusal(w, f"an int of {nbytes} bytes, {BIGINT_NBYTES} are allowed")
    cdef bytes digits = number.to_bytes(nbytes, "little", signed=True)
    put_sized(w, T_BIGINT, nbytes)
    return put_bytes(w, PyBytes_AS_STRING(<PyObject *>digits), nbytes)


cdef int put_str(Writer *w, PyObject *obj) except -1:
    cdef Py_ssize_t nbytes
    cdef const char *text = PyUnicode_AsUTF8AndSize(obj, &nbytes)
    cdef bytes encoded
    if text == NULL:  # a lone surrogate, as in undecodable file names
        PyErr_Clear()
        encoded = (<str>obj).encode("utf-8", "surrogatepass")
        text = PyBytes_AS_STRING(<PyObject *>encoded)
        nbytes = PyBytes_GET_SIZE(<PyObject *>encoded)
    if nbytes < 0x20:
        need(w, nbytes + 1)
        w.cursor[0] = <uint8_t>(T_STR5 | nbytes)
        memcpy(w.cursor + 1, text, nbytes)
        w.cursor += nbytes + 1
        return 0
    put_sized(w, T_STR, min(nbytes, 0xFFFFFFFF))
    return put_bytes(w, text, nbytes)


cdef int put_bounds(Writer *w, object bounds) except -1:
    for bound in (bounds.start, bounds.stop, bounds.step):
        put_value(w, <PyObject *>bound)
    return 0


cdef int put_compound(
    Writer *w, PyObject *obj, PyTypeObject *cls, PyObject *codec
) except -1:
    """Write what has parts, or an identity. Containers nobody else holds skip the memo."""
    cdef bint identity = codec != NULL and type(<object>codec) is Extension
    identity = identity or <PyObject *>cls == <PyObject *>tensor_type
    if Py_REFCNT(obj) > 1 and recall(w, obj, identity):
        return 0
    w.depth += 1
    if w.depth > limits.max_depth:
        raise refusal(w, f"it is nested deeper than {limits.max_depth} levels")
    if cls == &PyTuple_Type:
        put_tuple(w, <tuple>obj)
    elif cls == &PyArray_Type:
        put_array(w, <cnp.ndarray>obj)
    elif cls == &PyDict_Type:
        put_dict(w, <dict>obj)
    elif cls == &PyList_Type:
        put_list(w, <list>obj)
    elif cls == &PySet_Type:
        put_set(w, T_SET, <object>obj)
    elif cls == &PyFrozenSet_Type:
        put_set(w, T_FROZENSET, <object>obj)
    elif codec == NULL:
        put_tensor(w, <object>obj)
    elif identity:
        put_extension(w, <object>obj, <Extension>codec)
    else:
        put_record(w, <object>obj, <Record>codec)
    w.depth -= 1
    return 0


cdef inline int put_count(Writer *w, uint8_t tag, Py_ssize_t count) except -1:
    if count > limits.max_items:
        raise refusal(w, f"{count} elements, {limits.max_items} are allowed", "send an array instead")
    return put_sized(w, tag, count)


cdef inline void enter(Writer *w, Step *step, PyObject *container) noexcept:
    step.parent = w.step
    step.container = container
    step.key = NULL
    step.index = 0
    w.step = step


cdef int put_tuple(Writer *w, tuple items) except -1:
    cdef Step step
    cdef PyObject *borrowed = <PyObject *>items
    cdef Py_ssize_t count = PyTuple_GET_SIZE(borrowed)
    held = items  # invariant 4
    put_count(w, T_TUPLE, count)
    enter(w, &step, borrowed)
    for step.index in range(count):
        put_value(w, PyTuple_GET_ITEM(borrowed, step.index))
    w.step = step.parent
    return 0


cdef int put_list(Writer *w, list items) except -1:
    cdef Step step
    cdef PyObject *borrowed = <PyObject *>items
    cdef Py_ssize_t count = PyList_GET_SIZE(borrowed)
    held = items  # invariant 4
    put_count(w, T_LIST, count)
    enter(w, &step, borrowed)
    while step.index < PyList_GET_SIZE(borrowed):
        put_value(w, PyList_GET_ITEM(borrowed, step.index))
        step.index += 1
    w.step = step.parent
    if step.index != count:
        raise refusal(w, "the list changed while it was written")
    return 0


cdef int put_dict(Writer *w, dict items) except -1:
    cdef Step step
    cdef PyObject *borrowed = <PyObject *>items
    cdef PyObject *key = NULL
    cdef PyObject *value = NULL
    cdef Py_ssize_t count = PyDict_Size(borrowed)
    cdef Py_ssize_t position = 0
    held = items  # invariant 4
    put_count(w, T_DICT, count)
    enter(w, &step, borrowed)
    while PyDict_Next(borrowed, &position, &key, &value) and step.index < count:
        step.index += 1
        put_entry(w, &step, key, value)
    w.step = step.parent
    if step.index != count or PyDict_Size(borrowed) != count:
        raise refusal(w, "the dict changed while it was written")
    return 0


cdef int put_entry(Writer *w, Step *step, PyObject *key, PyObject *value) except -1:
    if Py_TYPE(key) == &PyUnicode_Type:
        put_str(w, key)
    else:
        held_value = <object>value  # invariant 4: hooks may run for the key
        put_key(w, key)
    held_key = <object>key
    step.key = key
    put_value(w, value)
    step.key = NULL
    return 0


cdef int put_key(Writer *w, PyObject *key) except -1:
    cdef bint in_key = w.in_key
    held = <object>key  # invariant 4
    w.in_key = True
    put_value(w, key)
    w.in_key = in_key
    return 0


cdef int put_set(Writer *w, uint8_t tag, object items) except -1:
    cdef Step step
    put_count(w, tag, len(items))
    enter(w, &step, <PyObject *>items)
    for item in items:
        put_key(w, <PyObject *>item)
    w.step = step.parent
    return 0


cdef int put_tensor(Writer *w, object tensor) except -1:
    """Write flags, slot and the array that the unwrap hook gives."""
    cdef Step step
    cdef int32_t slot
    array, requires_grad, index = tensor_unwrap(tensor, <object>w.session)
    slot = index
    put_tag(w, T_TENSOR)
    put_tag(w, 1 if requires_grad else 0)
    put_bytes(w, &slot, 4)
    if type(array) is not np.ndarray:
        raise refusal_of_type(w, array)
    enter(w, &step, <PyObject *>tensor)
    put_value(w, <PyObject *>array)
    w.step = step.parent
    return 0


cdef int put_extension(Writer *w, object obj, Extension codec) except -1:
    cdef Step step
    put_tag(w, T_EXTENSION)
    put_str(w, <PyObject *>codec.name)
    enter(w, &step, <PyObject *>obj)
    value = codec.encode(obj, <object>w.session)
    put_value(w, <PyObject *>value)
    w.step = step.parent
    return 0


cdef int put_record(Writer *w, object obj, Record codec) except -1:
    cdef Step step
    cdef tuple values
    put_sized(w, T_RECORD, len(codec.fields))
    put_str(w, <PyObject *>codec.name)
    try:
        values = codec.values(obj)
    except AttributeError as error:
        raise refusal(w, f"the field {error.name!r} is not set")
    enter(w, &step, <PyObject *>obj)
    for step.index in range(len(values)):
        step.key = PyTuple_GET_ITEM(<PyObject *>codec.fields, step.index)
        put_value(w, PyTuple_GET_ITEM(<PyObject *>values, step.index))
    w.step = step.parent
    return 0


# -- encoding arrays ----------------------------------------------------------------------

cdef uint8_t dtype_code(cnp.dtype dtype) noexcept:
    """Return the code of a plain dtype, or DESCRIBED."""
    cdef int number = dtype.type_num
    if not 0 <= number < 64 or code_of_type[number] == DESCRIBED:
        return DESCRIBED
    return code_of_type[number] | (BIG_ENDIAN if dtype.byteorder == c'>' else 0)


cdef int put_dtype(Writer *w, cnp.dtype dtype, uint8_t code) except -1:
    """Write what `code` leaves open about a dtype."""
    if code != DESCRIBED:
        return 0
    description = describe(dtype)
    if description is None:
        raise refusal(w, f"the dtype {dtype} has no form on the wire",
               "view or convert it as numbers, strings or records of them")
    return put_value(w, <PyObject *>description)


cdef int put_array(Writer *w, cnp.ndarray array) except -1:
    """Write shape and dtype, and the items inside the meta block or in the payload."""
    cdef uint8_t code = dtype_code(array.descr)
    cdef int ndim = cnp.PyArray_NDIM(array)
    cdef Py_ssize_t nbytes = cnp.PyArray_NBYTES(array)
    cdef bint inside = nbytes <= limits.inline_array_bytes
    cdef uint8_t order = 0
    cdef size_t gap
    held = array  # invariant 4
    if cnp.PyArray_ITEMSIZE(array) == 0 and cnp.PyArray_SIZE(array) > limits.max_items:
        raise refusal(w, f"{cnp.PyArray_SIZE(array)} items without bytes")
    if not inside and nbytes > <int64_t>limits.max_payload_bytes - w.payload_nbytes:
        raise refusal(w, f"the arrays exceed {limits.max_payload_bytes} bytes",
               "raise max_payload_bytes on all workers")
    if not cnp.PyArray_IS_C_CONTIGUOUS(array):
        if cnp.PyArray_IS_F_CONTIGUOUS(array):
            order = FORTRAN
        else:
            array = <cnp.ndarray>cnp.PyArray_NewCopy(array, cnp.NPY_CORDER)
    need(w, 3 + 8 * ndim)
    w.cursor[0] = T_ARRAY if inside else T_BUFFER
    w.cursor[1] = code
    w.cursor[2] = <uint8_t>(ndim | order)
    memcpy(w.cursor + 3, cnp.PyArray_DIMS(array), 8 * ndim)
    w.cursor += 3 + 8 * ndim
    put_dtype(w, array.descr, code)
    if not inside:
        return put_buffer(w, array, nbytes)
    gap = pad(w.cursor - w.start - RESERVE, INLINE_ALIGNMENT)
    need(w, gap + nbytes)
    memset(w.cursor, 0, gap)
    memcpy(w.cursor + gap, cnp.PyArray_DATA(array), nbytes)
    w.cursor += gap + nbytes
    return 0


cdef int put_buffer(Writer *w, cnp.ndarray array, cnp.npy_intp nbytes) except -1:
    """Queue the items of a contiguous array as the next buffer of the payload."""
    cdef list arrays
    if w.arrays == NULL:
        arrays = []
        Py_INCREF(arrays)
        w.arrays = <PyObject *>arrays
    arrays = <list>w.arrays
    if len(arrays) >= limits.max_buffers:
        raise refusal(w, f"more than {limits.max_buffers} large arrays in one message",
               "join them, or raise max_buffers on all workers")
    flat = cnp.PyArray_SimpleNewFromData(1, &nbytes, cnp.NPY_UINT8, cnp.PyArray_DATA(array))
    cnp.set_array_base(flat, array)
    arrays.append(flat)
    w.payload_nbytes += pad(w.payload_nbytes, ALIGNMENT) + nbytes
    return 0


cdef int put_scalar(Writer *w, object scalar) except -1:
    cdef cnp.ndarray array = np.asarray(scalar)
    cdef uint8_t code = dtype_code(array.descr)
    if type(array[()]) is not type(scalar):
        raise refusal_of_type(w, scalar)
    put_tag(w, T_SCALAR)
    put_tag(w, code)
    put_dtype(w, array.descr, code)
    return put_bytes(w, cnp.PyArray_DATA(array), cnp.PyArray_NBYTES(array))


def describe(dtype):
    """Return a dtype as plain values, or None if it has no form on the wire."""
    if dtype.hasobject or dtype.num >= 256:
        return None
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        formats = tuple([describe(field[0]) for field in fields])
        offsets = tuple([field[1] for field in fields])
        if None in formats or any([len(field) > 2 for field in fields]):  # 3: with a title
            return None
        return dtype.names, formats, offsets, dtype.itemsize, dtype.isalignedstruct
    if dtype.subdtype is not None:
        base = describe(dtype.base)
        return None if base is None else (base, dtype.shape)
    return dtype.str


PLAIN_DTYPE = re.compile(r"[<>|][?biufcSUVMm]\d{1,9}(\[\d{0,9}[A-Za-z]{1,2}\])?")


def undescribe(description):
    """Build the dtype that `describe` described; never a dtype of objects."""
    if type(description) is str and PLAIN_DTYPE.fullmatch(description):
        return np.dtype(description)
    if type(description) is tuple and len(description) == 2:
        base, shape = description
        return np.dtype((undescribe(base), shape))
    if type(description) is tuple and len(description) == 5:
        names, formats, offsets, itemsize, aligned = description
        return np.dtype(
            {"names": list(names), "formats": [undescribe(item) for item in formats],
             "offsets": list(offsets), "itemsize": itemsize}, align=aligned is True,
        )
    raise ProtocolError("cannot decode message: a dtype is not described by plain values")


# -- messages that leave ------------------------------------------------------------------

@cython.final
@cython.freelist(16)
@cython.no_gc  # holds flat arrays of plain items only: no cycle can pass through it
cdef class Outgoing:
    """An encoded message; made by `encode`.

    It exports header and meta block as a read-only buffer, and keeps its arrays alive.
    Arrays are not copied: who changes one before the message has left changes the message.
    The header fields (`kind`, `request_id`, ...) may be set until `seal`.
    """

    def __init__(self):
        raise TypeError("cannot create an Outgoing: use encode()")

    def __dealloc__(self):
        free(self.block)

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.seal()
        PyBuffer_FillInfo(view, self, self.head, self.head_nbytes, 1, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass

    @property
    def nbytes(self):
        """Size of the whole frame in bytes."""
        return self.head_nbytes + self.payload_nbytes

    cpdef seal(self):
        """Write the header and its crc. Later calls do nothing."""
        cdef FrameHeader header
        if self.sealed:
            return
        memset(&header, 0, sizeof(header))
        header.version = VERSION
        header.kind = self.kind
        header.meta_nbytes = <uint32_t>(self.head_nbytes - HEADER_NBYTES)
        header.request_id = self.request_id
        header.context_id = self.context_id
        header.message_id = self.message_id
        header.chain = self.chain
        header.deadline_us = <uint32_t>min(self.deadline_us, 0xFFFFFFFF)
        header.num_buffers = <uint16_t>(len(self.arrays) if self.arrays is not None else 0)
        header.payload_nbytes = self.payload_nbytes
        memcpy(self.head, &header, HEADER_NBYTES)
        header.crc = frame_crc(self.head, self.head + HEADER_NBYTES, header.meta_nbytes)
        memcpy(self.head, &header, HEADER_NBYTES)
        self.sealed = True

    def parts(self):
        """Return what to send, in order; seals.

        Returns
        -------
        list
            This object for header and meta block, then the arrays as flat uint8 arrays
            with bytes of zeros between them.
        """
        cdef size_t used = 0
        self.seal()
        parts = [self]
        for array in self.arrays or ():
            if pad(used, ALIGNMENT):
                parts.append(ZEROS[:pad(used, ALIGNMENT)])
                used += pad(used, ALIGNMENT)
            parts.append(array)
            used += <size_t>array.nbytes
        return parts

cdef bytes ZEROS = bytes(ALIGNMENT)


cdef uint32_t frame_crc(const uint8_t *header, const uint8_t *meta, size_t nbytes) noexcept:
    return crc32c(crc32c(0, header, CHECKED_NBYTES), meta, nbytes)


cdef int write_table(Outgoing message, Writer *w) except -1:
    """Put the buffer table before the value and hand the block over to the message."""
    cdef size_t count = len(<list>w.arrays) if w.arrays != NULL else 0
    cdef size_t table = table_nbytes(count)
    cdef size_t value_nbytes = w.cursor - w.start - RESERVE
    cdef size_t value_at = RESERVE
    cdef uint64_t nbytes
    cdef size_t i
    if value_nbytes + table > limits.max_meta_bytes or table > TABLE_RESERVE:
        grow(w, table)
        value_at = HEADER_NBYTES + table
        memmove(w.start + value_at, w.start + RESERVE, value_nbytes)
    message.head = w.start + value_at - table - HEADER_NBYTES
    message.head_nbytes = HEADER_NBYTES + table + value_nbytes
    memset(message.head + HEADER_NBYTES, 0, table)
    for i in range(count):
        nbytes = (<list>w.arrays)[i].nbytes
        memcpy(message.head + HEADER_NBYTES + 8 * <size_t>i, &nbytes, 8)
    message.payload_nbytes = w.payload_nbytes
    message.arrays = <list>w.arrays if count else None
    message.block = w.start
    w.start = NULL
    return 0


cdef Outgoing encode_message(uint8_t kind, object value, object session):
    cdef Writer w
    cdef Outgoing message
    w.start = <uint8_t *>malloc(START_NBYTES)
    if w.start == NULL:
        raise MemoryError
    w.cursor = w.start + RESERVE
    w.end = w.start + START_NBYTES
    w.session = <PyObject *>session
    w.arrays = NULL
    w.payload_nbytes = 0
    w.step = NULL
    w.depth = 0
    w.in_key = False
    w.memo.entries = w.memo.start
    w.memo.count, w.memo.capacity, w.memo.index = 0, MEMO_START, NULL
    try:
        if type(value) is tuple or not isinstance(value, tuple) or type(value) in codecs_by_type:
            put_value(&w, <PyObject *>value)
        else:
            w.depth = 1
            put_tuple(&w, <tuple>value)
        message = Outgoing.__new__(Outgoing)
        message.kind = kind
        write_table(message, &w)
        return message
    finally:
        memo_clear(&w.memo)
        Py_XDECREF(w.arrays)
        free(w.start)


def encode(
    uint8_t kind, value, session=None, *, uint64_t request_id=0, uint64_t chain=0,
    uint64_t deadline_us=0, uint64_t context_id=0, uint64_t message_id=0,
):
    """Encode one value as a message.

    Parameters
    ----------
    kind
        Code of the message kind, 1 to 255.
    value
        What to send. A named tuple at the top counts as a plain tuple; its field names
        appear in errors.
    session
        Handed to the hooks of tensors and registered types.
    request_id, chain, context_id, message_id
        Header fields; 0 means none.
    deadline_us
        What is left of the deadline in µs, 0 for none; saturates at 71 minutes.

    Raises
    ------
    SerializationError
        Some part of the value cannot be sent, contains itself, or exceeds a limit; the
        message names the path to it.
    """
    cdef Outgoing message = encode_message(kind, value, session)
    message.request_id = request_id
    message.chain = chain
    message.deadline_us = deadline_us
    message.context_id = context_id
    message.message_id = message_id
    return message


# -- frames that arrive -------------------------------------------------------------------

@cython.final
@cython.freelist(16)
@cython.no_gc  # holds bytes and a plain buffer: no cycle can pass through it
cdef class Frame:
    """A received message, checked up to its meta block; made by `parse` or a transport."""

    def __init__(self):
        raise TypeError("cannot create a Frame: use parse()")

    @property
    def nbytes(self):
        """Bytes of the whole frame on the wire."""
        return HEADER_NBYTES + len(self.meta) + self.payload_nbytes


cdef int read_header(const unsigned char *data, FrameHeader *out) except -1:
    memcpy(out, data, HEADER_NBYTES)
    if out.version != VERSION:
        raise malformed(f"wire version {out.version}, expected {VERSION}")
    if out.flags & MUST_UNDERSTAND:
        raise malformed(f"unknown flags {out.flags:#06x}")
    if out.kind == 0 or out.reserved_a != 0 or out.reserved_b != 0:
        raise malformed("reserved fields are in use")
    if out.meta_nbytes > limits.max_meta_bytes:
        raise malformed(f"{out.meta_nbytes} bytes of meta, {limits.max_meta_bytes} are allowed")
    if out.payload_nbytes > limits.max_payload_bytes:
        raise malformed(f"{out.payload_nbytes} bytes of arrays, {limits.max_payload_bytes} are allowed")
    if out.num_buffers > limits.max_buffers:
        raise malformed(f"{out.num_buffers} arrays, {limits.max_buffers} are allowed")
    if out.meta_nbytes <= table_nbytes(out.num_buffers):
        raise malformed("the meta block has no room for a value")
    if (out.num_buffers == 0) != (out.payload_nbytes == 0):
        raise malformed("payload and number of arrays contradict each other")
    return 0


cdef Frame make_frame(const FrameHeader *header, bytes meta, object payload):
    cdef Frame frame
    cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(<PyObject *>meta)
    if PyBytes_GET_SIZE(<PyObject *>meta) != header.meta_nbytes:
        raise malformed("the meta block has another length than the header says")
    if frame_crc(<const uint8_t *>header, data, header.meta_nbytes) != header.crc:
        raise malformed("the checksum of header and meta block is wrong")
    if header.payload_nbytes and payload is None:
        raise malformed("the payload is missing")
    frame = Frame.__new__(Frame)
    frame.kind = header.kind
    frame.flags = header.flags
    frame.request_id = header.request_id
    frame.context_id = header.context_id
    frame.message_id = header.message_id
    frame.chain = header.chain
    frame.deadline_us = header.deadline_us
    frame.meta = meta
    frame.payload = payload if header.payload_nbytes else None
    frame.num_buffers = header.num_buffers
    frame.payload_nbytes = header.payload_nbytes
    return frame


def parse(data, payload=None):
    """Check a whole frame in memory and return it as a `Frame`.

    Parameters
    ----------
    data : bytes-like
        Header and meta block, and the payload if `payload` is None; that one is copied.
    payload : writable bytes-like, 64-byte aligned, optional
        The payload; decoded arrays are views of it.

    Raises
    ------
    ProtocolError
        The bytes do not follow the wire format.
    """
    cdef FrameHeader header
    cdef Py_buffer view
    cdef uint64_t expected
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len < HEADER_NBYTES:
            raise malformed("the header is truncated")
        read_header(<const unsigned char *>view.buf, &header)
        expected = <uint64_t>HEADER_NBYTES + header.meta_nbytes
        if payload is None:
            expected += header.payload_nbytes
        if <uint64_t>view.len != expected:
            raise malformed(f"a frame of {expected} bytes has {view.len}")
        meta = PyBytes_FromStringAndSize(<char *>view.buf + HEADER_NBYTES, header.meta_nbytes)
        if payload is None and header.payload_nbytes:
            payload = aligned_copy(
                <char *>view.buf + HEADER_NBYTES + header.meta_nbytes, header.payload_nbytes
            )
        return make_frame(&header, meta, payload)
    finally:
        PyBuffer_Release(&view)


cdef cnp.ndarray aligned_copy(const char *data, Py_ssize_t nbytes):
    cdef cnp.ndarray block = np.empty(nbytes + ALIGNMENT, np.uint8)
    cdef size_t shift = pad(<size_t>cnp.PyArray_DATA(block), ALIGNMENT)
    cdef cnp.ndarray copy = block[shift:shift + nbytes]
    memcpy(cnp.PyArray_DATA(copy), data, nbytes)
    return copy


cdef object malformed(str fact):
    return ProtocolError(f"cannot decode message: {fact}")


# -- decoding values ----------------------------------------------------------------------

cdef struct Reader:
    const uint8_t *meta        # start of the meta block: the buffer table
    const uint8_t *value       # start of the value
    const uint8_t *cursor
    const uint8_t *end
    PyObject *session          # borrowed from the caller of decode
    PyObject *shared           # owned dict, offset -> finished object; NULL while empty
    Py_ssize_t owed            # elements that enclosing containers still wait for
    int depth
    bint in_key
    uint8_t *payload
    PyObject *payload_view     # borrowed memoryview that keeps the payload alive
    uint64_t payload_nbytes
    uint64_t payload_used
    int num_buffers
    int buffers_used


cdef inline int require(Reader *r, uint64_t nbytes) except -1:
    if <uint64_t>(r.end - r.cursor) < nbytes:
        raise malformed("it is truncated")
    return 0


cdef inline uint32_t read_u32(Reader *r) except? 0xFFFFFFFF:
    cdef uint32_t number
    require(r, 4)
    memcpy(&number, r.cursor, 4)
    r.cursor += 4
    return number


cdef inline uint8_t read_u8(Reader *r) except? 0xFF:
    require(r, 1)
    r.cursor += 1
    return (r.cursor - 1)[0]


cdef object read_value(Reader *r):
    """Read any value: the tag says which."""
    cdef uint8_t tag = read_u8(r)
    cdef int64_t number
    cdef double real
    if tag < T_STR5:
        return PyLong_FromLongLong(tag)
    if tag < T_NONE:
        return read_short_str(r, tag & 0x1F)
    if tag >= T_TUPLE:
        return read_compound(r, tag)
    if tag == T_NONE:
        return None
    if tag == T_FALSE:
        return False
    if tag == T_TRUE:
        return True
    if tag == T_I64:
        require(r, 8)
        memcpy(&number, r.cursor, 8)
        r.cursor += 8
        return PyLong_FromLongLong(number)
    if tag == T_F64:
        require(r, 8)
        memcpy(&real, r.cursor, 8)
        r.cursor += 8
        return PyFloat_FromDouble(real)
    if tag == T_STR:
        return read_text(r, read_u32(r))
    return read_rare(r, tag)


cdef object read_rare(Reader *r, uint8_t tag):
    cdef double parts[2]
    if tag == T_BYTES:
        return read_bytes(r)
    if tag == T_REF:
        return read_ref(r)
    if tag == T_SCALAR:
        return read_scalar(r)
    if tag == T_BIGINT:
        return int.from_bytes(read_bytes(r), "little", signed=True)
    if tag == T_COMPLEX:
        require(r, 16)
        memcpy(parts, r.cursor, 16)
        r.cursor += 16
        return PyComplex_FromDoubles(parts[0], parts[1])
    if tag == T_ELLIPSIS:
        return ...
    if tag == T_SLICE or tag == T_RANGE:
        return read_bounds(r, tag == T_RANGE)
    raise malformed(f"unknown tag {tag:#04x}")


cdef object read_compound(Reader *r, uint8_t tag):
    cdef uint32_t offset = <uint32_t>(r.cursor - 1 - r.value)
    cdef uint8_t kind = tag & ~SHARED
    r.depth += 1
    if r.depth > limits.max_depth:
        raise malformed(f"it is nested deeper than {limits.max_depth} levels")
    if kind == T_TUPLE:
        result = read_tuple(r)
    elif kind == T_ARRAY:
        result = read_array(r, True)
    elif kind == T_DICT:
        result = read_dict(r)
    elif kind == T_LIST:
        result = read_list(r)
    elif kind == T_TENSOR:
        result = read_tensor(r)
    elif kind == T_BUFFER:
        result = read_array(r, False)
    elif kind == T_SET:
        result = read_set(r)
    elif kind == T_FROZENSET:
        result = frozenset(read_set(r))
    elif kind == T_EXTENSION:
        result = read_extension(r)
    elif kind == T_RECORD:
        result = read_record(r)
    else:
        raise malformed(f"unknown tag {tag:#04x}")
    r.depth -= 1
    if tag & SHARED:
        share(r, offset, result)
    return result


cdef int share(Reader *r, uint32_t offset, object value) except -1:
    cdef dict shared
    if r.shared == NULL:
        shared = {}
        Py_INCREF(shared)
        r.shared = <PyObject *>shared
    (<dict>r.shared)[offset] = value
    return 0


cdef object read_ref(Reader *r):
    cdef uint32_t offset = read_u32(r)
    cdef uint8_t kind
    value = (<dict>r.shared).get(offset) if r.shared != NULL else None
    if value is None:
        raise malformed(f"a reference to offset {offset}, where no shared value ends before")
    kind = r.value[offset] & ~SHARED
    if r.in_key and kind != T_TENSOR and kind != T_EXTENSION:
        raise malformed("a reference to a value without identity inside a key")
    return value


cdef inline size_t text_slot(const uint8_t *text, Py_ssize_t nbytes) noexcept:
    """Hash up to 31 bytes by at most four overlapping words."""
    cdef uint64_t words[4]
    memset(words, 0, sizeof(words))
    if nbytes >= 16:
        memcpy(words, text, 16)
        memcpy(words + 2, text + nbytes - 16, 16)
    elif nbytes >= 8:
        memcpy(words, text, 8)
        memcpy(words + 1, text + nbytes - 8, 8)
    else:
        memcpy(words, text, nbytes)
    words[0] = (words[0] ^ <uint64_t>nbytes) * <uint64_t>0x9E3779B97F4A7C15
    words[0] ^= words[1] * <uint64_t>0xC2B2AE3D27D4EB4F ^ (words[0] >> 29)
    words[0] += (words[2] * <uint64_t>0x165667B19E3779F9) ^ words[3]
    return (words[0] * <uint64_t>0x9E3779B97F4A7C15) >> 55


cdef object read_short_str(Reader *r, Py_ssize_t nbytes):
    """Read a short string, mostly a name that came before, from the cache."""
    cdef size_t slot
    cdef PyObject *known
    require(r, nbytes)
    slot = text_slot(r.cursor, nbytes)
    known = string_cache[slot]
    if (known != NULL and PyUnicode_GET_LENGTH(known) == nbytes
            and memcmp(PyUnicode_DATA(known), r.cursor, nbytes) == 0):
        r.cursor += nbytes
        return <object>known
    text = read_text(r, nbytes)
    if PyUnicode_IS_COMPACT_ASCII(<PyObject *>text):
        Py_INCREF(text)
        string_cache[slot] = <PyObject *>text
        Py_XDECREF(known)
    return text


cdef object read_text(Reader *r, uint64_t nbytes):
    require(r, nbytes)
    text = PyUnicode_DecodeUTF8(<const char *>r.cursor, <Py_ssize_t>nbytes, "surrogatepass")
    r.cursor += nbytes
    return text


cdef bytes read_bytes(Reader *r):
    cdef uint32_t nbytes = read_u32(r)
    require(r, nbytes)
    data = PyBytes_FromStringAndSize(<const char *>r.cursor, nbytes)
    r.cursor += nbytes
    return data


cdef object read_bounds(Reader *r, bint is_range):
    start = read_value(r)
    stop = read_value(r)
    step = read_value(r)
    if not is_range:
        return slice(start, stop, step)
    if not type(start) is type(stop) is type(step) is int:
        raise malformed("a range without integer bounds")
    return range(start, stop, step)


cdef inline Py_ssize_t read_count(Reader *r, int values_each) except -1:
    """Read a number of elements and promise their bytes to the container (invariant 1)."""
    cdef Py_ssize_t count = read_u32(r)
    if count > limits.max_items:
        raise malformed(f"{count} elements, {limits.max_items} are allowed")
    if count * values_each > r.end - r.cursor - r.owed:
        raise malformed("it is truncated")
    r.owed += count * values_each
    return count


cdef object read_tuple(Reader *r):
    cdef Py_ssize_t count = read_count(r, 1)
    items = PyTuple_New(count)
    for i in range(count):
        r.owed -= 1
        item = read_value(r)
        Py_INCREF(item)
        PyTuple_SET_ITEM(items, i, item)
    return items


cdef object read_list(Reader *r):
    cdef Py_ssize_t count = read_count(r, 1)
    items = PyList_New(count)
    for i in range(count):
        r.owed -= 1
        item = read_value(r)
        Py_INCREF(item)
        PyList_SET_ITEM(items, i, item)
    return items


cdef object read_dict(Reader *r):
    cdef Py_ssize_t count = read_count(r, 2)
    cdef dict items = {}
    for _ in range(count):
        r.owed -= 2
        key = read_key(r)
        value = read_value(r)
        PyDict_SetItem(items, key, value)
    if len(items) != count:
        raise malformed("a dict has a key twice")
    return items


cdef object read_set(Reader *r):
    cdef Py_ssize_t count = read_count(r, 1)
    cdef set items = set()
    for _ in range(count):
        r.owed -= 1
        item = read_key(r)
        PySet_Add(items, item)
    if len(items) != count:
        raise malformed("a set has an element twice")
    return items


cdef inline object read_key(Reader *r):
    cdef bint in_key = r.in_key
    r.in_key = True
    key = read_value(r)
    r.in_key = in_key
    return key


cdef object read_tensor(Reader *r):
    cdef uint8_t flags
    cdef int32_t slot
    require(r, 5)
    flags = r.cursor[0]
    memcpy(&slot, r.cursor + 1, 4)
    r.cursor += 5
    if flags > 1 or tensor_wrap is None:
        raise malformed("a tensor of an unknown form")
    array = read_value(r)
    if type(array) is not np.ndarray:
        raise malformed("a tensor without an array")
    return tensor_wrap(array, flags == 1, slot, <object>r.session)


cdef object read_extension(Reader *r):
    codec = codecs_by_name.get(read_value(r))
    if type(codec) is not Extension:
        raise malformed("a value of a type that is not registered here")
    value = read_value(r)
    return (<Extension>codec).decode(value, <object>r.session)


cdef object read_record(Reader *r):
    cdef Py_ssize_t count = read_count(r, 1)
    codec = codecs_by_name.get(read_value(r))
    if not isinstance(codec, Record):
        raise malformed("a record of a class that is not exposed here")
    if count > len((<Record>codec).fields):
        raise malformed(f"the class {(<Record>codec).name!r} has fewer fields here")
    values = []
    for _ in range(count):
        r.owed -= 1
        values.append(read_value(r))
    return (<Record>codec).build(values)


# -- decoding arrays ----------------------------------------------------------------------

cdef object read_dtype(Reader *r, uint8_t code):
    """Turn a dtype code, or the description that follows, into a dtype."""
    cdef uint8_t plain = code & ~BIG_ENDIAN
    if code == DESCRIBED:
        return undescribe(read_value(r))
    if plain >= 32 or dtype_of_code[plain] == NULL:
        raise malformed(f"unknown dtype code {code:#04x}")
    dtype = <object>dtype_of_code[plain]
    return dtype.newbyteorder(">") if code & BIG_ENDIAN else dtype


cdef Py_ssize_t read_shape(Reader *r, int ndim, cnp.npy_intp *dims) except -1:
    """Read the dims; return their product, a zero counting as one, up to 2**62."""
    cdef Py_ssize_t size = 1
    require(r, 8 * ndim)
    memcpy(dims, r.cursor, 8 * ndim)
    r.cursor += 8 * ndim
    for i in range(ndim):
        if dims[i] < 0 or (dims[i] > 1 and size > (<Py_ssize_t>1 << 62) // dims[i]):
            raise malformed("the shape of an array overflows")
        if dims[i] > 1:
            size *= dims[i]
    return size


cdef Py_ssize_t array_nbytes(
    Py_ssize_t size, Py_ssize_t itemsize, int ndim, const cnp.npy_intp *dims
) except -1:
    if itemsize > 1 and size > (<Py_ssize_t>1 << 62) // itemsize:
        raise malformed("the size of an array overflows")
    for i in range(ndim):
        if dims[i] == 0:
            return 0
    if itemsize == 0 and size > limits.max_items:
        raise malformed(f"{size} items without bytes")
    return size * itemsize


cdef object read_array(Reader *r, bint inside):
    """Read an array; nothing is allocated before its size was compared with the bytes."""
    cdef cnp.npy_intp dims[MAX_DIMS]
    cdef uint8_t code = read_u8(r)
    cdef uint8_t order = read_u8(r)
    cdef int ndim = order & ~FORTRAN
    cdef int flags
    cdef Py_ssize_t size, nbytes
    cdef const uint8_t *data
    if ndim > MAX_DIMS:
        raise malformed(f"an array of {ndim} dimensions")
    size = read_shape(r, ndim, dims)
    dtype = read_dtype(r, code)
    if dtype.subdtype is not None:
        raise malformed("an array of arrays")
    nbytes = array_nbytes(size, (<cnp.dtype>dtype).itemsize, ndim, dims)
    flags = cnp.NPY_ARRAY_FARRAY if order & FORTRAN else cnp.NPY_ARRAY_CARRAY
    if not inside:
        return view_buffer(r, dtype, ndim, dims, nbytes, flags)
    data = inline_data(r, nbytes)
    Py_INCREF(dtype)
    array = PyArray_NewFromDescr(
        &PyArray_Type, <cnp.PyArray_Descr *>dtype, ndim, dims, NULL, NULL, order & FORTRAN, NULL
    )
    memcpy(cnp.PyArray_DATA(<cnp.ndarray>array), data, nbytes)
    return array


cdef const uint8_t *inline_data(Reader *r, Py_ssize_t nbytes) except NULL:
    cdef size_t gap = pad(r.cursor - r.value, INLINE_ALIGNMENT)
    cdef const uint8_t *data
    require(r, gap + nbytes)
    if gap and memcmp(r.cursor, PyBytes_AS_STRING(<PyObject *>ZEROS), gap) != 0:
        raise malformed("padding is not zero")
    data = r.cursor + gap
    r.cursor = data + nbytes
    return data


cdef object view_buffer(
    Reader *r, object dtype, int ndim, cnp.npy_intp *dims, Py_ssize_t nbytes, int flags
):
    """Return an array over the next buffer of the payload."""
    cdef uint64_t length = 0
    cdef size_t gap = pad(r.payload_used, ALIGNMENT)
    cdef uint8_t *data = r.payload + r.payload_used
    if r.buffers_used == r.num_buffers:
        raise malformed("more arrays than buffers")
    memcpy(&length, r.meta + 8 * r.buffers_used, 8)
    if length != <uint64_t>nbytes or gap + length > r.payload_nbytes - r.payload_used:
        raise malformed("an array and its buffer differ in size")
    if gap and memcmp(data, PyBytes_AS_STRING(<PyObject *>ZEROS), gap) != 0:
        raise malformed("padding is not zero")
    r.buffers_used += 1
    r.payload_used += gap + length
    Py_INCREF(dtype)
    array = PyArray_NewFromDescr(
        &PyArray_Type, <cnp.PyArray_Descr *>dtype, ndim, dims, NULL, data + gap, flags, NULL
    )
    cnp.set_array_base(<cnp.ndarray>array, <object>r.payload_view)
    return array


cdef object read_scalar(Reader *r):
    cdef cnp.dtype dtype = read_dtype(r, read_u8(r))
    cdef Py_ssize_t nbytes = dtype.itemsize
    if dtype.subdtype is not None:
        raise malformed("a scalar that is an array")
    require(r, nbytes)
    scalar = PyArray_Scalar(<void *>r.cursor, <cnp.PyArray_Descr *>dtype, NULL)
    r.cursor += nbytes
    return scalar


cdef object read_message(Reader *r, Frame frame):
    """Read the one value of a frame whose payload is in reach."""
    cdef Py_ssize_t table = table_nbytes(frame.num_buffers)
    r.meta = <const uint8_t *>PyBytes_AS_STRING(<PyObject *>frame.meta)
    r.value = r.cursor = r.meta + table
    r.end = r.meta + PyBytes_GET_SIZE(<PyObject *>frame.meta)
    r.num_buffers = frame.num_buffers
    r.payload_nbytes = frame.payload_nbytes
    if table != 8 * r.num_buffers and memcmp(
        r.value - 8, PyBytes_AS_STRING(<PyObject *>ZEROS), 8
    ) != 0:
        raise malformed("padding is not zero")
    value = read_value(r)
    if r.cursor != r.end:
        raise malformed(f"{r.end - r.cursor} bytes follow the value")
    if r.buffers_used != r.num_buffers or r.payload_used != r.payload_nbytes:
        raise malformed("bytes of the payload belong to no array")
    return value


cdef int open_payload(Reader *r, Frame frame, object view) except -1:
    cdef Py_buffer *buffer = PyMemoryView_GET_BUFFER(view)
    if <uint64_t>buffer.len < frame.payload_nbytes:
        raise malformed("the payload is truncated")
    if buffer.readonly or <size_t>buffer.buf % ALIGNMENT:
        raise ValueError("cannot decode message: its payload is not writable or not aligned")
    r.payload = <uint8_t *>buffer.buf
    r.payload_view = <PyObject *>view
    return 0


cdef object decode_message(Frame frame, object session):
    cdef Reader r
    view = None
    memset(&r, 0, sizeof(r))
    r.session = <PyObject *>session
    if frame.num_buffers:
        view = memoryview(frame.payload)
        open_payload(&r, frame, view)
    try:
        return read_message(&r, frame)
    except (DistgradError, MemoryError):
        raise
    except Exception as error:  # of a hook, NumPy or UTF-8: the value made no sense to it
        fact = f"{type(error).__name__}: {error}"
        raise ProtocolError(f"cannot decode message: {fact}") from error
    finally:
        Py_XDECREF(r.shared)


def decode(Frame frame not None, session=None):
    """Decode the value of a frame.

    Parameters
    ----------
    frame
        As received. Its arrays beyond the inline size become views of its payload.
    session
        Handed to the hooks of tensors and registered types.

    Raises
    ------
    ProtocolError
        The bytes do not follow the wire format, or name types that are not registered.
    """
    return decode_message(frame, session)


# -- registered types ---------------------------------------------------------------------

@cython.final
cdef class Extension:
    """A type that travels as the value its hook makes of it."""

    cdef readonly type cls
    cdef readonly str name
    cdef readonly object encode
    cdef readonly object decode

    def __init__(self, cls, name, encode, decode):
        self.cls, self.name, self.encode, self.decode = cls, name, encode, decode


cdef class Record:
    """A class that travels as the values of its fields, by position."""

    cdef readonly type cls
    cdef readonly str name
    cdef readonly tuple fields

    def __init__(self, cls, name, fields):
        self.cls, self.name, self.fields = cls, name, tuple(fields)

    def values(self, obj):
        """Return the values of the fields of an instance."""
        return tuple([getattr(obj, field) for field in self.fields])

    def build(self, values):
        """Make an instance without running its constructor."""
        raise NotImplementedError


cdef class DataclassRecord(Record):
    def __init__(self, cls, name):
        super().__init__(cls, name, [field.name for field in dataclasses.fields(cls)])
        object.__new__(cls)  # a TypeError here, not at the receiver

    def build(self, values):
        obj = object.__new__(self.cls)
        for field, value in zip(self.fields, values):
            object.__setattr__(obj, field, value)
        for field in dataclasses.fields(self.cls)[len(values):]:
            object.__setattr__(obj, field.name, default_of(field))
        return obj


def default_of(field):
    """Return the default of a dataclass field that an older sender does not know."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise ProtocolError(f"cannot decode message: the field {field.name!r} is missing")


cdef class NamedTupleRecord(Record):
    def __init__(self, cls, name):
        super().__init__(cls, name, cls._fields)

    def values(self, obj):
        return tuple(obj)

    def build(self, values):
        defaults = self.cls._field_defaults
        missing = [defaults[field] for field in self.fields[len(values):]]
        return tuple.__new__(self.cls, (*values, *missing))


cdef class EnumRecord(Record):
    """An enum member by name; a combination of flags by its number."""

    def __init__(self, cls, name):
        super().__init__(cls, name, ("name",))

    def values(self, obj):
        members = self.cls.__members__
        return (obj.name if obj.name in members else obj.value,)

    def build(self, values):
        key, = values
        if type(key) is str:
            return self.cls.__members__[key]
        if not issubclass(self.cls, enum.Flag) or type(key) is not int:
            raise ProtocolError(f"cannot decode message: no member of {self.name!r}")
        return self.cls(key)


def set_tensor_type(cls, unwrap, wrap):
    """Tell the codec which class the tensors have; the last call counts.

    Parameters
    ----------
    cls
        The class. Instances of subclasses travel too and arrive as what `wrap` makes.
    unwrap
        ``unwrap(tensor, session) -> (ndarray, requires_grad, slot)``; slot -1 for none.
    wrap
        ``wrap(ndarray, requires_grad, slot, session) -> tensor``.
    """
    global tensor_type, tensor_unwrap, tensor_wrap
    tensor_type, tensor_unwrap, tensor_wrap = cls, unwrap, wrap


cdef int add_codec(object codec) except -1:
    known = codecs_by_name.get(codec.name)
    if known is not None and known.cls is not codec.cls:
        raise ValueError(
            f"cannot register {codec.cls.__qualname__}: the name {codec.name!r} "
            f"belongs to {known.cls.__qualname__}"
        )
    codecs_by_type[codec.cls] = codec
    codecs_by_name[codec.name] = codec
    return 0


def register_type(cls, name, encode, decode):
    """Let instances of exactly this class be sent, under a name both sides know.

    Parameters
    ----------
    cls, name
        The class, and its name on the wire.
    encode
        ``encode(obj, session) -> value``: something that can be sent, without `obj`.
    decode
        ``decode(value, session) -> obj``. The value comes from a peer: check it. What it
        raises reaches the receiver as ProtocolError.

    Raises
    ------
    ValueError
        The name belongs to another class.
    """
    add_codec(Extension(cls, name, encode, decode))


def register_record(cls, name):
    """Let instances of exactly this dataclass, named tuple or enum be sent.

    Fields travel by position. A receiver fills fields that are missing at the end with
    their defaults, so a class may grow by appending. No constructor runs.

    Raises
    ------
    TypeError
        The class is none of the three, or needs a constructor.
    ValueError
        The name belongs to another class.
    """
    if isinstance(cls, type) and issubclass(cls, enum.Enum):
        add_codec(EnumRecord(cls, name))
    elif isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):
        add_codec(NamedTupleRecord(cls, name))
    elif isinstance(cls, type) and dataclasses.is_dataclass(cls):
        add_codec(DataclassRecord(cls, name))
    else:
        raise TypeError(
            f"cannot register {cls!r}: it is no dataclass, named tuple or enum class"
        )


def _register_time():
    """Register the datetime types; a zone with rules of its own cannot be sent."""
    register_type(
        datetime.date, "date", lambda day, session: (day.year, day.month, day.day),
        lambda value, session: datetime.date(*value),
    )
    register_type(
        datetime.timedelta, "timedelta",
        lambda delta, session: (delta.days, delta.seconds, delta.microseconds),
        lambda value, session: datetime.timedelta(*value),
    )
    register_type(
        datetime.timezone, "timezone", lambda zone, session: zone.__getinitargs__(),
        lambda value, session: datetime.timezone(*value),
    )
    register_type(
        datetime.time, "time",
        lambda at, session: (
            at.hour, at.minute, at.second, at.microsecond, at.tzinfo, at.fold),
        lambda value, session: datetime.time(*value[:5], fold=value[5]),
    )
    register_type(
        datetime.datetime, "datetime",
        lambda at, session: (
            at.year, at.month, at.day, at.hour, at.minute, at.second, at.microsecond,
            at.tzinfo, at.fold),
        lambda value, session: datetime.datetime(*value[:8], fold=value[8]),
    )


# -- for tests ----------------------------------------------------------------------------

def _crc32c(data, *, portable=False):
    """Return the CRC-32C of bytes, on request without the processor's instruction."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    crc = (crc32c_portable if portable else crc32c)(0, <const uint8_t *>view.buf, view.len)
    PyBuffer_Release(&view)
    return crc


def _recompute_crc(frame):
    """Correct the crc of a frame in a bytearray, to get altered bytes behind it."""
    cdef Py_buffer view
    cdef FrameHeader header
    cdef uint64_t meta_nbytes
    PyObject_GetBuffer(frame, &view, PyBUF_WRITABLE)
    try:
        if view.len >= HEADER_NBYTES:
            memcpy(&header, view.buf, HEADER_NBYTES)
            meta_nbytes = min(<uint64_t>header.meta_nbytes, <uint64_t>view.len - HEADER_NBYTES)
            header.crc = frame_crc(
                <uint8_t *>view.buf, <uint8_t *>view.buf + HEADER_NBYTES, meta_nbytes)
            memcpy(<uint8_t *>view.buf + CHECKED_NBYTES, &header.crc, 4)
    finally:
        PyBuffer_Release(&view)


configure(
    max_depth=config.max_depth, max_meta_bytes=config.max_meta_bytes,
    max_payload_bytes=config.max_payload_bytes, max_items=config.max_items,
    max_buffers=config.max_buffers, inline_array_bytes=config.inline_array_bytes,
)
_register_time()
