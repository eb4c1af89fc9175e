# A context variable for compiled code: its own methods take a thousand instructions more a call.

cdef class CurrentPart:
    cdef object variable
    cpdef get(self)
    cpdef set(self, part)
