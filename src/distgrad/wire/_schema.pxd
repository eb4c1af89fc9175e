"""What encoder and decoder agree on: tags, limits, dtypes and registered types."""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    INLINE_ALIGNMENT = 16       # of arrays in the meta block
    ALIGNMENT = 64              # of arrays in the payload
    BIGINT_NBYTES = 65536       # longest int
    MAX_DIMS = 64
    DESCRIBED = 0               # dtype code: a description follows
    BIG_ENDIAN = 0x80           # bit of the dtype code
    FORTRAN = 0x80              # bit of the number of dimensions
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


# See `configure`.
cdef struct Limits:
    int max_depth
    uint64_t max_meta_bytes
    uint64_t max_payload_bytes
    uint32_t max_items
    uint32_t max_buffers
    Py_ssize_t inline_array_bytes


cdef Limits limits                   # of this process
cdef uint8_t code_of_type[64]        # NumPy type number -> dtype code, 0: described
cdef PyObject *dtype_of_code[32]     # dtype code -> native dtype, or NULL
cdef bytes ZEROS                     # as many as padding may have

cdef object tensor_type              # class of the tensors, or None
cdef object tensor_unwrap            # see `set_tensor_type`
cdef object tensor_wrap
cdef dict codecs_by_type             # class -> Extension or Record
cdef dict codecs_by_name             # name on the wire -> the same
cdef object exception_codec          # Extension for exceptions of every class, or None
cdef dict message_fields             # message kind -> names of the fields of its body


cdef class Extension:
    """A type that travels as the value its hook makes of it."""

    cdef readonly object cls
    cdef readonly str name           # on the wire
    cdef readonly object encode      # (obj, session) -> value
    cdef readonly object decode      # (value, session) -> obj
    cdef bint alone                  # the value has no references to what came before


cdef class Bounds:
    """What another worker takes; a message to it keeps within this, and within `limits`."""

    cdef Limits limits
    cdef readonly str name           # of the worker


cdef class Record:
    """A class that travels as the values of its fields, by position."""

    cdef readonly object cls
    cdef readonly str name           # on the wire
    cdef readonly tuple fields       # their names


# The ProtocolError for bytes that do not follow the format.
cdef object malformed(str fact)

# A dtype as plain values and back; None if it has no form on the wire.
cdef object describe(object dtype)
cdef object undescribe(object description)


cdef inline size_t pad(size_t offset, size_t alignment) noexcept nogil:
    """Return the bytes from an offset to the next multiple of a power of two."""
    return (0 - offset) & (alignment - 1)


cdef inline size_t table_nbytes(size_t num_buffers) noexcept nogil:
    """Return the size of a buffer table."""
    return 8 * num_buffers + pad(8 * num_buffers, INLINE_ALIGNMENT)
