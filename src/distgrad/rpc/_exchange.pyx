# cython: auto_pickle=False, autotestdict=False
"""What every call does: send a request, serve it, answer it, take the answer in.

E1  Messages are decoded in the order of their arrival, so that what they record is recorded
    in that order.
E2  An answer counts only if it comes from the peer that was asked.
E3  Bad bytes end the connection they came on, and nothing else.
E4  An event is taken in once: an exception that no message causes, such as KeyboardInterrupt,
    leaves it in the list unless it has had its effect (`settled`).
E5  What a peer can make this worker keep is bounded: requests that wait or are served by the
    `Ledger`, answers that it does not read by their number. Nobody waits for that: a request
    too many is answered with an error, so nested calls and backward passes go on.
"""

from collections.abc import Mapping
from functools import partial
from types import CoroutineType, FunctionType

from cpython.contextvars cimport PyContextVar_Set
from libc.math cimport INFINITY
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from distgrad._codec cimport (
    HEADER_NBYTES, NO_GRAD, Frame, Outgoing, decode_message, encode_message,
)
from distgrad._core cimport Tensor
from distgrad.graph._node cimport TensorBase, grad_enabled, grad_mode
from distgrad.rpc._activity cimport Activity, current_activity, enter_activity
from distgrad.rpc._crew cimport CrewCore, Job
from distgrad.rpc._future cimport IS_DONE, IS_FAILED, Future, PendingRequests, RpcFuture
from distgrad.wire._schema cimport Bounds

from distgrad.config import config
from distgrad.errors import (
    DistgradError,
    GraphError,
    ProtocolError,
    RpcTimeoutError,
    SerializationError,
    TransportError,
    WorkerLostError,
)
from distgrad.message import KINDS, Call, Error, RemoteCall, Reply, code_of
from distgrad.rpc import exposure, functions, options
from distgrad.rpc.activity import current_worker
from distgrad.rpc.failures import is_interrupt
from distgrad.rpc.future import Running

cimport cython

cdef extern from "transport/_wait.h":
    double now_s "distgrad_now"() noexcept nogil

cdef uint8_t CALL = code_of(Call), REPLY = code_of(Reply), ERROR = code_of(Error)
cdef Py_ssize_t MOST_UNSENT = 1024 * 1024  # bytes a connection; beyond, senders wait
cdef dict _codes = {kind: code for code, kind in KINDS.items()}
cdef uint64_t REQUEST_NBYTES = 1024        # that a request takes up besides its content
cdef uint64_t LARGE_NBYTES = 64 * 1024     # requests from here on are counted apart
cdef uint64_t VALUE_NBYTES = 8             # of memory that a byte of a meta block can become
cdef double UNSET = options.UNSET_RPC_TIMEOUT
cdef str MARK = functions.ANSWERS_LATER
cdef object Coroutine = CoroutineType, Function = FunctionType
cdef dict _names = exposure.called_names          # function -> name
cdef dict _declared = exposure.declared    # name -> function
cdef dict _titles = {}                     # name -> what errors call a call of it


@cython.final
@cython.freelist(16)
cdef class Session:
    """What one message carries besides plain values.

    Parameters
    ----------
    worker
        The worker that encodes or decodes.
    peer_id
        The worker at the other end.

    Attributes
    ----------
    tensors
        Tensors that require grad, each once, in slot order.
    awaited
        Futures that must be done before the message is served (set by RRef arguments).
    undo
        What to call if the message never leaves.
    """

    def __init__(self, worker, int peer_id):
        self.worker = worker
        self.peer_id = peer_id
        self.tensors = []

    def take_back(self):
        """Undo what encoding recorded: the message never left."""
        self.drop()

    cdef int drop(self) except -1:
        if self.undo is not None:
            for undo in self.undo:
                undo()
        return 0

    def slot_of(self, tensor):
        """Return the slot of a tensor in this message; a new one on first sight."""
        if self.slots is None:
            self.slots = {}
        slot = self.slots.setdefault(id(tensor), len(self.tensors))
        if slot == len(self.tensors):
            self.tensors.append(tensor)
        return slot


cdef inline Session new_session(object worker, int peer):
    cdef Session session = Session.__new__(Session)
    session.worker = worker
    session.peer_id = peer
    session.tensors = []
    return session


