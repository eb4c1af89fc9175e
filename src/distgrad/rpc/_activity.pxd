"""What the current thread or task is doing, and for which worker, at C level."""


cdef class Activity:
    cdef readonly object worker    # the current worker
    cdef readonly object chain     # id of the chain of nested synchronous calls; 0 outside a call
    cdef double until              # when the served call's caller gives up (monotonic s); or inf


# What the current thread or task does; in threads that never touched rpc, that of no call by the
# oldest worker of this process, or None. The worker may be closed.
cdef Activity current_activity()

# Make it what the current context does.
cdef int enter_activity(Activity now) except -1
