# cython: auto_pickle=False, autotestdict=False
"""The decoder: bytes and a payload into a value.

``docs/wire-format.md`` has the format. Invariants that the code cites:

1. Nothing is allocated for a length before that length was checked against the bytes that
   are left and a limit. ``Reader.owed`` counts the elements that enclosing containers
   still wait for, so that nested containers cannot promise the same bytes twice.
2. Nothing is imported and no class is looked up: registered names only.
"""

cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from distgrad.wire._python cimport *
from distgrad.wire._schema cimport *
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cnp.import_array()

cdef enum:
    STRING_CACHE = 512

# Short strings that were read before; names come again and again.
cdef PyObject *string_cache[STRING_CACHE]


cdef object read_message(Reader *r):
    cdef size_t table = table_nbytes(r.num_buffers)
    r.value = r.cursor = r.meta + table
    if table != 8 * <size_t>r.num_buffers and memcmp(
        r.value - 8, PyBytes_AS_STRING(<PyObject *>ZEROS), 8
    ) != 0:
        raise malformed("padding is not zero")
    value = read_value(r)
    if r.cursor != r.end:
        raise malformed(f"{r.end - r.cursor} bytes follow the value")
    if r.buffers_used != r.num_buffers or r.payload_used != r.payload_nbytes:
        raise malformed("bytes of the payload belong to no array")
    return value


# -- values -------------------------------------------------------------------------------

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


cdef inline int descend(Reader *r) except -1:
    """Count a level of nesting: whoever reads a value within a value does."""
    r.depth += 1
    if r.depth > limits.max_depth:
        raise malformed(f"it is nested deeper than {limits.max_depth} levels")
    return 0


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
    descend(r)
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
    if r.alone:
        raise malformed("a reference inside a value that stands alone")
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
    descend(r)
    start = read_value(r)
    stop = read_value(r)
    step = read_value(r)
    r.depth -= 1
    if not is_range:
        return slice(start, stop, step)
    if type(start) is not int or type(stop) is not int or type(step) is not int:
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
    if not cnp.PyArray_CheckExact(array):
        raise malformed("a tensor without an array")
    return tensor_wrap(array, flags == 1, slot, <object>r.session)


cdef object read_codec(Reader *r):
    """Read a name; return what is registered under it, or None."""
    name = read_value(r)
    if type(name) is not str:
        raise malformed("the name of a type is no text")
    return codecs_by_name.get(name)


cdef object read_alone(Reader *r):
    cdef bint alone = r.alone
    r.alone = True
    value = read_value(r)
    r.alone = alone
    return value


cdef object read_extension(Reader *r):
    codec = read_codec(r)
    if type(codec) is not Extension:
        raise malformed("a value of a type that is not registered here")
    value = read_alone(r) if (<Extension>codec).alone else read_value(r)
    return (<Extension>codec).decode(value, <object>r.session)


cdef object read_record(Reader *r):
    cdef Py_ssize_t count = read_count(r, 1)
    codec = read_codec(r)
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
        dtype = undescribe(read_key(r))  # as in keys: a tree without references
        if dtype.subdtype is not None:
            raise malformed("an array of arrays")
        return dtype
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
        if dims[i] < 0 or overflows(size, dims[i]):
            raise malformed("the shape of an array overflows")
        if dims[i] > 1:
            size *= dims[i]
    return size


cdef inline bint overflows(Py_ssize_t size, Py_ssize_t factor) noexcept:
    """Whether a product is more than 2**62; a division only where it might be."""
    return (size | factor) >> 31 != 0 and factor > 1 and size > (<Py_ssize_t>1 << 62) // factor


cdef Py_ssize_t array_nbytes(
    Py_ssize_t size, Py_ssize_t itemsize, int ndim, const cnp.npy_intp *dims
) except -1:
    cdef Py_ssize_t rows = 1    # to go through, with nothing in them
    if overflows(size, itemsize):
        raise malformed("the size of an array overflows")
    for i in range(ndim):
        if dims[i] == 0:
            itemsize, size = 0, rows
            break
        rows *= dims[i]
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
    descend(r)
    cdef cnp.dtype dtype = read_dtype(r, read_u8(r))
    cdef Py_ssize_t nbytes = dtype.itemsize
    r.depth -= 1
    require(r, nbytes)
    scalar = PyArray_Scalar(<void *>r.cursor, <cnp.PyArray_Descr *>dtype, NULL)
    r.cursor += nbytes
    return scalar
