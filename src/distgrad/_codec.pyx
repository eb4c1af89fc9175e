# cython: auto_pickle=False, autotestdict=False
"""The message codec: one value and a few header fields in, bytes out, and back.

``docs/wire-format.md`` is the contract. Here are the frames, outgoing and received; the
values inside are read and written in `distgrad.wire`.
"""

import numpy as np

from distgrad.errors import DistgradError, ProtocolError
from distgrad.wire._schema import (
    DTYPES,
    TAGS,
    Bounds,
    configure,
    name_fields,
    receivable,
    register_exceptions,
    register_record,
    register_type,
    set_tensor_type,
)
from distgrad.wire import strings as _strings    # registers itself  # no-cython-lint

cimport cython
cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from distgrad.wire._decoder cimport Reader, read_message
from distgrad.wire._encoder cimport (
    RESERVE,
    Writer,
    close_writer,
    grow,
    open_writer,
    write_value,
)
from distgrad.wire._python cimport *
from distgrad.wire._schema cimport ALIGNMENT, ZEROS, limits, malformed, pad, table_nbytes
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove, memset

__all__ = [
    "DTYPES",
    "HEADER_FIELDS",
    "TAGS",
    "Bounds",
    "Frame",
    "Outgoing",
    "configure",
    "decode",
    "encode",
    "name_fields",
    "parse",
    "receivable",
    "register_exceptions",
    "register_record",
    "register_type",
    "set_tensor_type",
]

cdef extern from "_crc32c.h":
    void crc32c_init() noexcept nogil
    uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil
    uint32_t crc32c_portable(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil

cnp.import_array()
crc32c_init()

cdef enum:
    VERSION = 1
    MUST_UNDERSTAND = 0xFF00    # flag bits that refuse a frame unless they are known
    CHECKED_NBYTES = 56         # bytes of the header under the crc

HEADER_FIELDS = (
    ("version", 0, 1), ("kind", 1, 1), ("flags", 2, 2), ("meta_nbytes", 4, 4),
    ("request_id", 8, 8), ("context_id", 16, 8), ("message_id", 24, 8), ("chain", 32, 8),
    ("deadline_us", 40, 4), ("num_buffers", 44, 2), ("reserved_a", 46, 2),
    ("payload_nbytes", 48, 8), ("crc", 56, 4), ("reserved_b", 60, 4),
)


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
        Py_DECREF(None)  # Cython's first content of view.obj, which FillInfo overwrites

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
        header.flags = OVERTAKES * self.overtakes | NO_GRAD * self.no_grad
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

    def own(self):
        """Copy the arrays, which their owner may change from now on; return their bytes."""
        if self.arrays is not None:
            self.arrays = [array.copy() for array in self.arrays]
        return self.payload_nbytes

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
    if value_nbytes + table > w.limits.max_meta_bytes or table > RESERVE - HEADER_NBYTES:
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


cdef Outgoing encode_message(uint8_t kind, object value, object session, BoundsType bounds):
    cdef Writer w
    cdef Outgoing message
    open_writer(&w, kind, <PyObject *>session, bounds)
    try:
        write_value(&w, value)
        message = Outgoing.__new__(Outgoing)
        message.kind = kind
        write_table(message, &w)
        return message
    finally:
        close_writer(&w)


def encode(
    uint8_t kind, value, session=None, *, uint64_t request_id=0, uint64_t chain=0,
    uint64_t deadline_us=0, uint64_t context_id=0, uint64_t message_id=0, BoundsType bounds=None,
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
    bounds
        Limits of the receiver, which hold besides those of this process.

    Raises
    ------
    SerializationError
        Some part of the value cannot be sent, contains itself, or exceeds a limit; the
        message names the path to it.
    """
    cdef Outgoing message = encode_message(kind, value, session, bounds)
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
        raise malformed(
            f"{out.payload_nbytes} bytes of arrays, {limits.max_payload_bytes} are allowed"
        )
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
    r.meta = <const uint8_t *>PyBytes_AS_STRING(<PyObject *>frame.meta)
    r.end = r.meta + PyBytes_GET_SIZE(<PyObject *>frame.meta)
    r.num_buffers = frame.num_buffers
    r.payload_nbytes = frame.payload_nbytes
    if frame.num_buffers:
        view = memoryview(frame.payload)
        open_payload(&r, frame, view)
    try:
        return read_message(&r)
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
