"""The map of the core: every field with its meaning and its owner.

Invariants, cited by checks and tests:

1. A node's sequence number is larger than those of all nodes its edges lead to.
2. All state of a pass lives in its GraphTask; a Node is only read by it, and loses its
   saved values when it ran without retain_graph.
3. A leaf holds its AccumulateGrad uncounted, the AccumulateGrad holds the leaf.
4. No node holds a tensor that it produced: the graph is free of cycles.
5. A pending gradient is written in place only if nobody else can see it: one reference,
   its own memory, writable.
"""

cimport numpy as cnp
from cpython.object cimport PyObject

from distgrad.graph._kernels cimport Kernel

cdef enum:
    NEAR_DIMS = 3       # dimensions that a Meta holds without an allocation
    NEAR_EDGES = 2      # edges that a node holds without an allocation
    NEAR_ARGS = 8       # arguments that a rule gets without an allocation
    RUNS = 1            # Visit.needed: its rules are run
    RECEIVES = 2        # Visit.needed: gradients for it are computed
    TENSORS = 0         # books of a debug build: an index each
    NODES = 1
    BUFFERS = 2         # memory that is shared or written, one Storage each
    PASSES = 3          # GraphTasks, with the gradients that they hold
    NEED_ANSWER = 1 << 31   # bit of a need mask: the rule reads the result
    NEED_ALL = 0xffffffff


cdef struct Edge:
    PyObject *node      # counted; NULL where nothing is to be differentiated
    int slot            # gradient slot of that node
    int argument        # position in the forward call


cdef struct Meta:       # what a gradient slot takes: shape and dtype of a forward output
    int ndim            # -1: not known, anything is taken
    int typenum
    cnp.npy_intp near[NEAR_DIMS]    # if ndim is larger, near[0] is an owned pointer instead


cdef class Storage:     # shared by all tensors over one piece of memory, made on demand
    cdef unsigned long long writes      # in-place writes so far
    cdef unsigned long long rebases     # those that were recorded in a graph
    cdef str writer                     # name of the last operation that wrote


cdef class Hooks:       # callbacks of a node or of a leaf, made on demand
    cdef dict tensor    # slot -> callbacks (gradient) -> gradient or None
    cdef list before    # callbacks (output gradients)
    cdef list after     # callbacks (input gradients, output gradients)
    cdef list stored    # leaf only: callbacks (leaf) after .grad was written
    cdef dict notes     # Node.metadata
    cdef dict retained  # slot -> weak reference to the tensor that wants its .grad


cdef class TensorBase:
    cdef cnp.ndarray array          # the value
    cdef PyObject *node             # counted; the operation that made it, NULL for a leaf
    cdef PyObject *accumulator      # uncounted AccumulateGrad of a leaf (invariant 3)
    cdef object gradient            # .grad: Tensor or None
    cdef Hooks hooks                # leaf only; those of other tensors sit on their node
    cdef Storage storage            # None until memory is shared or written
    cdef unsigned long long rebases     # storage.rebases that its history accounts for
    cdef int slot                   # which output of node
    cdef bint needs                 # requires_grad
    cdef bint is_view               # shares the memory of another tensor
    cdef object __weakref__


cdef class Spec:        # stands in for a saved argument of which only the shape matters
    cdef readonly tuple shape
    cdef readonly object dtype


cdef class Op:
    cdef readonly object function   # the operation on arrays
    cdef readonly str name
    cdef readonly tuple rules       # a callable or None for each argument
    cdef readonly object variadic   # one rule for all arguments, called with the position first
    cdef unsigned int needs[8]      # for each argument what its rule reads; bit i: argument i
    cdef bint shapes                # rules read shapes of arguments that are not saved
    cdef readonly bint differentiable
    cdef Kernel kernel              # own loop for small arrays, or NO_KERNEL


