# cython: auto_pickle=False, autotestdict=False
"""Methods of Tensor that programs call most, without the detour over NumPy's functions.

Each does what `call_op` would do for the operation of the same name.
"""

cimport numpy as cnp

from distgrad.graph._kernels cimport small_sum
from distgrad.graph._node cimport (
    OPS, Op, OpNode, TensorBase, check_fresh, connect, finish, grad_enabled, new_node,
    share_storage, wrap,
)
from distgrad.graph._writes cimport unwrap_index

import operator

import numpy as np

from distgrad.graph._node import operation

cnp.import_array()

cdef Op RESHAPE = operation(np.reshape)     # their rules come with distgrad.ops
cdef Op GETITEM = operation(operator.getitem)


cdef inline bint is_recorded(TensorBase x) except -1:
    return x.needs and grad_enabled()


cdef inline int share_if_view(TensorBase output, TensorBase x) except -1:
    """NumPy collapses chains of views: both look at the same owner, or one at the other."""
    cdef object base = <object>cnp.PyArray_BASE(output.array) if (
        cnp.PyArray_BASE(output.array) != NULL) else None
    if base is not None and (base is x.array or base is (<object>x.array).base):
        share_storage(output, x)
    return 0


cdef object total(TensorBase x):
    """The sum of all elements."""
    cdef Op op = <Op?>OPS["sum"]
    cdef TensorBase output
    cdef OpNode node
    cdef unsigned int mask = 0
    check_fresh(x)
    result = small_sum(x.array)
    output = wrap(op.function(x.array) if result is None else result)
    if is_recorded(x):
        node = new_node(op, 1)
        connect(node, x, 0, &mask)
        finish(node, output, mask)
    return output


cdef object reshape(TensorBase x, object shape):
    cdef OpNode node
    cdef unsigned int mask = 0
    check_fresh(x)
    cdef TensorBase output = wrap((<object>x.array).reshape(shape))
    share_if_view(output, x)
    if is_recorded(x):
        node = new_node(RESHAPE, 1)
        connect(node, x, 0, &mask)
        finish(node, output, mask)
    return output


cdef object get_item(TensorBase x, object index):
    cdef OpNode node
    cdef unsigned int mask = 0
    check_fresh(x)
    index = unwrap_index(index)
    cdef TensorBase output = wrap((<object>x.array)[index])
    share_if_view(output, x)
    if is_recorded(x):
        node = new_node(GETITEM, 2)
        connect(node, x, 0, &mask)
        node.args = (None, index)
        finish(node, output, mask)
    return output
