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

cdef enum:
    NEAR_DIMS = 4       # dimensions that a Meta holds without an allocation
    NEAR_EDGES = 2      # edges that a node holds without an allocation
    NEAR_ARGS = 8       # arguments that a rule gets without an allocation
    RUNS = 1            # Visit.needed: its rules are run
    RECEIVES = 2        # Visit.needed: gradients for it are computed
    NEED_ANSWER = 1 << 31   # bit of a need mask: the rule reads the result
    NEED_ALL = 0xffffffff


cdef struct Edge:
    PyObject *node      # counted; NULL where nothing is to be differentiated
    int slot            # gradient slot of that node
    int argument        # position in the forward call


cdef struct Meta:       # what a gradient slot takes: shape and dtype of a forward output
    int ndim            # -1: not known, anything is taken
    int typenum
    cnp.npy_intp near[NEAR_DIMS]
    cnp.npy_intp *far   # owned; used instead of near if ndim > NEAR_DIMS


cdef class Storage:     # shared by all tensors over one piece of memory, made on demand
    cdef unsigned long long writes      # in-place writes so far
    cdef unsigned long long rebases     # those that were recorded in a graph
    cdef str writer                     # name of the last operation that wrote


cdef class Hooks:       # callbacks of a node or of a leaf, made on demand
    cdef dict tensor    # slot -> callbacks (gradient) -> gradient or None
    cdef list before    # callbacks (output gradients)
    cdef list after     # callbacks (input gradients, output gradients)
    cdef list stored    # leaf only: callbacks (leaf) after .grad was written
    cdef dict retained  # slot -> weak reference to the tensor that wants its .grad


cdef class Tensor:
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
    cdef tuple rules                # a callable or None for each argument
    cdef object variadic            # one rule for all arguments, called with the position first
    cdef unsigned int needs[8]      # for each argument what its rule reads; bit i: argument i
    cdef bint shapes                # rules read shapes of arguments that are not saved
    cdef readonly bint differentiable
    cdef int code                   # kernel number, 0 without
    cdef object doc


cdef class Node:
    cdef Edge *edges                # near_edges or owned memory
    cdef Meta *slots                # near_slot or owned memory
    cdef int n_edges
    cdef int n_slots
    cdef unsigned long long sequence    # order of creation (invariant 1)
    cdef Hooks hooks
    cdef dict notes                 # .metadata
    cdef public bint boundary       # never applied, handed out by GraphTask.run
    cdef Edge near_edges[NEAR_EDGES]
    cdef Meta near_slot
    cdef object __weakref__


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
    cdef readonly Tensor variable
    cdef void *lock                 # PyThread lock: one thread accumulates at a time


cdef class GradientTable:
    cdef dict entries               # leaf -> ndarray, or Tensor once handed out


cdef struct Visit:      # a node in a pass
    PyObject *node      # borrowed: the roots keep the graph alive
    int waiting         # edges and deliveries still to come
    int first_slot      # in pending
    int first_edge      # in targets
    char needed         # RUNS, RECEIVES
    char queued         # is or was in the ready heap


cdef struct Ready:
    unsigned long long sequence
    int visit


cdef class GraphTask:
    cdef list keep                  # root nodes and sends
    cdef Visit *visits
    cdef int n_visits, room_visits
    cdef int *buckets               # open addressing: node address -> visit + 1
    cdef int n_buckets
    cdef int *targets               # for each edge of each visit the visit it leads to, or -1
    cdef int *places                # for each edge its place in held, or -1; NULL without sends
    cdef int n_edges, room_edges
    cdef PyObject **pending         # counted gradients, one a slot
    cdef int *held_range            # for each slot its places in held: first and end
    cdef PyObject **held            # contributions kept apart to be added in edge order
    cdef int n_slots, n_held
    cdef Ready *heap                # what can run, latest node first
    cdef int n_heap, room_heap
    cdef int remaining              # visits that have not run
    cdef dict undelivered           # send -> visit
    cdef dict wanted                # visit -> [(slot, position in captured)]
    cdef list complete              # boundary nodes to hand out by run
    cdef GradientTable table
    cdef bint retain
    cdef bint create
    cdef readonly list captured     # gradients of inputs=
    cdef readonly str failed_node
    # methods, in the order of the file
    cdef list start_at(self, roots, sends)
    cdef int lookup(self, PyObject *node) noexcept
    cdef int visit(self, PyObject *node) except -1
    cdef int rehash(self) except -1
    cdef int count(self) except -1
    cdef int want(self, tuple inputs) except -1
    cdef int order_sums(self, list starts) except -1
    cdef void place_edges(self, int *next_place) noexcept
    cdef int slot_of(self, int index, int k) noexcept
    cdef int seed(self, list starts) except -1
    cdef int enqueue_if_ready(self, int index) except -1
    cdef int pop(self) noexcept
    cdef int put(self, int slot, int place, object gradient) except -1
    cdef object take(self, int slot)
    cdef int add_held(self, int slot) except -1
    cdef int contribute(self, int index, int k, object gradient) except -1
    cdef int step(self, int index) except -1
    cdef int skip(self, int index) except -1
    cdef int capture(self, int index, list grads) except -1
    cdef int step_leaf(self, int index, AccumulateGrad node, list grads) except -1
    cdef int run_apply(self, int index, Node node, list grads) except -1
    cdef int run_rules(self, int index, OpNode node, object gradient) except -1
    cdef object run_rule(self, int index, OpNode node, int k, PyObject **stack)
