"""The decoder: bytes and a payload into a value."""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint64_t


cdef struct Reader:
    const uint8_t *meta        # start of the meta block: the buffer table
    const uint8_t *value       # start of the value
    const uint8_t *cursor
    const uint8_t *end
    PyObject *session          # borrowed from the caller of decode
    PyObject *shared           # owned dict, offset -> finished object; NULL while empty
    Py_ssize_t owed            # elements that enclosing containers still wait for
    int depth
    bint in_key                # refs to tensors and registered types only
    bint alone                 # no refs at all
    uint8_t *payload
    PyObject *payload_view     # borrowed memoryview that keeps the payload alive
    uint64_t payload_nbytes
    uint64_t payload_used
    int num_buffers
    int buffers_used


# Read the value of a message and check that nothing is left. The reader comes zeroed but
# for meta, end, session and what the header says of the payload; `shared` is the caller's
# to free. Raises ProtocolError; what hooks and NumPy raise comes through.
cdef object read_message(Reader *r)
