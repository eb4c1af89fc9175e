"""The encoder: a value into a block of bytes and a list of arrays."""

from cpython.object cimport PyObject
from distgrad.wire._schema cimport Bounds, Limits
from libc.stdint cimport int32_t, uint8_t, uint32_t

cdef enum:
    RESERVE = 192       # bytes before the value: header, and table of up to 16 arrays
    MEMO_START = 16


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
    const Limits *limits       # what the message keeps within
    PyObject *bounds           # borrowed Bounds of the receiver, where they are tighter; or NULL
    Limits tightened           # of this process and of the receiver, if limits point here
    PyObject *arrays           # owned list of out-of-band arrays, NULL while there is none
    Py_ssize_t payload_nbytes
    Step *step
    int depth
    bint in_key                # inside a dict key or set element
    uint8_t kind               # of the message; names its fields in errors
    Memo memo


# Prepare a writer, for a receiver with these bounds if they are known (the caller keeps them
# alive), free what it still owns, and write one value (or a message's fields).
cdef int open_writer(Writer *w, uint8_t kind, PyObject *session, Bounds bounds) except -1
cdef void close_writer(Writer *w) noexcept
cdef int write_value(Writer *w, object value) except -1

# Make room for more bytes, or raise SerializationError.
cdef int grow(Writer *w, size_t nbytes) except -1
