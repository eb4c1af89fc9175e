"""In-place writes to tensors."""

from distgrad.graph._node cimport Node, Op, TensorBase


cdef int check_writable(TensorBase tensor, str writer) except -1
cdef int rebase(TensorBase tensor, Node node, int slot, str writer) except -1
cdef object write_operator(Op op, TensorBase target, object other, str writer)
cdef int write_item(TensorBase target, object index, object value) except -1
cdef object unwrap_index(object index)
