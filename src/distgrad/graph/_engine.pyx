# cython: auto_pickle=False, autotestdict=False
"""The backward pass over the local part of a graph.

`GraphTask` walks nodes in order of their creation, newest first, without recursion, with
all state of the pass in C arrays of its own, so that two passes may walk one graph at once.
"""

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from cpython.tuple cimport PyTuple_GET_ITEM

from distgrad.graph._gradient cimport (
    accumulate, add_gradients, condense, fill, fit, one_like, own, scaled, sort_gradients,
    spread_out, store_gradient,
)
from distgrad.graph._kernels cimport GETITEM, RESHAPE, SUM, filled, small_gradient
from distgrad.graph._node cimport (
    NEAR_ARGS, RECEIVES, RUNS, AccumulateGrad, Edge, Hooks, Node, OpNode, Storage, TensorBase,
    Meta, check_fresh, count_pass, edge_of, grad_mode, is_inexact, meta_dims, meta_dtype,
    meta_shape, new_spec, same_meta, unwrap, wrap,
)

import numpy as np

from distgrad.errors import GraphError
from distgrad.graph.tracing import RECORDED_AT

cnp.import_array()

cdef extern from "Python.h":
    object PyContextVar_Set(object var, object value)
    int PyContextVar_Reset(object var, object token) except -1
    object PyObject_VectorcallDict(object callable, PyObject **args, size_t n, PyObject *kwargs)
    int PyErr_CheckSignals() except -1


# ---------------------------------------------------------------- hooks and saved values

cdef inline object as_tensor(object gradient):
    return gradient if gradient is None or isinstance(gradient, TensorBase) else wrap(gradient)


cdef object hooked(list hooks, object gradient, bint create):
    """Run tensor hooks on one gradient."""
    for hook in list(hooks):
        result = hook(as_tensor(gradient))
        if result is not None:
            gradient = result
    return gradient if create else unwrap(gradient)


cdef int run_before(Node node, list grads, bint create) except -1:
    """Tensor hooks, retained gradients and pre-hooks of a node with hooks, in this order."""
    cdef TensorBase tensor
    if node.hooks.tensor or node.hooks.before:
        own(grads)
    for slot in range(len(grads)):
        if grads[slot] is None:
            continue
        if slot in node.hooks.tensor:
            gradient = hooked(node.hooks.tensor[slot], grads[slot], create)
            grads[slot] = fit(gradient, &node.slots[slot], node, create)
        reference = node.hooks.retained.get(slot)
        tensor = reference() if reference is not None else None
        if tensor is not None:
            gradient = grads[slot]
            store_gradient(tensor, <PyObject *>gradient)
    for hook in list(node.hooks.before):
        result = hook(tuple([as_tensor(gradient) for gradient in grads]))
        if result is not None:
            check_count("pre-hook", node, result, len(grads))
            grads[:] = [
                None if gradient is None else fit(gradient, &node.slots[slot], node, create)
                for slot, gradient in enumerate(result)
            ]
    return 0


cdef int check_count(str what, Node node, object results, Py_ssize_t n) except -1:
    if len(results) != n:
        raise GraphError(f"cannot use what a {what} of {node.name()} returned: "
                         f"{len(results)} gradients instead of {n}")
    return 0


cdef object run_after(Node node, object results, list grads, bint create):
    """Post-hooks of a node; returns the gradients it sends on."""
    outputs = tuple([as_tensor(gradient) for gradient in grads])
    for hook in list(node.hooks.after):
        replaced = hook(tuple([as_tensor(gradient) for gradient in results]), outputs)
        if replaced is not None:
            check_count("hook", node, replaced, len(results))
            results = replaced
    return results


