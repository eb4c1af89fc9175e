# Types for the compiled build of closure.py; the module also runs as plain Python.

cdef class Closure:
    cdef public set reached     # worker ids that take part
    cdef public set missing     # those of them that have not reported
    cdef public dict reports    # worker id -> ids of its peers, ~id where one was left out
