# Types for the compiled build of functions.py; the module also runs as plain Python.

from distgrad.graph._node cimport Node


cdef class SendRpcBackward(Node):
    cdef public object message_id
    cdef public object peer         # id of the worker that the message went to
    cdef public object what         # the call that it belongs to, for people
    cdef public bint is_response
    cdef public tuple _grads        # see set_grads


cdef class RecvRpcBackward(Node):
    cdef public object message_id
    cdef public object peer         # id of the worker that the message came from
    cdef public object context_id
