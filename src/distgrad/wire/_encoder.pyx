# cython: auto_pickle=False, autotestdict=False
"""The encoder: a value into a block of bytes and a list of arrays.

``docs/wire-format.md`` has the format. Invariants that the code cites:

1. What the encoder accepts, a decoder with the same limits accepts: both count depth,
   items, buffers and bytes in the same way. ``Writer.limits`` are those of this process and,
   where they are known, of the receiver, whichever are tighter.
2. A pointer in the memo is alive (the memo owns a reference), so equal pointers are one
   object. Objects with one reference cannot turn up twice and are not recorded.
3. Hooks run arbitrary code, so nothing borrowed from a container is used after a hook
   unless a reference is held.
"""

import dataclasses
import enum

import numpy as np

from distgrad.errors import SerializationError
from distgrad.wire._schema import Unsendable

cimport numpy as cnp
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF
from distgrad.wire._python cimport *
from distgrad.wire._schema cimport *
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

cnp.import_array()

cdef extern from "float.h":
    int LDBL_MANT_DIG

cdef enum:
    START_NBYTES = 1000    # first size of a block: within the fast bins of malloc
    X87_NBYTES = 10        # of a number of 80 bits; a long double is larger

cdef object generic = np.generic
cdef object StringDType = np.dtypes.StringDType


cdef int open_writer(Writer *w, uint8_t kind, PyObject *session, Bounds bounds) except -1:
    w.start = <uint8_t *>malloc(START_NBYTES)
    if w.start == NULL:
        raise MemoryError
    w.cursor = w.start + RESERVE
    w.end = w.start + START_NBYTES
    w.session = session
    w.arrays = NULL
    w.payload_nbytes = 0
    w.step = NULL
    w.depth = 0
    w.in_key = False
    w.kind = kind
    w.memo.entries = w.memo.start
    w.memo.count, w.memo.capacity, w.memo.index = 0, MEMO_START, NULL
    w.limits = &limits
    w.bounds = NULL
    if bounds is not None and is_tighter(&bounds.limits, &limits):
        w.bounds = <PyObject *>bounds
        tighten(&w.tightened, &bounds.limits)
        w.limits = &w.tightened
    return 0


cdef inline bint is_tighter(const Limits *a, const Limits *b) noexcept:
    return (a.max_depth < b.max_depth or a.max_meta_bytes < b.max_meta_bytes
            or a.max_payload_bytes < b.max_payload_bytes or a.max_items < b.max_items
            or a.max_buffers < b.max_buffers)


cdef void tighten(Limits *to, const Limits *told) noexcept:
    """Keep what is allowed here and there; what travels inline is for the sender to say."""
    to.max_depth = min(limits.max_depth, told.max_depth)
    to.max_meta_bytes = min(limits.max_meta_bytes, told.max_meta_bytes)
    to.max_payload_bytes = min(limits.max_payload_bytes, told.max_payload_bytes)
    to.max_items = min(limits.max_items, told.max_items)
    to.max_buffers = min(limits.max_buffers, told.max_buffers)
    to.inline_array_bytes = limits.inline_array_bytes


cdef void close_writer(Writer *w) noexcept:
    memo_clear(&w.memo)
    Py_XDECREF(w.arrays)
    free(w.start)


cdef int write_value(Writer *w, object value) except -1:
    if type(value) is tuple or not isinstance(value, tuple) or type(value) in codecs_by_type:
        return put_value(w, <PyObject *>value)
    w.depth = 1
    return put_tuple(w, <tuple>value)


cdef str path_of(Writer *w):
    """Name the value that is being written: ``args[1]['model'].lock``."""
    pieces = []
    container = None
    cdef Step *step = w.step
    cdef Py_ssize_t top = 0
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
        top = step.index
        step = step.parent
    fields = message_fields.get(w.kind, ())
    if type(container) is tuple and len(container) == len(fields):      # the body of a message
        pieces[len(pieces) - 1] = "." + fields[top]
    path = "".join(reversed(pieces))
    path = path[1:] if path[:1] == "." and type(container) is not dict else "value" + path
    return path if len(path) <= 200 else f"{path[:100]} ... {path[len(path) - 90:]}"


cdef object refusal(Writer *w, str fact, str hint=None):
    return SerializationError(f"cannot send {path_of(w)}: {fact}", hint=hint)


cdef object excess(Writer *w, str setting, str fact, str more="", str instead=""):
    """Return the error for what goes beyond a limit: of this worker, or of the receiver."""
    own = dict(w.limits[0])[setting] == dict(limits)[setting]
    owner = "all workers" if own else f"worker {(<Bounds>w.bounds).name!r}"
    whose = "" if own else f", the limit of {owner}"
    hint = f"{instead}raise {setting} on {owner}, before init_rpc"
    return refusal(w, f"{fact}{whose}{more}", hint)