def unwrap_tensor(TensorBase tensor not None, session):
    """Return what is sent of a tensor: array, whether it requires grad, its slot or -1.

    Under `no_grad` a tensor with a history arrives as what an operation would make of it there:
    one that does not require grad. A leaf is one at the other end too.
    """
    if not tensor.needs or (tensor.node != NULL and not grad_enabled()):
        return tensor.array, False, -1
    return tensor.array, True, -1 if session is None else session.slot_of(tensor)


def wrap_tensor(array not None, bint requires_grad, int slot, session):
    """Return the tensor that arrived, and note it in the session if it requires grad."""
    cdef Tensor tensor = Tensor.__new__(Tensor)
    tensor.array = array
    if not requires_grad:
        return tensor
    try:
        tensor.requires_grad_()
    except GraphError as error:     # no honest sender has such a tensor
        raise ProtocolError(f"cannot decode message: {error}") from error
    if session is not None and slot == len(session.tensors):
        session.tensors.append(tensor)
    return tensor


cdef inline bint stands_alone(Outgoing message, Session session):
    """Whether a call or answer means the same before the messages that were sent earlier.

    It does not if it belongs to a context or brings references: their books count on order.
    """
    return message.context_id == 0 and session.undo is None


@cython.final
@cython.no_gc
cdef class Ledger:
    """How many bytes the requests of each peer take up here.

    Parameters
    ----------
    workers
        How many there are.
    most
        Bytes of the small requests of one peer, about, and of its large ones; beyond,
        requests are turned away. Small ones are not because of large ones.
    """

    def __cinit__(self, int workers, uint64_t most):
        self.most = most
        self.held = <uint64_t*>calloc(2 * workers, sizeof(uint64_t))
        if self.held == NULL:
            raise MemoryError("cannot make a ledger: out of memory")

    def __dealloc__(self):
        free(self.held)

    cdef uint64_t *account(self, int peer, uint64_t nbytes) noexcept:
        """Return what a peer takes up with requests about as large as this one."""
        return &self.held[2 * peer + (nbytes >= LARGE_NBYTES)]


cdef inline uint64_t cost(Frame frame) noexcept:
    return REQUEST_NBYTES + VALUE_NBYTES * <uint64_t>len(frame.meta) + frame.payload_nbytes


@cython.no_gc_clear     # the ledger must be there to the last
cdef class Charged(Job):
    """A task whose request counts against its sender until the task is freed."""

    cdef int charge(self, Ledger ledger, int peer, Frame frame) except -1:
        """Count the request; once."""
        self.peer = peer
        self.nbytes = cost(frame)
        self.ledger = ledger
        ledger.account(peer, self.nbytes)[0] += self.nbytes
        return 0

    cdef void discharge(self) noexcept:
        """Count it no longer: before it is answered, for the answer may bring the next one."""
        if self.nbytes:
            self.ledger.account(self.peer, self.nbytes)[0] -= self.nbytes
            self.nbytes = 0

    def __dealloc__(self):
        self.discharge()


@cython.final
@cython.no_gc_clear
cdef class Chore(Charged):
    """A task that the inline handler of a request left behind."""

    cdef int perform(self) except -1:
        self.task()
        return 0


@cython.final
cdef class Handling:
    """Who handles the messages of one kind."""

    def __init__(self, kind, handler, bint inline):
        self.kind = kind
        self.handler = handler
        self.inline = inline
        self.num_fields = len(kind._fields)
        self.charged = not inline or kind is RemoteCall     # which leaves a task behind


cdef inline Bounds bounds_of(Exchange exchange, int peer):
    """Return what a worker takes; None for one that this world has not."""
    return <Bounds>exchange.bounds[peer] if 0 <= peer < exchange.num_workers else None


