# Types for the compiled build of protocol.py; the module also runs as plain Python.

cimport cython

from distgrad.autograd.closure cimport Closure


cdef class BackwardPass:
    cdef public object worker           # id of this worker
    cdef public object pass_id
    cdef public object root             # id of the worker that started the pass
    cdef public int flags               # RETAIN, INTO_GRAD
    cdef public object state            # State
    cdef public Closure closure         # at the root, else None
    cdef public object cause            # PassAbort once it failed
    cdef public object graph            # while it runs: GraphTask
    cdef public dict _sends             # snapshot: message id -> send node
    cdef public dict _recvs             # snapshot: message id -> recv node
    cdef public set _peers              # other workers of the snapshot, without lost ones
    cdef public object _lost            # workers that are gone
    cdef public object _excluded        # peers that were gone when the pass began
    cdef public set _heard              # workers that sent something in this pass
    cdef public dict _unresolved        # those of _sends that nothing came for yet
    cdef public set _answered           # ids of recvs outside the snapshot that were told none
    cdef public dict _uncertain         # peer -> ids of sends that the next begin asks about
    cdef public dict _entries           # peer -> (message id, gradients) for the next message
    cdef public dict _late              # peer -> the same, for recvs outside the snapshot
    cdef public list _own               # the same, for messages of this worker to itself
    cdef public tuple _carried          # reports of others that go on with the own one
    cdef public bint _announced         # bare begins were sent
    cdef public list _outbox            # (peer, message) to send

    @cython.locals(peers=set)
    cpdef begin(self, dict sends, dict recvs, uncertain=*, lost=*, early=*)
    cpdef build(self)
    cpdef handle(self, sender, message)
    cpdef _on_gradients(self, sender, message)
    cpdef on_recorded(self, message_id, peer)
    cpdef on_uncertain(self, message_id)
    cpdef fail(self, cause, sender=*)

    @cython.locals(outbox=list)
    cpdef list advance(self)

    @cython.locals(own=list)
    cpdef _sweep(self)

    @cython.locals(report=tuple, asked=dict)
    cpdef _flush(self)

    @cython.locals(told=dict, entries=list)
    cpdef _flush_entries(self, tuple report)
    cpdef _tell(self, node, grads)
    cpdef _resolve(self, message_id, grads)

    @cython.locals(peers=tuple, report=tuple)
    cpdef tuple _report(self)
    cpdef _drop_graph(self)

    @cython.locals(closure=Closure)
    cpdef _on_reports(self, tuple reports)
