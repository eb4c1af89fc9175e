"""The state of one backward pass."""

from cpython.object cimport PyObject

from distgrad.graph._gradient cimport GradientTable
from distgrad.graph._node cimport AccumulateGrad, Node, OpNode, TensorBase


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


cdef struct Sum:        # a slot that gets three or more contributions
    int first           # its place in held; -1 for all other slots
    int n               # contributions that arrived


cdef class GraphTask:
    cdef list keep                  # root nodes and sends
    cdef Visit *visits
    cdef int n_visits, room_visits
    cdef int *buckets               # open addressing: node address -> visit + 1
    cdef int n_buckets
    cdef int *targets               # for each edge of each visit the visit it leads to, or -1
    cdef int n_edges, room_edges
    cdef PyObject **pending         # counted gradients, one a slot
    cdef Sum *sums                  # one a slot; NULL without sends
    cdef PyObject **held            # contributions kept apart until all are there
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
    cdef object mode                # token of the grad mode that run set; None until it does
    cdef readonly list captured     # gradients of inputs=
    cdef readonly str failed_node
    cdef readonly str failed_site   # where that node was recorded (config.trace_graph), or ""
    # methods, in the order of the file
    cdef int begin(self, roots, sends, retain_graph, bint create_graph, inputs,
                   GradientTable table) except -1
    cdef object fit_delivered(self, Node node, int i, object gradient)
    cdef int refuse_boundaries(self, inputs) except -1
    cdef list start_at(self, roots, sends)
    cdef int lookup(self, PyObject *node) noexcept
    cdef int visit(self, PyObject *node) except -1
    cdef int rehash(self) except -1
    cdef int count(self) except -1
    cdef int want(self, tuple inputs) except -1
    cdef int hold_sums(self, list starts) except -1
    cdef int slot_of(self, int index, int k) noexcept
    cdef int seed(self, list starts) except -1
    cdef int set_mode(self) except -1
    cdef int blame(self, Node node, object error) except -1
    cdef int enqueue_if_ready(self, int index) except -1
    cdef int pop(self) noexcept
    cdef int put(self, int slot, object gradient) except -1
    cdef object take(self, int slot)
    cdef int add_held(self, Sum *sum, int slot) except -1
    cdef int contribute(self, int index, int k, object gradient) except -1
    cdef int step(self, int index) except -1
    cdef int skip(self, int index) except -1
    cdef int capture(self, int index, list grads) except -1
    cdef int step_leaf(self, int index, AccumulateGrad node, list grads) except -1
    cdef int run_apply(self, int index, Node node, list grads) except -1
    cdef int run_rules(self, int index, OpNode node, object gradient) except -1
    cdef object run_rule(self, int index, OpNode node, int k, PyObject **stack, list keep)


cdef object seed_of(TensorBase root, object gradient, bint create)
cdef GraphTask local_pass(list roots, object retain_graph, bint create_graph, object inputs)