cdef int grow(Writer *w, size_t nbytes) except -1:
    cdef size_t used = w.cursor - w.start
    cdef size_t capacity = w.end - w.start
    if used + nbytes > RESERVE + w.limits.max_meta_bytes:
        raise excess(
            w, "max_meta_bytes",
            f"the message without its large arrays exceeds {w.limits.max_meta_bytes} bytes",
            f": it has {used + nbytes - RESERVE} or more",
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
    if isinstance(<object>obj, BaseException) and exception_codec is not None:
        return put_compound(w, obj, cls, <PyObject *>exception_codec)
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


cdef inline int descend(Writer *w) except -1:
    """Count a level of nesting, just as the decoder does (invariant 1)."""
    w.depth += 1
    if w.depth > w.limits.max_depth:
        raise excess(w, "max_depth", f"it is nested deeper than {w.limits.max_depth} levels")
    return 0


cdef int put_bounds(Writer *w, object bounds) except -1:
    descend(w)
    for bound in (bounds.start, bounds.stop, bounds.step):
        put_value(w, <PyObject *>bound)
    w.depth -= 1
    return 0


cdef int put_compound(
    Writer *w, PyObject *obj, PyTypeObject *cls, PyObject *codec
) except -1:
    """Write what has parts, or an identity. Containers nobody else holds skip the memo."""
    cdef bint identity = codec != NULL and type(<object>codec) is Extension
    identity = identity or <PyObject *>cls == <PyObject *>tensor_type
    if Py_REFCNT(obj) > 1 and recall(w, obj, identity):
        return 0
    descend(w)
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
    if count > w.limits.max_items:
        raise excess(
            w, "max_items", f"{count} elements, {w.limits.max_items} are allowed",
            "", "send an array, or ",
        )
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
    _held = items  # invariant 3
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
    _held = items  # invariant 3
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
    _held = items  # invariant 3
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
        _held_value = <object>value  # invariant 3: hooks may run for the key
        put_key(w, key)
    _held_key = <object>key
    step.key = key
    put_value(w, value)
    step.key = NULL
    return 0


cdef int put_key(Writer *w, PyObject *key) except -1:
    cdef bint in_key = w.in_key
    _held = <object>key  # invariant 3
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
    if not cnp.PyArray_CheckExact(array):
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
    try:
        value = codec.encode(obj, <object>w.session)
    except Unsendable as error:
        raise refusal(w, error.args[0], error.args[1]) from None
    if codec.alone:
        put_key(w, <PyObject *>value)
    else:
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
        raise refusal(
            w, f"the dtype {dtype} has no form on the wire",
            "view or convert it as numbers, strings or records of them",
        )
    return put_key(w, <PyObject *>description)  # as in keys: a tree without references


cdef double rows_without_bytes(cnp.ndarray array) noexcept:
    """Count the parts one could go through: the product of the dims before one that is 0."""
    cdef double rows = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, i) == 0:
            break
        rows *= cnp.PyArray_DIM(array, i)
    return rows


cdef int put_array(Writer *w, cnp.ndarray array) except -1:
    """Write shape and dtype, and the items inside the meta block or in the payload."""
    cdef uint8_t code = dtype_code(array.descr)
    cdef int ndim = cnp.PyArray_NDIM(array)
    cdef Py_ssize_t nbytes = cnp.PyArray_NBYTES(array)
    cdef bint inside = nbytes <= w.limits.inline_array_bytes
    cdef uint8_t order = 0
    cdef size_t gap
    _held = array  # invariant 3
    if code == DESCRIBED and type(array.descr) is StringDType:
        return put_extension(w, array, <Extension>codecs_by_name["strings"])
    if nbytes == 0 and rows_without_bytes(array) > w.limits.max_items:
        raise excess(
            w, "max_items",
            f"{rows_without_bytes(array):.0f} items without bytes, "
            f"{w.limits.max_items} are allowed",
        )
    if not inside and nbytes > <int64_t>w.limits.max_payload_bytes - w.payload_nbytes:
        raise excess(
            w, "max_payload_bytes", f"the arrays exceed {w.limits.max_payload_bytes} bytes",
            f": they have {w.payload_nbytes + nbytes} or more",
        )
    if not cnp.PyArray_IS_C_CONTIGUOUS(array):
        if cnp.PyArray_IS_F_CONTIGUOUS(array):
            order = FORTRAN
        else:
            array = <cnp.ndarray>cnp.PyArray_NewCopy(array, cnp.NPY_CORDER)
    need(w, 3 + 8 * ndim)
    w.cursor[0] = T_ARRAY if inside else T_BUFFER
    w.cursor[1] = code
    w.cursor[2] = <uint8_t>(ndim | order)
    if ndim > 0:
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
    if len(arrays) >= w.limits.max_buffers:
        raise excess(
            w, "max_buffers", f"more than {w.limits.max_buffers} large arrays in one message",
            "", "join them, or ",
        )
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
    descend(w)
    put_dtype(w, array.descr, code)
    w.depth -= 1
    put_bytes(w, cnp.PyArray_DATA(array), cnp.PyArray_NBYTES(array))
    if array.descr.type_num == cnp.NPY_LONGDOUBLE or array.descr.type_num == cnp.NPY_CLONGDOUBLE:
        clear_holes(w.cursor - cnp.PyArray_NBYTES(array), w.cursor)
    return 0


cdef void clear_holes(uint8_t *item, uint8_t *end) noexcept:
    """Zero what an x87 number leaves of its bytes: whatever was in memory there."""
    if LDBL_MANT_DIG != 64:
        return
    while item < end:
        memset(item + X87_NBYTES, 0, sizeof(long double) - X87_NBYTES)
        item += sizeof(long double)
