"""The wire format at C level: frame header, outgoing message, received frame.

``docs/wire-format.md`` has the byte tables; ``_codec.pyx`` the values.
"""

from distgrad.wire._schema cimport Bounds as BoundsType
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    HEADER_NBYTES = 64    # size of a frame header on the wire
    OVERTAKES = 1         # flag: may be delivered before messages that were sent earlier
    NO_GRAD = 2           # flag: a request of someone who records nothing; nor do who serve it


# The 64 bytes of a header as they are on the wire (little-endian, naturally aligned).
cdef struct FrameHeader:
    uint8_t version           # 1
    uint8_t kind              # message kind, never 0
    uint16_t flags            # bits 0-7 may be ignored, bits 8-15 must be understood
    uint32_t meta_nbytes      # bytes of the meta block that follows the header
    uint64_t request_id       # 0: one-way
    uint64_t context_id       # autograd context; 0: none
    uint64_t message_id       # autograd message; 0: none
    uint64_t chain            # chain of nested calls; 0: none
    uint32_t deadline_us      # what is left of the deadline (µs), saturating; 0: none
    uint16_t num_buffers      # arrays in the payload
    uint16_t reserved_a       # 0
    uint64_t payload_nbytes   # bytes of the payload that follows the meta block
    uint32_t crc              # crc32c of bytes 0-55 and the meta block
    uint32_t reserved_b       # 0


cdef class Outgoing:
    """An encoded message. Exports header and meta block as a read-only buffer."""

    cdef public uint8_t kind            # header fields; changes count until `seal`
    cdef public uint64_t request_id
    cdef public uint64_t context_id
    cdef public uint64_t message_id
    cdef public uint64_t chain
    cdef public uint64_t deadline_us
    cdef public bint overtakes          # these two set the flags of their names
    cdef public bint no_grad
    cdef uint8_t *block                 # owned heap block that holds header and meta
    cdef uint8_t *head                  # first byte of the header, inside block
    cdef Py_ssize_t head_nbytes         # header and meta
    cdef Py_ssize_t payload_nbytes      # arrays and the padding between them
    cdef list arrays                    # the payload: flat uint8 views that own their array
    cdef bint sealed                    # header and crc are written

    cpdef seal(self)


cdef class Frame:
    """A received message: its header fields, meta block and payload."""

    cdef readonly uint8_t kind
    cdef readonly uint16_t flags
    cdef readonly uint64_t request_id
    cdef readonly uint64_t context_id
    cdef readonly uint64_t message_id
    cdef readonly uint64_t chain
    cdef readonly uint32_t deadline_us
    cdef readonly bytes meta            # buffer table and value
    cdef readonly object payload        # writable 64-byte aligned buffer, or None
    cdef uint16_t num_buffers           # entries of the buffer table
    cdef uint64_t payload_nbytes        # bytes of payload that belong to the frame


# Copy 64 bytes into `out` and check version, flags and limits: everything that may be
# known before memory for the rest is allocated. Raises ProtocolError.
cdef int read_header(const unsigned char *data, FrameHeader *out) except -1

# Build a frame from a checked header and what followed it; checks length and crc.
cdef Frame make_frame(const FrameHeader *header, bytes meta, object payload)

# `encode` without its header arguments, for a receiver with these bounds if they are known.
cdef Outgoing encode_message(uint8_t kind, object value, object session, BoundsType bounds)

# `decode` at C level.
cdef object decode_message(Frame frame, object session)