cdef class Exchange:
    """Sends requests and answers, and takes in what the poller of a worker returns.

    `Agent` completes it with what is rare.
    """

    def _assemble(self, worker, links, CrewCore crew not None, PendingRequests pending not None):
        """Put the parts together."""
        self.worker = worker
        self.links = links
        self.routes = links.routes
        self.crew = crew
        self.pending = pending
        self.handlers = {}
        self.unsent = {}
        self.owed = {}
        self.ids = {info.name: info.id for info in worker.world.infos}
        self.num_workers = len(self.ids)
        self.bounds = [Bounds(member.name, member.limits) for member in worker.world.members]
        self.ledger = Ledger(self.num_workers, config.max_peer_bytes)
        self.last_id = <uint64_t>worker.id << 48

    def new_id(self):
        """Return an id that no other worker of this world makes: 16 bits worker, 48 counter."""
        self.last_id += 1
        return self.last_id

    cpdef submit(self, task, chain=None):
        """Run a task: on the thread that waits for ``chain``, or on a serving thread."""
        self.crew.accept(task, chain)

    # --- sending ----------------------------------------------------------------------------

    def request(
        self, int to, uint8_t kind, tuple body not None, *, double timeout, chain=0, str what=""
    ):
        """Send a message that is answered.

        Parameters
        ----------
        to
            Id of the receiver.
        kind
            Code of the message.
        body
            Its fields.
        timeout
            Seconds until the request fails; 0 for never.
        chain
            Chain of nested calls that this one continues; 0 starts a new one.
        what
            Names the request in errors.

        Raises
        ------
        SerializationError
            If the body cannot be sent; nothing was sent then.
        WorkerLostError
            If the receiver is lost.
        """
        return self.issue(to, kind, body, timeout, chain, what)

    cdef RpcFuture issue(
        self, int to, uint8_t kind, tuple body, double timeout, object chain, str what
    ):
        cdef Session session = new_session(self.worker, to)
        cdef RpcFuture future = RpcFuture.__new__(RpcFuture)
        cdef Outgoing message
        self.last_id += 1
        future.request_id = self.last_id
        future.desk = self.crew
        future.pending = self.pending
        future.peer = to
        future.what = what
        future.chain = chain or future.request_id
        future.context_id = future.message_id = 0
        future.timeout = timeout
        future.deadline = INFINITY
        try:
            message = encode_message(kind, body, session, bounds_of(self, to))
            if timeout > 0.0:
                future.deadline = now_s() + timeout
            connection = self.route(to, timeout if timeout > 0.0 else INFINITY)
            self.compose(future, message, session)
        except BaseException:
            session.drop()
            raise
        # In the table before a tick is asked for, which looks through it.
        self.pending.requests[future.request_id] = future
        if future.deadline < self.crew.wake_at:
            self.tick_by(future.deadline)
        self.issued += 1
        try:
            self.transmit(connection, message, future.deadline)
        except BaseException as error:      # who called hears of it, and has no future to look at
            future._observed = True
            if isinstance(error, TransportError):
                self.pending.take(future)
                session.drop()
                self._take_back(future.context_id, future.message_id)
            else:                           # Ctrl-C
                self.forget(future)
            raise
        return future

    cdef int compose(self, RpcFuture future, Outgoing message, Session session) except -1:
        """Fill in the header; the autograd hook records the message."""
        cdef double micros
        cdef bint records = grad_enabled()
        message.request_id = future.request_id
        message.chain = future.chain
        if future.timeout > 0.0:
            micros = max(future.timeout * 1e6, 1.0)
            if micros < 4294967296.0:       # a later one is not told: 71 minutes are the most
                message.deadline_us = <uint64_t>micros
        hook = self.hook
        if hook is not None:
            future.context_id, future.message_id = hook.outgoing(
                self.worker, future.peer, session.tensors if records else [], False, future.what
            )
            message.context_id = future.context_id
            message.message_id = future.message_id
        message.no_grad = not records
        message.overtakes = message.kind == CALL and stands_alone(message, session)
        return 0

    def tick_by(self, double when):
        """Have ``ticks`` called by the polling thread at ``when`` (`time.monotonic`) or before.

        Any thread may call this, also from a destructor: it takes no lock.
        """
        if when < self.crew.wake_at:
            self.crew.wake_at = when
            self.crew.poller.wake()

    cdef int transmit(
        self, object connection, Outgoing message, double deadline=INFINITY
    ) except -1:
        try:
            sent = connection.send(message)
        except TransportError as error:
            name = self.worker.world.name_of(connection.peer)
            raise WorkerLostError(f"cannot send to worker {name!r}: {error}") from error
        self.bytes_sent += <uint64_t>(message.head_nbytes + message.payload_nbytes)
        if sent:
            if self.unsent:
                self.unsent.pop(connection, None)
        elif not self.crew.polls_here():
            self.hold_back(connection, message, deadline)
        elif self.is_unread(connection):
            error = self.unread(connection)
            self._reject(connection, ProtocolError(error))
            raise WorkerLostError(error)
        return 0

    cdef str unread(self, object connection):
        name = self.worker.world.name_of(connection.peer)
        return f"cannot send to worker {name!r}: it does not read what waits for it"

    cdef int hold_back(self, object connection, Outgoing message, double deadline) except -1:
        """Wait for the kernel if arrays of the caller, or much else, have not left yet."""
        queued = self.unsent.get(connection, 0) + message.head_nbytes
        if message.payload_nbytes == 0 and queued <= MOST_UNSENT:
            self.unsent[connection] = queued    # whoever polls sends it
        else:
            self.unsent.pop(connection, None)
            self.drain(connection, message, deadline)
        return 0

    cdef int drain(self, object connection, Outgoing message, double deadline) except -1:
        """Wait for the kernel; an answer that waits takes up memory, like the request did."""
        cdef uint64_t nbytes = REQUEST_NBYTES + <uint64_t>message.payload_nbytes
        cdef uint64_t *account = self.ledger.account(connection.peer, nbytes)
        cdef bint counts = message.kind == REPLY
        account[0] += counts * nbytes
        try:
            if self.crew.drain(connection, deadline):
                return 0
            if now_s() >= deadline and self.leave_behind(connection, message):
                return 0
        except BaseException:           # Ctrl-C: the arrays are the caller's again
            connection.detach(message)
            raise
        finally:
            account[0] -= counts * nbytes
        error = self.unread(connection)
        self.crew.poller.call(partial(self._reject, connection, ProtocolError(error)))
        raise WorkerLostError(error)

    cdef bint leave_behind(self, object connection, Outgoing message) except -1:
        """Let the rest of a request go out by itself: its caller waits no longer.

        Returns False if the peer leaves too much unread.
        """
        nbytes = connection.detach(message)
        if nbytes is None:      # another transport, or no memory for a copy
            return self.crew.drain(connection)
        return nbytes <= self.ledger.most and not self.is_unread(connection)

    cdef bint is_unread(self, object connection) except -1:
        return <uint64_t>connection.waiting() > self.ledger.most // REQUEST_NBYTES

    cdef object route(self, int peer, double patience_s=INFINITY):
        """Return the connection for sending to a peer; connects on first use."""
        connection = self.routes.get(peer)
        return connection if connection is not None else self.links.to(peer, patience_s)

    def send(self, connection, Outgoing message not None):
        """Send a message; waits while the kernel is full, unless this thread polls.

        Raises
        ------
        WorkerLostError
            If the connection is closed.
        """
        self.transmit(connection, message)

    cpdef int tell(self, int to, message, context_id=0) except -1:
        """Send a one-way message object.

        Raises
        ------
        WorkerLostError
            If the receiver is lost.
        """
        cdef Session session = new_session(self.worker, to)
        cdef Outgoing outgoing
        try:
            outgoing = encode_message(_codes[type(message)], message, session, bounds_of(self, to))
            outgoing.context_id = context_id
            self.transmit(self.route(to), outgoing)
        except Exception:
            session.drop()
            raise
        return 0

    def reply(self, int to, request_id, value, what=None):
        """Answer a request with a value, or with an `Error` if the value cannot be sent.

        ``what`` tells the autograd hook what was asked for.
        """
        self.respond(to, request_id, value, what)

    cdef int respond(self, int to, uint64_t request_id, object value, object what) except -1:
        cdef Session session = new_session(self.worker, to)
        cdef Outgoing message
        try:
            message = encode_message(REPLY, (value,), session, bounds_of(self, to))
            hook = self.hook
            if hook is not None and session.tensors and grad_enabled():
                message.context_id, message.message_id = hook.outgoing(
                    self.worker, to, session.tensors, True, what
                )
        except Exception as error:
            session.drop()
            self.reply_error(to, request_id, error)
            return 0
        message.request_id = request_id
        message.overtakes = stands_alone(message, session)
        self.handled += 1
        try:
            self.transmit(self.route(to), message)
        except TransportError as error:     # nobody is left to answer
            session.drop()
            self._answer_lost(error, message.context_id, message.message_id)
        return 0

    def reply_with(self, int to, request_id, uint8_t kind, tuple body not None):
        """Answer a request with a message of another kind than `Reply`."""
        cdef Outgoing message = encode_message(kind, body, None, bounds_of(self, to))
        message.request_id = request_id
        message.overtakes = kind == ERROR
        self.handled += 1
        try:
            self.transmit(self.route(to), message)
        except TransportError as error:
            self._answer_lost(error, 0, 0)

    def count_handled(self):
        """Count a request that ended without an answer."""
        self.handled += 1

    cdef int answer(self, Served served, object value) except -1:
        cdef uint64_t request_id = served.frame.request_id
        if not request_id:
            return 0
        what = served.body[0] if served.body else None
        if isinstance(value, Future):
            self._answer_later(served, request_id, what, value)
        else:
            served.discharge()
            self.respond(served.peer, request_id, value, what)
        return 0

    def _answer_later(self, Served served, request_id, what, Future value):
        served.body = served.frame = None   # the arguments may be large

        if not isinstance(value, Running):
            self.owed[served.peer, request_id] = served

        def completed(Future future):
            error = future.exception()
            if not isinstance(future, Running) and not self.excuse(served.peer, request_id):
                return                      # the caller gave up
            served.discharge()
            if error is None:
                self.respond(served.peer, request_id, future.outcome(), what)
            else:
                self.reply_error(served.peer, request_id, error)

        value.add_done_callback(completed)

    def excuse(self, int peer, request_id):
        """Owe a later answer no more: the caller gave up. False if there is none to come."""
        cdef Served served = self.owed.pop((peer, request_id), None)
        if served is None:
            return False
        served.discharge()
        return True

    cdef int resolve_id(self, object to) except -1:
        """Return the id of a worker given by name, id or `WorkerInfo`."""
        if type(to) is int:
            if 0 <= to < self.num_workers:
                return to
        elif type(to) is str:
            found = self.ids.get(to)
            if found is not None:
                return found
        return self.worker.world.id_of(to)

    # --- receiving: the thread that polls ------------------------------------------------------

    def on_events(self, list events not None):
        """Take in what the poller returned, and remove it from the list."""
        cdef Py_ssize_t taken = 0
        try:
            for connection, item in events:
                self.settled = False
                if isinstance(item, Frame):
                    self.on_frame(connection, <Frame>item)
                else:
                    self._on_end(connection, item)
                taken += 1
        except BaseException:
            del events[:taken + self.settled]
            raise
        events.clear()

    cdef int on_frame(self, object connection, Frame frame) except -1:
        cdef Handling handling
        try:
            peer = connection.peer
            if peer is None:
                peer = self.links.peer_of(connection)
            self.bytes_received += HEADER_NBYTES + <uint64_t>len(frame.meta) + frame.payload_nbytes
            if frame.kind == REPLY or frame.kind == ERROR:
                return self.on_answer(peer, frame)
            handling = self.handlers.get(frame.kind)
            if handling is not None:
                if handling.charged and (
                    self.ledger.account(peer, cost(frame))[0] >= self.ledger.most
                ):
                    return self.turn_away(connection, peer, frame)
                return self.on_request(peer, frame, handling)
            self._on_control(peer, frame)
        except Exception as error:
            self._reject(connection, error)
        return 0

    cdef object decode(self, int peer, Frame frame, Session session):
        body = decode_message(frame, session)
        if frame.message_id:
            self.record(peer, frame, session)
        return body

    cdef int record(self, int peer, Frame frame, Session session) except -1:
        """Give a history to the tensors of a message that arrived."""
        hook = self.hook
        if hook is not None:
            hook.incoming(self.worker, peer, frame.context_id, frame.message_id, session.tensors)
        return 0

    cdef int on_answer(self, int peer, Frame frame) except -1:
        cdef RpcFuture future = self.pending.find(frame.request_id, peer)
        cdef Session session = new_session(self.worker, peer)
        try:
            body = self.decode(peer, frame, session)
        except SerializationError as error:     # of a type that somebody registered
            if frame.message_id:    # passes answer for it that there is no gradient
                self.record(peer, frame, session)
            self.settled = True
            if future is not None and self.pending.take(future):
                future._try_complete(IS_FAILED, error)
            return 0
        self.settled = True
        if future is None:
            return 0    # timed out or cancelled meanwhile; what it recorded stays recorded
        if session.awaited is not None:
            self._take_answer_later(session.awaited, future, frame, body)
            return 0
        return self.take_answer(future, frame, body)

    def _take_answer_later(self, list awaited, RpcFuture future, Frame frame, body):
        self._after(awaited, lambda: self.take_answer(future, frame, body))

    cdef int take_answer(self, RpcFuture future, Frame frame, object body) except -1:
        if frame.kind == REPLY:
            if type(body) is not tuple or len(<tuple>body) != 1:
                raise ProtocolError("cannot read a Reply message: it has other fields")
            if self.pending.take(future):
                future._try_complete(IS_DONE, (<tuple>body)[0])
        else:
            self._take_error(future, body)
        return 0

    cdef int turn_away(self, object connection, int peer, Frame frame) except -1:
        """Answer a request that is one too many, unless that would not be read either."""
        cdef uint64_t held = self.ledger.account(peer, cost(frame))[0]
        fact = f"worker {self.worker.name!r} holds {held} bytes of requests from here already"
        if not frame.request_id:
            raise ProtocolError(f"cannot take a message: {fact}")
        self.settled = True
        self.reply_error(peer, frame.request_id, DistgradError(
            f"cannot serve a request: {fact}",
            hint="wait for answers in between, or raise max_peer_bytes on that worker",
        ))
        return 0

    cdef int on_request(self, int peer, Frame frame, Handling handling) except -1:
        cdef Session session = new_session(self.worker, peer)
        cdef Served served
        cdef Chore chore
        task = None
        try:
            body = self.decode(peer, frame, session)
        except ProtocolError:
            raise
        except Exception as error:
            if not frame.request_id:
                raise
            self._refuse(peer, frame.request_id, error)
            return 0
        if type(body) is not tuple or len(<tuple>body) != handling.num_fields:
            raise ProtocolError(
                f"cannot read a {handling.kind.__name__} message: it has other fields"
            )
        self.settled = True
        if handling.inline:
            task = handling.handler(self.worker, peer, frame, body)
            if task is None:
                return 0
            if handling.charged:
                chore = Chore.__new__(Chore)
                chore.task = task
                chore.charge(self.ledger, peer, frame)
                task = chore
        else:
            served = Served.__new__(Served)
            served.exchange = self
            served.handler = handling.handler
            served.charge(self.ledger, peer, frame)
            served.frame = frame
            served.body = body
            served.until = now_s() + frame.deadline_us * 1e-6 if frame.deadline_us else INFINITY
            task = served
        if session.awaited is not None:
            self._submit_later(session.awaited, task, frame.chain)
        else:
            self.crew.accept(task, frame.chain)
        return 0

    def _submit_later(self, list awaited, task, chain):
        self._after(awaited, lambda: self.crew.accept(task, chain))


