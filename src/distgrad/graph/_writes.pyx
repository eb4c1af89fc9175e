# cython: auto_pickle=False, autotestdict=False
"""In-place writes: recorded, or refused, never silently wrong."""

cimport numpy as cnp
from cpython.object cimport PyObject

from distgrad.graph._node cimport (
    OPS, Node, Op, OpNode, Storage, TensorBase, attach, binary, check_fresh, connect,
    dg_drop, grad_enabled, mark_written, new_node, save, unwrap, wrap,
)

import operator

import numpy as np

from distgrad.errors import GraphError

cnp.import_array()


cdef int check_writable(TensorBase tensor, str writer) except -1:
    """A write that will be recorded needs a tensor whose history may be replaced."""
    check_fresh(tensor)
    if tensor.needs and tensor.node == NULL:
        raise GraphError(
            f"cannot record {writer} on a leaf that requires grad",
            hint="write inside distgrad.no_grad(), or use a copy: tensor.clone()",
        )
    if tensor.is_view:
        raise GraphError(
            f"cannot record {writer} on a view: the tensor it looks at would lose the history",
            hint="write through the tensor itself: tensor[index] = value",
        )
    return 0


cdef int rebase(TensorBase tensor, Node node, int slot, str writer) except -1:
    """Give a tensor whose memory was written the history of the write."""
    cdef PyObject *old = tensor.node
    cdef Storage storage
    mark_written(tensor, writer)
    storage = tensor.storage
    storage.rebases += 1
    tensor.rebases = storage.rebases
    attach(tensor, node, slot)
    dg_drop(old)
    return 0


cdef object write_operator(Op op, TensorBase target, object other, str writer):
    """``target op= other``."""
    cdef TensorBase result
    if not ((target.needs or (isinstance(other, TensorBase) and (<TensorBase>other).needs))
            and grad_enabled()):
        op.function(target.array, unwrap(other), out=target.array)
        mark_written(target, writer)
        return target
    check_writable(target, writer)
    result = binary(op, target, other)
    if np.shape(result.array) != np.shape(target.array):
        raise ValueError(f"cannot write {writer}: the result has shape {result.shape}, "
                         f"the tensor {target.shape}")
    np.copyto(target.array, result.array)
    if result.array.dtype != target.array.dtype:
        result = result.astype(target.array.dtype)
    rebase(target, <Node>result.node, result.slot, writer)
    return target


cdef int write_item(TensorBase target, object index, object value) except -1:
    cdef OpNode node
    cdef unsigned int mask = 0
    cdef bint tracked = target.needs
    if not tracked and isinstance(value, TensorBase):
        tracked = (<TensorBase>value).needs
    plain_index = unwrap_index(index)
    if not (tracked and grad_enabled()):
        target.array[plain_index] = unwrap(value)
        return mark_written(target, "__setitem__")
    check_writable(target, "__setitem__")
    node = new_node(<Op?>OPS[operator.setitem], 3)
    if target.needs:
        connect(node, target, 0, &mask)
    if isinstance(value, TensorBase) and (<TensorBase>value).needs:
        check_fresh(<TensorBase>value)
        connect(node, <TensorBase>value, 1, &mask)
    args = (target, value if isinstance(value, TensorBase) else wrap(value), plain_index)
    save(node, args, None, None, mask)
    target.array[plain_index] = unwrap(value)
    return rebase(target, node, 0, "__setitem__")


cdef object unwrap_index(object index):
    if isinstance(index, TensorBase):
        return (<TensorBase>index).array
    if type(index) is tuple:
        return tuple([unwrap_index(part) for part in index])
    if type(index) is list:
        return [unwrap_index(part) for part in index]
    return index