cdef int check_saved(OpNode node) except -1:
    """Saved values must be there and be what they were."""
    cdef unsigned long long writes = 0
    cdef Storage storage
    if node.freed:
        raise GraphError(
            f"cannot run backward through {node.name()}: an earlier pass freed its saved values",
            hint="pass retain_graph=True to the earlier pass",
        )
    writer = None
    if node.args is not None:
        for value in node.args:
            if isinstance(value, TensorBase):
                storage = (<TensorBase>value).storage
                if storage is not None:
                    writes += storage.writes
                    writer = storage.writer or writer
    if node.storage is not None:
        writes += node.storage.writes
        writer = node.storage.writer or writer
    if writes != node.writes:
        site = "" if node.hooks is None else node.hooks.notes.get(RECORDED_AT, "")
        raise GraphError(
            f"cannot run backward through {node.name()}: a value it saved for {node.op.name}"
            f"{' at ' + site if site else ''} was modified afterwards by {writer}",
            hint="write into a copy: tensor.clone(); DISTGRAD_TRACE_GRAPH=1 shows both lines",
        )
    return 0


cdef int free_saved(OpNode node) except -1:
    node.freed = node.args is not None or node.answer is not None
    node.args = None
    node.answer = None
    node.kwargs = None
    node.storage = None
    return 0


cdef object answer_of(OpNode node, bint create):
    """The saved result, under create_graph as tensors with their history (invariant 4)."""
    if not create or node.answer is None:
        return node.answer
    if type(node.answer) is tuple:
        return tuple([output_of(node, array, i) for i, array in enumerate(node.answer)])
    return output_of(node, node.answer, 0)


cdef object output_of(OpNode node, object array, int slot):
    if not isinstance(array, np.ndarray):
        return array
    cdef TensorBase tensor = wrap(array)
    if is_inexact(cnp.PyArray_TYPE(tensor.array)):
        Py_INCREF(node)
        tensor.node = <PyObject *>node
        tensor.slot = slot
        tensor.needs = True
    return tensor


# ---------------------------------------------------------------- the pass

cdef void *allocate(Py_ssize_t n, size_t size) except NULL:
    cdef void *block = PyMem_Calloc(max(n, 1), size)
    if block == NULL:
        raise MemoryError()
    return block


cdef void *grow(void *block, size_t nbytes) except NULL:
    block = PyMem_Realloc(block, nbytes)
    if block == NULL:
        raise MemoryError()
    return block


cdef int breathe() except -1:
    """Rules in C never reach the interpreter's loop: let signals and other threads in."""
    PyErr_CheckSignals()
    with nogil:
        pass
    return 0