# --- serving ------------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear
cdef class Served(Charged):
    """A request that waits for, or is in, the hands of a serving thread."""

    cdef int perform(self) except -1:
        cdef Exchange exchange = self.exchange
        cdef Frame frame = self.frame       # `answer` may let go of it
        if self.until < INFINITY and now_s() > self.until:
            exchange.handled += 1   # the caller gave up already
            return 0
        try:
            self.serve()
        except BaseException as error:
            if not frame.request_id:
                raise
            self.discharge()
            exchange.reply_error(self.peer, frame.request_id, error)
            if is_interrupt(error):
                raise
        return 0

    cdef int serve(self) except -1:
        """Run the handler as the call that it serves, and send its answer."""
        cdef Exchange exchange = self.exchange
        enter_call(exchange, self.frame, self.until)
        value = self.handler(exchange.worker, self.peer, self.frame, self.body)
        return exchange.answer(self, value)


cpdef int enter_call(Exchange exchange, Frame frame, double until=INFINITY) except -1:
    """Give a task what the call that it serves has: chain, deadline, grad mode and context."""
    cdef Activity now = Activity.__new__(Activity)
    now.worker = exchange.worker
    now.chain = frame.chain
    now.until = until
    enter_activity(now)
    if frame.flags & NO_GRAD:
        PyContextVar_Set(grad_mode, False)
    hook = exchange.hook if frame.context_id else None
    if hook is not None:
        hook.enter(exchange.worker, frame.context_id)
    return 0


