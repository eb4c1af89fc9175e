"""Requests, answers and what arrives, at C level; ``agent.py`` has the rare half."""

from libc.stdint cimport uint8_t, uint64_t

from distgrad._codec cimport Frame, Outgoing
from distgrad.rpc._crew cimport CrewCore, Job
from distgrad.rpc._future cimport PendingRequests, RpcFuture


cdef class Session:
    """What one message carries besides plain values."""

    cdef readonly object worker    # the worker that encodes or decodes
    cdef readonly int peer_id      # the worker at the other end
    cdef readonly list tensors     # tensors that require grad, each once, in slot order
    cdef public list awaited       # futures that must be done before the message is served
    cdef public list undo          # what to call if the message never leaves
    cdef dict slots                # id of a tensor -> its slot; None without tensors

    cdef int drop(self) except -1


cdef class Ledger:
    """Bytes that the requests of each peer take up here."""

    cdef uint64_t *held            # by account: two a worker, for small and large requests
    cdef uint64_t most             # of one account; beyond, its requests are turned away

    cdef uint64_t *account(self, int peer, uint64_t nbytes) noexcept


cdef class Charged(Job):
    """A task whose request counts against its sender until the task is freed."""

    cdef Ledger ledger             # None without a charge
    cdef readonly int peer         # who asks
    cdef uint64_t nbytes           # what the request takes up

    cdef int charge(self, Ledger ledger, int peer, Frame frame) except -1
    cdef void discharge(self) noexcept


cdef class Chore(Charged):
    """A task that the inline handler of a request left behind."""

    cdef object task               # sets its own activity


cdef class Handling:
    """Who handles the messages of one kind."""

    cdef readonly object handler   # called with (worker, sender id, frame, body)
    cdef readonly bint inline      # on the thread that polls
    cdef readonly object kind      # class of the message
    cdef bint charged              # its messages wait here, so they count against their sender
    cdef int num_fields            # fields of its body


cdef class Served(Charged):
    """A request that waits for, or is in, the hands of a serving thread."""

    cdef Exchange exchange         # who answers
    cdef object handler            # see Handling
    cdef readonly Frame frame      # the message
    cdef tuple body                # its fields
    cdef double until              # when the caller gives up (monotonic s), inf for never

    cdef int serve(self) except -1


cdef class Exchange:
    cdef readonly object worker    # whose messages these are
    cdef readonly object links     # its connections
    cdef readonly CrewCore crew    # its threads
    cdef readonly PendingRequests pending
    cdef readonly dict handlers    # code of a kind -> Handling
    cdef public object hook        # `Worker.payload_hook`
    cdef public bint closed        # the worker was shut down
    cdef readonly uint64_t issued  # requests sent
    cdef readonly uint64_t handled  # requests answered, or dropped because they were too late
    cdef readonly uint64_t bytes_sent      # of messages
    cdef readonly uint64_t bytes_received
    cdef dict routes               # peer -> connection to send on; kept by links
    cdef dict ids                  # name of a worker -> id
    cdef readonly dict owed        # (peer, request id) -> request whose answer comes later
    cdef readonly dict unsent      # connection -> bytes without arrays that wait to be sent
    cdef int num_workers           # workers of the world
    cdef list bounds               # what each of them takes, by id
    cdef Ledger ledger             # what requests take up
    cdef uint64_t last_id          # made by new_id; 16 bits worker, 48 counter
    cdef bint settled              # the event at hand has had its effect: it must not come again

    cdef RpcFuture issue(
        self, int to, uint8_t kind, tuple body, double timeout, object chain, str what
    )
    cdef int compose(self, RpcFuture future, Outgoing message, Session session) except -1
    cdef int transmit(self, object connection, Outgoing message, double deadline=*) except -1
    cdef int hold_back(self, object connection, Outgoing message, double deadline) except -1
    cdef int drain(self, object connection, Outgoing message, double deadline) except -1
    cdef bint leave_behind(self, object connection, Outgoing message) except -1
    cdef bint is_unread(self, object connection) except -1
    cdef str unread(self, object connection)
    cdef object route(self, int peer, double patience_s=*)
    cdef int resolve_id(self, object to) except -1
    cpdef int tell(self, int to, message, context_id=*) except -1
    cpdef submit(self, task, chain=*)
    cdef int respond(self, int to, uint64_t request_id, object value, object what) except -1
    cdef int answer(self, Served served, object value) except -1
    cdef object decode(self, int peer, Frame frame, Session session)
    cdef int on_frame(self, object connection, Frame frame) except -1
    cdef int record(self, int peer, Frame frame, Session session) except -1
    cdef int on_answer(self, int peer, Frame frame) except -1
    cdef int take_answer(self, RpcFuture future, Frame frame, object body) except -1
    cdef int turn_away(self, object connection, int peer, Frame frame) except -1
    cdef int on_request(self, int peer, Frame frame, Handling handling) except -1