@cython.final
cdef class GraphTask:
    """One backward pass over the local part of a graph; used by one thread at a time.

    Parameters
    ----------
    roots
        (tensor, gradient) pairs; a gradient has the shape of its tensor, None is one.
    sends
        Nodes that get their gradients by `deliver` while the pass runs. With any, a sum of
        three or more contributions has the same bits whatever the order of their arrival
        and of the sends: they are added when all are there, in the order of their bytes.
    retain_graph
        Keep saved values; None means `create_graph`.
    create_graph
        Run the rules on Tensors and record them.
    inputs
        Tensors whose gradients go to `captured` instead of ``.grad``; no other leaf gets any.
    table
        Where gradients of leaves go instead of ``.grad``.
    """

    def __cinit__(self):
        count_pass(1)
        self.failed_node = ""
        self.failed_site = ""

    def __init__(self, roots, *, sends=(), retain_graph=None, create_graph=False, inputs=None,
                 table=None):
        self.begin(roots, sends, retain_graph, create_graph, inputs, table)

    cdef int begin(self, roots, sends, retain_graph, bint create_graph, inputs,
                   GradientTable table) except -1:
        self.create = create_graph
        self.retain = create_graph if retain_graph is None else retain_graph
        self.table = table
        self.keep = []
        self.complete = []
        self.undelivered = {}
        starts = self.start_at(roots, sends)
        self.count()
        if inputs is not None:
            self.want(tuple(inputs))
        self.pending = <PyObject **>allocate(self.n_slots, sizeof(PyObject *))
        if self.undelivered:
            self.hold_sums(starts)
        self.seed(starts)
        return 0

    def __dealloc__(self):
        cdef int i
        count_pass(-1)
        if self.pending != NULL:
            for i in range(self.n_slots):
                Py_XDECREF(self.pending[i])
        if self.held != NULL:
            for i in range(self.n_held):
                Py_XDECREF(self.held[i])
        PyMem_Free(self.visits)
        PyMem_Free(self.buckets)
        PyMem_Free(self.targets)
        PyMem_Free(self.pending)
        PyMem_Free(self.sums)
        PyMem_Free(self.held)
        PyMem_Free(self.heap)

    # -- before the pass: discover and count

    cdef list start_at(self, roots, sends):
        """Visit the first nodes; returns (visit, slot, gradient) of the roots."""
        cdef TensorBase tensor
        cdef Node node
        cdef list starts = []
        for tensor, gradient in roots:
            if not tensor.needs:
                raise GraphError("cannot run backward: a root does not require grad")
            check_fresh(tensor)
            node = edge_of(tensor)
            self.keep.append(node)
            if gradient is None:
                gradient = one_like(tensor.array)
            gradient = fit(gradient, &node.slots[tensor.slot], node, self.create)
            starts.append((self.visit(<PyObject *>node), tensor.slot, gradient))
        for node in sends:
            self.keep.append(node)
            index = self.visit(<PyObject *>node)
            if node not in self.undelivered:
                self.undelivered[node] = index
                self.visits[index].waiting += 1
        return starts

    cdef int lookup(self, PyObject *node) noexcept:
        """The bucket that holds a node, or the empty one where it belongs."""
        cdef size_t mask = self.n_buckets - 1
        cdef size_t i = ((<size_t>node >> 4) * <size_t>0x9E3779B97F4A7C15 >> 20) & mask
        while self.buckets[i] and self.visits[self.buckets[i] - 1].node != node:
            i = (i + 1) & mask
        return <int>i

    cdef int visit(self, PyObject *node) except -1:
        """The index of a node in this pass; new nodes get one."""
        cdef int bucket
        cdef Visit *visit
        if 2 * self.n_visits >= self.n_buckets:
            self.rehash()
        bucket = self.lookup(node)
        if self.buckets[bucket]:
            return self.buckets[bucket] - 1
        if self.n_visits == self.room_visits:
            self.room_visits = max(16, 2 * self.room_visits)
            self.visits = <Visit *>grow(self.visits, self.room_visits * sizeof(Visit))
        visit = &self.visits[self.n_visits]
        visit.node = node
        visit.waiting = 0
        visit.first_slot = self.n_slots
        visit.first_edge = 0
        visit.needed = RUNS | RECEIVES
        visit.queued = 0
        self.n_slots += (<Node>node).n_slots
        self.n_visits += 1
        self.buckets[bucket] = self.n_visits
        return self.n_visits - 1

    cdef int rehash(self) except -1:
        cdef int i
        PyMem_Free(self.buckets)
        self.buckets = NULL
        self.n_buckets = max(32, 4 * self.n_buckets)
        self.buckets = <int *>allocate(self.n_buckets, sizeof(int))
        for i in range(self.n_visits):
            self.buckets[self.lookup(self.visits[i].node)] = i + 1
        return 0

    cdef int count(self) except -1:
        """Visit all that can be reached; count for each node the edges that lead to it."""
        cdef int i = 0, k, target
        cdef Node node
        while i < self.n_visits:
            node = <Node>self.visits[i].node
            self.visits[i].first_edge = self.n_edges
            if self.n_edges + node.n_edges > self.room_edges:
                self.room_edges = max(32, 2 * self.room_edges + node.n_edges)
                self.targets = <int *>grow(self.targets, self.room_edges * sizeof(int))
            for k in range(node.n_edges):
                target = -1
                if node.edges[k].node != NULL:
                    target = self.visit(node.edges[k].node)
                    self.visits[target].waiting += 1
                self.targets[self.n_edges] = target
                self.n_edges += 1
            i += 1
        self.remaining = self.n_visits
        return 0

    cdef int want(self, tuple inputs) except -1:
        """Mark what leads to `inputs`: by invariant 1, older nodes are decided first."""
        cdef int i, k, bucket, target
        cdef TensorBase tensor
        cdef Node node
        cdef Visit *visit
        self.wanted = {}
        self.captured = [None] * len(inputs)
        for i in range(self.n_visits):
            self.visits[i].needed = 0
        for i, tensor in enumerate(inputs):
            if not tensor.needs:
                raise GraphError(f"cannot find a gradient: input {i} does not require grad")
            node = edge_of(tensor)
            bucket = self.lookup(<PyObject *>node)
            if self.buckets[bucket]:
                target = self.buckets[bucket] - 1
                self.visits[target].needed = RECEIVES
                self.wanted.setdefault(target, []).append((tensor.slot, i))
        ages = sorted([((<Node>self.visits[i].node).sequence, i) for i in range(self.n_visits)])
        for _, i in ages:
            visit = &self.visits[i]
            for k in range((<Node>visit.node).n_edges):
                target = self.targets[visit.first_edge + k]
                if target >= 0 and self.visits[target].needed:
                    visit.needed = RUNS | RECEIVES
        return 0

    cdef int hold_sums(self, list starts) except -1:
        """Make room to keep contributions apart, for slots that get three or more."""
        cdef int i, k, slot
        self.sums = <Sum *>allocate(self.n_slots, sizeof(Sum))
        for i, slot, _ in starts:
            self.sums[self.visits[i].first_slot + slot].n += 1
        for i in range(self.n_visits):
            for k in range((<Node>self.visits[i].node).n_edges):
                slot = self.slot_of(i, k)
                if slot >= 0:
                    self.sums[slot].n += 1
        for slot in range(self.n_slots):
            self.sums[slot].first = -1
            if self.sums[slot].n > 2:
                self.sums[slot].first = self.n_held
                self.n_held += self.sums[slot].n
            self.sums[slot].n = 0
        self.held = <PyObject **>allocate(self.n_held, sizeof(PyObject *))
        return 0

    cdef int slot_of(self, int index, int k) noexcept:
        """The pending slot that edge `k` of a visit leads to, or -1."""
        cdef int target = self.targets[self.visits[index].first_edge + k]
        if target < 0:
            return -1
        return self.visits[target].first_slot + (<Node>self.visits[index].node).edges[k].slot

    cdef int seed(self, list starts) except -1:
        """Put the roots' gradients in."""
        cdef int i, slot
        for i, slot, gradient in starts:
            self.put(self.visits[i].first_slot + slot, gradient)
        for i, _, _ in starts:
            self.enqueue_if_ready(i)
        return 0

    # -- from outside

    @property
    def done(self):
        return self.remaining == 0

    def reaches(self, Node node not None):
        """Tell whether a node takes part in this pass."""
        return self.n_buckets > 0 and self.buckets[self.lookup(<PyObject *>node)] != 0

    def deliver(self, Node node not None, grads):
        """Resolve a send, once: with a gradient or None for each slot, or None for none at all."""
        cdef int index, i
        if node not in self.undelivered:
            raise GraphError(f"cannot deliver to {node.name()}: it does not wait in this pass")
        if grads is not None and len(grads) != node.n_slots:
            raise GraphError(f"cannot deliver to {node.name()}: it has {node.n_slots} slots, "
                             f"not {len(grads)}")
        if grads is not None:
            grads = [None if gradient is None else self.fit_delivered(node, i, gradient)
                     for i, gradient in enumerate(grads)]
        index = self.undelivered.pop(node)
        for i, gradient in enumerate(grads or ()):
            if gradient is not None:
                self.put(self.visits[index].first_slot + i, gradient)
        self.visits[index].waiting -= 1
        self.enqueue_if_ready(index)

    cdef object fit_delivered(self, Node node, int i, object gradient):
        """Bring a gradient to the shape of what its slot stands for: that of the edge's target."""
        cdef Meta *meta = &node.slots[i]
        if meta.ndim < 0 and i < node.n_edges and node.edges[i].node != NULL:
            meta = &(<Node>node.edges[i].node).slots[node.edges[i].slot]
        return fit(spread_out(gradient, meta), meta, node, self.create)

    cdef int refuse_boundaries(self, inputs) except -1:
        """Raise, before anything has run, if gradients would have to leave this worker."""
        cdef int i
        for i in range(self.n_visits):
            if (<Node>self.visits[i].node).boundary:
                refusal = (<object>self.visits[i].node).refusal(inputs)
                if refusal is not None:
                    raise refusal
        return 0

    def run(self):
        """Run all that is ready; return the boundary nodes that became complete since last time.

        Returns
        -------
        list
            (node, gradients): a gradient or None for each slot, or None if there is none at all.
            A large gradient has extent 1 along axes where it is the same all along; `deliver`
            takes it so.
        """
        cdef int steps = 0, index = -1
        if self.create:
            self.set_mode()
        try:
            while self.n_heap:
                index = self.pop()
                self.step(index)
                self.remaining -= 1
                steps += 1
                if not steps & 127:
                    breathe()
        except BaseException as error:
            self.blame(<Node>self.visits[index].node, error)
            raise
        finally:
            if self.mode is not None:
                PyContextVar_Reset(grad_mode, self.mode)
                self.mode = None
        complete = self.complete
        self.complete = []
        return complete

    cdef int set_mode(self) except -1:
        """Say whether operations are recorded: before code that may have some (hooks, rules)."""
        if self.mode is None:
            self.mode = PyContextVar_Set(grad_mode, bool(self.create))
        return 0

    cdef int blame(self, Node node, object error) except -1:
        """Note at which node the pass failed, and where that was recorded if it is known."""
        self.failed_node = node.name()
        if node.hooks is not None:
            self.failed_site = node.hooks.notes.get(RECORDED_AT, "")
        recorded = f", recorded at {self.failed_site}" if self.failed_site else ""
        error.add_note(f"in the backward pass, at {self.failed_node}{recorded}")
        return 0

    # -- the ready heap: latest node first

    cdef int enqueue_if_ready(self, int index) except -1:
        cdef unsigned long long sequence
        cdef int i, parent
        if self.visits[index].waiting or self.visits[index].queued:
            return 0
        self.visits[index].queued = 1
        if self.n_heap == self.room_heap:
            self.room_heap = max(16, 2 * self.room_heap)
            self.heap = <Ready *>grow(self.heap, self.room_heap * sizeof(Ready))
        sequence = (<Node>self.visits[index].node).sequence
        i = self.n_heap
        self.n_heap += 1
        while i > 0:
            parent = (i - 1) >> 1
            if self.heap[parent].sequence >= sequence:
                break
            self.heap[i] = self.heap[parent]
            i = parent
        self.heap[i].sequence = sequence
        self.heap[i].visit = index
        return 0

    cdef int pop(self) noexcept:
        cdef int first = self.heap[0].visit, i = 0, child, right
        cdef Ready last
        self.n_heap -= 1
        last = self.heap[self.n_heap]
        while True:
            child = 2 * i + 1
            if child >= self.n_heap:
                break
            right = child + 1
            if right < self.n_heap and self.heap[right].sequence > self.heap[child].sequence:
                child = right
            if last.sequence >= self.heap[child].sequence:
                break
            self.heap[i] = self.heap[child]
            i = child
        self.heap[i] = last
        return first

    # -- gradients on their way

    cdef int put(self, int slot, object gradient) except -1:
        """Add a contribution to a slot, or keep it apart until the others are there."""
        cdef PyObject *old
        cdef Sum *sum
        if self.sums != NULL and self.sums[slot].first >= 0:
            sum = &self.sums[slot]
            Py_INCREF(gradient)
            self.held[sum.first + sum.n] = <PyObject *>gradient
            sum.n += 1
            return 0
        old = self.pending[slot]
        if old != NULL:
            self.pending[slot] = NULL
            try:
                gradient = add_gradients(old, <PyObject *>gradient, self.create)
            finally:
                Py_XDECREF(old)
        Py_INCREF(gradient)
        self.pending[slot] = <PyObject *>gradient
        return 0

    cdef object take(self, int slot):
        """The sum of a slot, which becomes empty; None if nothing arrived."""
        cdef PyObject *gradient
        if self.sums != NULL and self.sums[slot].first >= 0:
            self.add_held(&self.sums[slot], slot)
        gradient = self.pending[slot]
        if gradient == NULL:
            return None
        self.pending[slot] = NULL
        result = <object>gradient
        Py_XDECREF(gradient)
        return result

    cdef int add_held(self, Sum *sum, int slot) except -1:
        """Add up what was kept apart; in an order of its own, if the order makes a difference."""
        cdef int i
        cdef PyObject *held
        cdef PyObject **first = self.held + sum.first
        if sum.n > 2:
            sort_gradients(first, sum.n)
        sum.first = -1
        for i in range(sum.n):
            held = first[i]
            first[i] = NULL
            try:
                self.put(slot, <object>held)
            finally:
                Py_XDECREF(held)
        return 0

    cdef int contribute(self, int index, int k, object gradient) except -1:
        """Send a gradient, or none, along edge `k` of a node."""
        cdef Node node = <Node>self.visits[index].node
        cdef Edge *edge = &node.edges[k]
        cdef int target = self.targets[self.visits[index].first_edge + k]
        cdef Node owner
        if target < 0:
            return 0
        if gradient is not None:
            owner = <Node>edge.node
            if self.create or not cnp.PyArray_CheckExact(gradient) or not same_meta(
                    &owner.slots[edge.slot], <cnp.ndarray>gradient):
                gradient = fit(gradient, &owner.slots[edge.slot], node, self.create)
            self.put(self.visits[target].first_slot + edge.slot, gradient)
        self.visits[target].waiting -= 1
        return self.enqueue_if_ready(target)

    # -- running nodes

    cdef int step(self, int index) except -1:
        """Run one node of which all gradients are there."""
        cdef Visit *visit = &self.visits[index]
        cdef Node node = <Node>visit.node
        cdef list grads
        cdef bint none = True
        cdef int i
        if node.n_slots == 1 and node.hooks is None and self.wanted is None:
            if type(node) is OpNode:
                gradient = self.take(visit.first_slot)
                if gradient is None:
                    return self.skip(index)
                return self.run_rules(index, <OpNode>node, gradient)
            if type(node) is AccumulateGrad and (<AccumulateGrad>node).variable.hooks is None:
                gradient = self.take(visit.first_slot)
                if gradient is None:
                    return 0
                return accumulate(<AccumulateGrad>node, <PyObject *>gradient, self.table)
            if node.passes_on and node.n_edges == 1:
                return self.contribute(index, 0, self.take(visit.first_slot))
        if node.hooks is not None or type(node) is AccumulateGrad:
            self.set_mode()
        grads = []
        for i in range(node.n_slots):
            gradient = self.take(visit.first_slot + i)
            none = none and gradient is None
            grads.append(gradient)
        if none:
            if node.boundary:
                self.complete.append((node, None))
            if type(node) is AccumulateGrad and node.hooks is not None:
                return self.step_leaf(index, <AccumulateGrad>node, grads)
            return self.skip(index)
        if type(node) is AccumulateGrad:
            return self.step_leaf(index, <AccumulateGrad>node, grads)
        if node.hooks is not None:
            run_before(node, grads, self.create)
        if self.wanted is not None:
            self.capture(index, grads)
        if node.boundary:
            self.complete.append((node, tuple([condense(gradient) for gradient in grads])))
            return self.skip(index)
        if not visit.needed & RUNS:
            return self.skip(index)
        if type(node) is OpNode:
            return self.run_rules(
                index, <OpNode>node, grads[0] if node.n_slots == 1 else fill(node, grads))
        return self.run_apply(index, node, grads)

    cdef int skip(self, int index) except -1:
        """None is a gradient: it counts down along all edges, without arithmetic."""
        cdef int k
        for k in range((<Node>self.visits[index].node).n_edges):
            self.contribute(index, k, None)
        return 0

    cdef int capture(self, int index, list grads) except -1:
        for slot, position in self.wanted.get(index, ()):
            self.captured[position] = grads[slot]
        return 0

    cdef int step_leaf(self, int index, AccumulateGrad node, list grads) except -1:
        """A leaf with hooks, or in a pass with inputs; its node's hooks run in any case."""
        cdef Hooks hooks = node.variable.hooks
        cdef dict wanted = self.wanted
        if hooks is not None and 0 in hooks.tensor and grads[0] is not None:
            own(grads)
            grads[0] = hooked(hooks.tensor[0], grads[0], self.create)
        if node.hooks is not None:
            run_before(node, grads, self.create)
        gradient = grads[0]
        grads[0] = None
        if gradient is not None:
            gradient = fit(gradient, &node.near_slot, node, self.create)
        if wanted is not None:
            self.capture(index, [gradient])
            return 0
        if gradient is not None:
            accumulate(node, <PyObject *>gradient, self.table)
        if node.hooks is not None:
            run_after(node, (), [gradient], self.create)
        if hooks is not None and self.table is None and gradient is not None:
            for hook in list(hooks.stored):
                hook(node.variable)
        return 0

    cdef int run_apply(self, int index, Node node, list grads) except -1:
        """A node written in Python."""
        cdef int k
        self.set_mode()
        if node.writes:
            own(grads)
        results = node.apply(tuple(grads))
        if not isinstance(results, (tuple, list)):
            results = (results,)
        if len(results) != node.n_edges:
            raise GraphError(f"cannot run {node.name()}: it returned {len(results)} gradients "
                             f"for {node.n_edges} edges")
        if node.hooks is not None:
            results = run_after(node, results, grads, self.create)
        for k in range(node.n_edges):
            self.contribute(index, k, results[k])
        if not self.retain:
            node.release()
        return 0

    cdef int run_rules(self, int index, OpNode node, object gradient) except -1:
        """An operation: one rule for each edge, called with what was saved."""
        cdef PyObject *near[NEAR_ARGS + 3]
        cdef PyObject **stack = near
        cdef int i, k
        cdef list results = None if node.hooks is None else []
        cdef list keep = [] if node.op.shapes else None
        check_saved(node)
        if node.n_args > NEAR_ARGS:
            stack = <PyObject **>allocate(node.n_args + 3, sizeof(PyObject *))
        answer = answer_of(node, self.create)
        stack[1] = <PyObject *>gradient
        stack[2] = <PyObject *>answer
        for i in range(node.n_args):
            stack[3 + i] = <PyObject *>None
            if node.args is not None:
                stack[3 + i] = PyTuple_GET_ITEM(node.args, i)
                if not self.create and isinstance(<object>stack[3 + i], TensorBase):
                    stack[3 + i] = <PyObject *>(<TensorBase>stack[3 + i]).array
        try:
            for k in range(node.n_edges):
                value = self.run_rule(index, node, k, stack, keep)
                if results is None:
                    self.contribute(index, k, value)
                else:
                    results.append(value)
        finally:
            if stack != near:
                PyMem_Free(stack)
        if results is not None:
            outputs = list(gradient) if type(gradient) is tuple else [gradient]
            results = list(run_after(node, results, outputs, self.create))
            for k in range(node.n_edges):
                self.contribute(index, k, results[k])
        return 0 if self.retain else free_saved(node)

    cdef object run_rule(self, int index, OpNode node, int k, PyObject **stack, list keep):
        cdef Edge *edge = &node.edges[k]
        cdef int argument = node.edges[k].argument
        cdef int target = self.targets[self.visits[index].first_edge + k]
        cdef PyObject *kwargs = NULL
        cdef object position
        if target >= 0 and not self.visits[target].needed:
            return None
        if node.op.kernel and not self.create:
            if node.op.kernel >= SUM:
                value = moved(node, &(<Node>edge.node).slots[edge.slot], <object>stack[1])
            else:
                value = small_gradient(
                    node.op.kernel, argument, <object>stack[1], <object>stack[3],
                    <object>stack[3 + (node.n_args > 1)], <object>stack[2])
                if value is None:
                    value = scaled(
                        node.op.kernel, argument, <object>stack[1], <object>stack[3],
                        <object>stack[3 + (node.n_args > 1)])
            if value is not None:
                return value
        if node.op.shapes:
            add_specs(node, stack, keep)
        if node.kwargs is not None:
            kwargs = <PyObject *>node.kwargs
        self.set_mode()
        if node.op.variadic is not None:
            position = argument
            stack[0] = <PyObject *>position
            return PyObject_VectorcallDict(node.op.variadic, stack, node.n_args + 3, kwargs)
        rule = node.op.rules[argument]
        return PyObject_VectorcallDict(rule, stack + 1, node.n_args + 2, kwargs)