def serve_call(worker, peer, frame, body):
    """Handle a `Call`: run the function that it names."""
    cdef str name
    name, args, kwargs = body
    function = _declared.get(name)
    if function is None:
        function = worker.exposure.resolve(name)
    return call_function(worker, function, args, kwargs)


cpdef object call_function(worker, function, args, kwargs):
    """Call an exposed function as its decorators ask: now, later, or on the event loop.

    Returns
    -------
    object
        The value, or a `Future` where the answer comes later.
    """
    value = function(*args, **kwargs) if kwargs else function(*args)
    if type(value) is Coroutine:
        return worker.run_on_loop(value)
    if isinstance(value, Future) != getattr(function, MARK, False):
        raise _wrong_promise(function, value)
    return value


def _wrong_promise(function, value):
    name = f"{function.__module__}.{function.__qualname__}"
    if isinstance(value, Future):
        return SerializationError(
            f"cannot send the result of {name}: it is a Future",
            hint="decorate the function with rpc.functions.async_execution",
        )
    return TypeError(
        f"cannot answer with the result of {name}: a function decorated with async_execution "
        f"returns a Future, not {type(value).__name__}"
    )


# --- calling --------------------------------------------------------------------------------

def place_call(to, func, args, kwargs, timeout, bint nested):
    """Send a call of the current worker; see `rpc_sync` for what the arguments mean.

    Parameters
    ----------
    nested
        Whether the call continues the chain of the one that is being served.

    Returns
    -------
    RpcFuture
        The answer.
    """
    cdef Activity now = current_activity()
    cdef Exchange exchange = now.worker.agent if now is not None else None
    if exchange is None or exchange.closed:
        exchange = current_worker().agent
    cdef str name = _names.get(func) if type(func) is Function else None
    if name is None:
        name = exposure.name_of(func)
    cdef int peer = exchange.resolve_id(to)
    if type(args) is not tuple or (kwargs is not None and type(kwargs) is not dict):
        args, kwargs = call_arguments(name, args, kwargs)
    cdef str what = _titles.get(name)
    if what is None:
        what = _titles[name] = "call " + name
    return exchange.issue(
        peer,
        CALL,
        (name, args, kwargs if kwargs else None),
        allowed_timeout(exchange.worker, timeout, name),
        now.chain if nested and now is not None else 0,
        what,
    )