cdef class Node:
    cdef Edge *edges                # near_edges or owned memory
    cdef Meta *slots                # near_slot or owned memory
    cdef int n_edges
    cdef int n_slots
    cdef unsigned long long sequence    # order of creation (invariant 1)
    cdef Hooks hooks
    cdef public bint boundary       # never applied, handed out by GraphTask.run
    cdef public bint passes_on      # `apply` returns what it gets, so it may be left out
    cdef public bint writes         # code of the user: it may write into the gradients it gets
    cdef Edge near_edges[NEAR_EDGES]
    cdef Meta near_slot
    cdef object __weakref__
    cpdef int _link(self, tensors, Py_ssize_t num_inputs) except -1
    cdef int take_place(self) except -1


cdef class OpNode(Node):
    cdef Op op
    cdef tuple args                 # saved arguments; None where not needed, Spec for shapes
    cdef dict kwargs
    cdef object answer              # saved result: ndarray or tuple of them
    cdef Storage storage            # of the tensor that shows the saved result, if it has one
    cdef unsigned long long writes  # sum of the write counts of all saved values
    cdef int n_args
    cdef bint freed


cdef class AccumulateGrad(Node):
    cdef readonly TensorBase variable
    cdef void *lock                 # PyThread lock: one thread accumulates at a time


cdef object grad_mode       # ContextVar: whether operations are recorded
cdef dict OPS               # function on arrays -> Op
cdef dict FUNCTIONS         # function -> callable on tensors

cdef void count_pass(int change) noexcept
cdef bint grad_enabled() except -1
cdef void dg_drop(PyObject *object) noexcept
cdef tuple meta_shape(Meta *meta)
cdef int describe(Meta *meta, cnp.ndarray array) except -1
cdef object meta_dtype(Meta *meta)
cdef object add_hook(list hooks, object hook)
cdef Hooks hooks_of(Node node)
cdef int make_room(Node node, Py_ssize_t n_edges, Py_ssize_t n_slots) except -1
cdef AccumulateGrad accumulator_of(TensorBase leaf)
cdef Node edge_of(TensorBase tensor)
cdef int attach(TensorBase tensor, Node node, int slot) except -1
cdef object rule_of(Op op, int argument)
cdef str no_rule(str name, str what)
cdef OpNode new_node(Op op, Py_ssize_t n_args)
cdef int connect(OpNode node, TensorBase tensor, int argument, unsigned int *mask) except -1
cdef Spec new_spec(tuple shape, object dtype)
cdef object saved_argument(OpNode node, object value, int argument, unsigned int mask)
cdef int save(OpNode node, tuple args, dict kwargs, object answer, unsigned int mask) except -1
cdef TensorBase wrap(object result)
cdef object unwrap(object value)
cdef int check_fresh(TensorBase tensor) except -1
cdef object call_op(Op op, tuple args, dict kwargs)
cdef object unwrap_constant(Op op, object value)
cdef object wrap_outputs(object result, tuple args)
cdef int record(Op op, tuple args, dict kwargs, object outputs) except -1
cdef int attach_output(TensorBase output, OpNode node, int slot) except -1
cdef object unary(Op op, TensorBase x)
cdef int finish(OpNode node, TensorBase output, unsigned int mask) except -1
cdef object binary(Op op, object a, object b)
cdef int record_binary(Op op, object a, object b, TensorBase output) except -1
cdef Storage storage_of(TensorBase tensor)
cdef int share_storage(TensorBase view, TensorBase base) except -1
cdef int mark_written(TensorBase tensor, str writer) except -1


cdef inline cnp.npy_intp *meta_dims(Meta *meta) noexcept:
    return <cnp.npy_intp *>meta.near[0] if meta.ndim > NEAR_DIMS else meta.near


cdef inline bint same_meta(Meta *meta, cnp.ndarray array) noexcept:
    cdef int i
    cdef cnp.npy_intp *dims = meta_dims(meta)
    if cnp.PyArray_NDIM(array) != meta.ndim or cnp.PyArray_TYPE(array) != meta.typenum:
        return False
    for i in range(meta.ndim):
        if cnp.PyArray_DIM(array, i) != dims[i]:
            return False
    return True


cdef inline bint is_inexact(int typenum) noexcept:
    return (
        typenum == cnp.NPY_FLOAT64 or typenum == cnp.NPY_FLOAT32 or typenum == cnp.NPY_FLOAT16
        or typenum == cnp.NPY_COMPLEX64 or typenum == cnp.NPY_COMPLEX128
    )