cdef int add_specs(OpNode node, PyObject **stack, list keep) except -1:
    """Give rules the shapes of arguments that were not saved: those of the slots behind them."""
    cdef int k
    cdef Edge *edge
    cdef Meta *meta
    for k in range(node.n_edges):
        edge = &node.edges[k]
        if stack[3 + edge.argument] == <PyObject *>None:
            meta = &(<Node>edge.node).slots[edge.slot]
            spec = new_spec(meta_shape(meta), meta_dtype(meta))
            keep.append(spec)
            stack[3 + edge.argument] = <PyObject *>spec
    return 0


cdef object moved(OpNode node, Meta *meta, object gradient):
    """The gradient of an operation that only moves elements; None: ask its rule."""
    cdef cnp.PyArray_Dims dims
    if meta.ndim < 0 or node.kwargs is not None or not cnp.PyArray_CheckExact(gradient):
        return None
    if node.op.kernel == SUM:
        return filled(meta.ndim, meta_dims(meta), meta.typenum, gradient)
    if node.op.kernel == RESHAPE:
        dims.ptr = meta_dims(meta)
        dims.len = meta.ndim
        return cnp.PyArray_Newshape(<cnp.ndarray>gradient, &dims, cnp.NPY_CORDER)
    if node.op.kernel == GETITEM and is_place(node.args[1]):
        result = cnp.PyArray_ZEROS(meta.ndim, meta_dims(meta), meta.typenum, 0)
        result[node.args[1]] = gradient
        return result
    return None