cpdef tuple call_arguments(str what, args, kwargs):
    """Return the arguments of a call as a tuple and a dict or None.

    Raises
    ------
    TypeError
        If they are something else: an array, say, whose comma was forgotten.
    """
    if args is not None and not isinstance(args, (tuple, list)):
        raise TypeError(
            f"cannot call {what} with args of type {type(args).__name__}: "
            "expected a tuple; one argument is (x,)"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"cannot call {what} with kwargs of type {type(kwargs).__name__}: expected a dict"
        )
    return () if args is None else tuple(args), dict(kwargs) if kwargs else None


cpdef double allowed_timeout(worker, timeout, str what) except? -1.0:
    """Return how long a new call may take: what is asked for, and within the call served.

    Raises
    ------
    TypeError, ValueError
        If the timeout is no number, or negative.
    RpcTimeoutError
        If the call being served has expired.
    """
    cdef Activity now = current_activity()
    cdef double left, seconds
    try:
        seconds = timeout
    except TypeError:
        raise TypeError(
            f"cannot call {what} with timeout={timeout!r}: expected seconds, 0 for none"
        ) from None
    if not seconds >= 0.0:
        if seconds != UNSET:
            raise ValueError(f"cannot call {what} with timeout={timeout!r}: expected 0 or more")
        seconds = worker.options.rpc_timeout
    if now is None or now.until == INFINITY:
        return seconds
    left = now.until - now_s()
    if left <= 0.0:
        raise RpcTimeoutError(f"cannot call {what}: the call being served here has expired")
    return min(seconds, left) if seconds > 0.0 else left


cpdef object current_extension(str name):
    """Return what a layer above keeps at the current worker, by the name of the layer."""
    cdef Activity now = current_activity()
    if now is not None and not (<Exchange?>now.worker.agent).closed:
        return now.worker.extensions[name]
    return current_worker().extensions[name]