cdef bint is_place(object index) except -1:
    """An index of integers and slices selects each element at most once."""
    if type(index) is tuple:
        for part in <tuple>index:
            if not (type(part) is int or type(part) is slice):
                return False
        return True
    return type(index) is int or type(index) is slice


cdef GraphTask local_pass(list roots, object retain_graph, bint create_graph, object inputs):
    """What ``GraphTask(...)`` and ``run`` do for a pass without sends, without their arguments."""
    cdef GraphTask task = GraphTask.__new__(GraphTask)
    task.begin(roots, (), retain_graph, create_graph, inputs, None)
    task.refuse_boundaries(inputs)
    task.run()
    return task


cdef object seed_of(TensorBase root, object gradient, bint create):
    """The gradient a pass starts with at `root`."""
    if not root.needs:
        raise GraphError("cannot run backward: the tensor does not require grad",
                         hint="none of the values it was computed from requires grad")
    if gradient is None:
        if cnp.PyArray_SIZE(root.array) != 1:
            raise GraphError(
                f"cannot run backward from shape {root.shape}: only a tensor with one element "
                "has an implicit gradient",
                hint="pass gradient=, or reduce with .sum()",
            )
        return one_like(root.array)
    shape = np.shape(unwrap(gradient))
    if shape != np.shape(root.array):
        raise GraphError(f"cannot run backward: the gradient has shape {shape}, "
                         f"the tensor {root.shape}")
    return gradient if create and isinstance(gradient, TensorBase) else np.asarray(unwrap(gradient))


def grad(outputs, inputs, grad_outputs=None, *, retain_graph=None, create_graph=False,
         allow_unused=False):
    """Return the gradients of `outputs` with respect to `inputs`, leaving ``.grad`` alone.

    Parameters
    ----------
    outputs, inputs
        A tensor or a sequence of them.
    grad_outputs
        Gradient of each output; may be left out for outputs with one element.
    retain_graph, create_graph
        As in `Tensor.backward`.
    allow_unused
        Give None for an input on which no output depends, instead of raising GraphError.

    Returns
    -------
    tuple of Tensor
        One for each input, in its shape and dtype.
    """
    outputs = (outputs,) if isinstance(outputs, TensorBase) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, TensorBase) else tuple(inputs)
    if grad_outputs is None:
        grad_outputs = (None,) * len(outputs)
    elif isinstance(grad_outputs, (TensorBase, np.ndarray)):
        grad_outputs = (grad_outputs,)
    if len(grad_outputs) != len(outputs):
        raise ValueError(f"cannot pair {len(outputs)} outputs with {len(grad_outputs)} gradients")
    roots = [(output, seed_of(output, gradient, create_graph))
             for output, gradient in zip(outputs, grad_outputs)]
    cdef GraphTask task = local_pass(roots, retain_graph, create_graph, inputs)
    if not allow_unused and any([found is None for found in task.captured]):
        raise GraphError("cannot find a gradient: an input is not used by the outputs",
                         hint="pass allow_unused=True to get None")
    own(task.captured)
    return tuple([as_tensor(found) for found in task.captured])
