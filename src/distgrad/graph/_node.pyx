# cython: auto_pickle=False, autotestdict=False
"""Nodes, operations and what they record: the graph.

Operations run on plain arrays; if an argument requires grad, an OpNode is recorded
that keeps what the gradient rules of the operation read.
"""

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF, Py_XINCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM

from distgrad.graph._kernels cimport (
    ADD, DIVIDE, EXP, GETITEM, MULTIPLY, NEGATIVE, RELU, RESHAPE, SIGMOID, SQRT, SQUARE,
    SUBTRACT, SUM, TANH, small_binary, small_negative,
)

import operator

import numpy as np

from distgrad.config import config
from distgrad.errors import GraphError
from distgrad.graph.modes import grad_mode as _grad_mode
from distgrad.graph.tracing import RECORDED_AT, call_site

cnp.import_array()

cdef extern from *:
    """
    /* Graphs are chains of any length: what a dying node or tensor held is released from
       a list by the outermost release of the thread, so that freeing never recurses. */
    static _Thread_local struct {
        PyObject **items; Py_ssize_t used, room; int busy;
    } dg_dying;

    static int dg_defer(PyObject *object) {
        if (dg_dying.used == dg_dying.room) {
            Py_ssize_t room = dg_dying.room ? 2 * dg_dying.room : 64;
            PyObject **items = realloc(dg_dying.items, room * sizeof(PyObject *));
            if (!items) return 0;
            dg_dying.items = items;
            dg_dying.room = room;
        }
        dg_dying.items[dg_dying.used++] = object;
        return 1;
    }

    static void dg_release(PyObject *object) {
        if (!object) return;
        if (Py_REFCNT(object) > 1) { Py_DECREF(object); return; }
        if (dg_dying.busy) {
            if (!dg_defer(object)) Py_DECREF(object);
            return;
        }
        dg_dying.busy = 1;
        Py_DECREF(object);
        while (dg_dying.used) {
            PyObject *next = dg_dying.items[--dg_dying.used];
            Py_DECREF(next);
        }
        dg_dying.busy = 0;
    }

    static unsigned long long dg_sequence_counter;
    static inline unsigned long long dg_next_sequence(void) {
        return __atomic_add_fetch(&dg_sequence_counter, 1, __ATOMIC_RELAXED);
    }

    /* Live-object books of a debug build. */
    static Py_ssize_t dg_live[4];
    static inline void dg_count(int kind, int change) {
    #if DISTGRAD_DEBUG
        __atomic_add_fetch(&dg_live[kind], change, __ATOMIC_RELAXED);
    #endif
    }

    static inline PyObject *dg_new(PyObject *type, PyObject *args) {
        return ((PyTypeObject *)type)->tp_new((PyTypeObject *)type, args, NULL);
    }
    """
    object dg_new(object type, tuple args)
    void dg_count(int kind, int change) noexcept nogil
    Py_ssize_t dg_live[4]
    bint DISTGRAD_DEBUG
    void dg_release(PyObject *object) noexcept
    unsigned long long dg_next_sequence() noexcept nogil

cdef extern from "Python.h":
    PyObject *Py_True
    int PyContextVar_Get(PyObject *var, PyObject *default, PyObject **value) except -1
    object PyObject_Vectorcall(object callable, PyObject **args, size_t n, PyObject *names)
    object PyObject_Call(object callable, object args, PyObject *kwargs)
    void PyObject_GC_UnTrack(object value)
    void *PyThread_allocate_lock() noexcept
    void PyThread_free_lock(void *lock) noexcept

cdef extern from "numpy/arrayobject.h":
    object array_from_scalar "PyArray_FromScalar" (object scalar, void *dtype)

cdef object grad_mode = _grad_mode
cdef bint tracing = False       # config.trace_graph


def _trace(bint on):
    global tracing
    tracing = on


config.on_change("trace_graph", _trace)


cdef void count_pass(int change) noexcept:
    """Enter a pass that begins or ends into the books; for the engine."""
    dg_count(PASSES, change)


def live_objects():
    """Return the number of live objects by kind; None in a build without books."""
    if not DISTGRAD_DEBUG:
        return None
    return {"tensors": dg_live[TENSORS], "nodes": dg_live[NODES], "buffers": dg_live[BUFFERS],
            "passes": dg_live[PASSES]}


cdef void dg_drop(PyObject *object) noexcept:
    """Give a reference back without recursion; for other modules."""
    dg_release(object)


cdef bint grad_enabled() except -1:
    cdef PyObject *value = NULL
    PyContextVar_Get(<PyObject *>grad_mode, NULL, &value)
    cdef bint enabled = value == Py_True
    Py_XDECREF(value)
    return enabled


# ---------------------------------------------------------------- what a slot takes

cdef inline void forget(Meta *meta) noexcept:
    if meta.ndim > NEAR_DIMS:
        PyMem_Free(meta_dims(meta))
    meta.ndim = -1


cdef int describe(Meta *meta, cnp.ndarray array) except -1:
    cdef int i, ndim = cnp.PyArray_NDIM(array)
    cdef void *far
    forget(meta)
    if ndim > NEAR_DIMS:
        far = PyMem_Malloc(ndim * sizeof(cnp.npy_intp))
        if far == NULL:
            raise MemoryError()
        meta.near[0] = <cnp.npy_intp>far
    meta.ndim = ndim
    meta.typenum = cnp.PyArray_TYPE(array)
    cdef cnp.npy_intp *dims = meta_dims(meta)
    for i in range(ndim):
        dims[i] = cnp.PyArray_DIM(array, i)
    return 0


cdef tuple meta_shape(Meta *meta):
    return tuple([meta_dims(meta)[i] for i in range(meta.ndim)])


cdef object meta_dtype(Meta *meta):
    return cnp.PyArray_DescrFromType(meta.typenum)


# ---------------------------------------------------------------- nodes

@cython.final
cdef class Spec:
    """Shape and dtype of an argument whose value was not saved."""

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@cython.freelist(512)
cdef class TensorBase:
    """What a Tensor consists of; its behaviour is in tensor.pyx."""

    def __cinit__(self):
        dg_count(TENSORS, 1)

    def __dealloc__(self):
        dg_count(TENSORS, -1)
        dg_release(self.node)


@cython.final
cdef class Storage:
    """Counts the writes to one piece of memory."""

    def __cinit__(self):
        dg_count(BUFFERS, 1)

    def __dealloc__(self):
        dg_count(BUFFERS, -1)


@cython.final
cdef class Hooks:
    """Callbacks of a node or of a leaf."""

    def __cinit__(self):
        self.tensor = {}
        self.before = []
        self.after = []
        self.stored = []
        self.retained = {}
        self.notes = {}


class RemovableHandle:
    """What registering a hook returns; `remove` takes the hook away again."""

    def __init__(self, hooks, hook):
        self._hooks = hooks
        self._hook = hook

    def remove(self):
        """Take the hook away; a second call does nothing."""
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.remove()


cdef object add_hook(list hooks, object hook):
    if not callable(hook):
        raise TypeError(f"cannot register a hook: {type(hook).__name__} is not callable")
    hooks.append(hook)
    return RemovableHandle(hooks, hook)


@cython.no_gc
cdef class Node:
    """An operation of the graph; subclass it for operations that are not array functions.

    Parameters
    ----------
    edges
        Where gradients go: (node, gradient slot of that node), one for each argument;
        the node may be None.
    num_inputs
        Number of gradient slots: outputs of the forward operation.
    """

    def __cinit__(self):
        dg_count(NODES, 1)
        self.edges = self.near_edges
        self.slots = &self.near_slot
        self.near_slot.ndim = -1

    def __init__(self, edges=(), num_inputs=1):
        edges = tuple(edges)
        make_room(self, len(edges), num_inputs)
        for i, (node, slot) in enumerate(edges):
            if node is not None and not 0 <= slot < (<Node?>node).n_slots:
                raise ValueError(f"cannot connect {self.name()}: {node.name()} has no slot {slot}")
            add_edge(self, None if node is None else <Node?>node, slot, i)
        self.take_place()

    cpdef int _link(self, tensors, Py_ssize_t num_inputs) except -1:
        """Do what `__init__` does, for a subclass, with edges to tensors that require grad."""
        cdef TensorBase tensor
        if self.sequence != 0:
            raise GraphError(f"cannot connect {self.name()} again")
        make_room(self, len(tensors), num_inputs)
        for i, tensor in enumerate(tensors):
            add_edge(self, edge_of(tensor), tensor.slot, i)
        return self.take_place()

    cdef int take_place(self) except -1:
        self.sequence = dg_next_sequence()
        if tracing:
            hooks_of(self).notes[RECORDED_AT] = call_site()
        return 0

    def __dealloc__(self):
        cdef int i
        dg_count(NODES, -1)
        for i in range(self.n_edges):
            dg_release(self.edges[i].node)
        for i in range(self.n_slots):
            forget(&self.slots[i])
        if self.edges != self.near_edges:
            PyMem_Free(self.edges)
        if self.slots != &self.near_slot:
            PyMem_Free(self.slots)

    def __repr__(self):
        return f"<{self.name()} object at {id(self):#x}>"

    def name(self):
        """Name for people, such as ``MultiplyBackward``."""
        return type(self).__name__

    def apply(self, grads):
        """Return the gradient for each edge, or None, from those of the slots.

        Parameters
        ----------
        grads
            One array (under ``create_graph`` a Tensor) or None for each slot.
        """
        raise NotImplementedError(f"cannot run {self.name()}: it has no apply")

    def refusal(self, inputs=None):
        """Return the error of a pass on this worker alone that would reach this boundary.

        None if gradients of `inputs`, all that are asked for, do not come through it.
        """
        what = "run backward" if inputs is None else "find the gradients of inputs"
        return GraphError(
            f"cannot {what} on this worker alone: {self.name()} leads to another worker",
            hint="in the context, use distgrad.autograd.backward(context_id, roots) and "
            "get_gradients(context_id); or detach() what came from there",
        )

    def release(self):
        """Drop saved values; called after `apply` in a pass that does not retain the graph."""

    @property
    def next_functions(self):
        return tuple([
            (<object>self.edges[i].node if self.edges[i].node != NULL else None,
             self.edges[i].slot)
            for i in range(self.n_edges)
        ])

    @property
    def num_inputs(self):
        return self.n_slots

    def _sequence_nr(self):
        """Order of creation: larger than that of all nodes this one leads to."""
        return self.sequence

    @property
    def metadata(self):
        """A dictionary for whatever the user wants to remember with this node."""
        return hooks_of(self).notes

    def register_hook(self, hook):
        """Call ``hook(input_grads, output_grads)`` after the node ran.

        Both are tuples of Tensors and None; a tuple returned replaces the first.
        """
        return add_hook(hooks_of(self).after, hook)

    def register_prehook(self, hook):
        """Call ``hook(output_grads)`` before the node runs; a tuple returned replaces it."""
        return add_hook(hooks_of(self).before, hook)


cdef Hooks hooks_of(Node node):
    if node.hooks is None:
        node.hooks = Hooks()
    return node.hooks


cdef int make_room(Node node, Py_ssize_t n_edges, Py_ssize_t n_slots) except -1:
    """Allocate what does not fit into the node itself; slots are unknown at first."""
    if n_edges > NEAR_EDGES:
        node.edges = <Edge *>PyMem_Malloc(n_edges * sizeof(Edge))
        if node.edges == NULL:
            node.edges = node.near_edges
            raise MemoryError()
    if n_slots > 1:
        node.slots = <Meta *>PyMem_Calloc(n_slots, sizeof(Meta))
        if node.slots == NULL:
            node.slots = &node.near_slot
            raise MemoryError()
    for i in range(n_slots):
        node.slots[i].ndim = -1
    node.n_slots = <int>n_slots
    return 0


cdef inline void add_edge(Node node, Node target, int slot, int argument) noexcept:
    cdef Edge *edge = &node.edges[node.n_edges]
    edge.node = NULL if target is None else <PyObject *>target
    Py_XINCREF(edge.node)
    edge.slot = slot
    edge.argument = argument
    node.n_edges += 1


@cython.final
@cython.no_gc
cdef class AccumulateGrad(Node):
    """The end of the graph: adds what arrives to the gradient of a leaf."""

    def __cinit__(self):
        self.n_slots = 1
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError()

    def __init__(self):
        raise TypeError("cannot create AccumulateGrad: use gradient_edge(tensor)")

    def __dealloc__(self):
        if self.variable is not None:
            self.variable.accumulator = NULL
        PyThread_free_lock(self.lock)


cdef AccumulateGrad accumulator_of(TensorBase leaf):
    cdef AccumulateGrad node
    if leaf.accumulator != NULL:
        return <AccumulateGrad>leaf.accumulator
    node = AccumulateGrad.__new__(AccumulateGrad)
    describe(&node.near_slot, leaf.array)
    node.sequence = dg_next_sequence()
    node.variable = leaf
    leaf.accumulator = <PyObject *>node
    return node


cdef Node edge_of(TensorBase tensor):
    if tensor.node != NULL:
        return <Node>tensor.node
    return accumulator_of(tensor)


def gradient_edge(TensorBase tensor not None):
    """Return where the gradient of a tensor goes: (node, gradient slot).

    The node is the operation that made the tensor, or for a leaf its AccumulateGrad.
    """
    if not tensor.needs:
        raise GraphError("cannot find a gradient edge: the tensor does not require grad")
    return edge_of(tensor), tensor.slot


def set_history(TensorBase tensor not None, Node node not None, int output_nr):
    """Make a fresh tensor the output `output_nr` of `node`."""
    if not 0 <= output_nr < node.n_slots:
        raise ValueError(f"cannot set history: {node.name()} has no output {output_nr}")
    if not is_inexact(cnp.PyArray_TYPE(tensor.array)):
        raise GraphError(f"cannot set history: {tensor.array.dtype} has no gradient")
    if tensor.node != NULL or tensor.accumulator != NULL:
        raise GraphError("cannot set history: the tensor already is part of a graph")
    attach(tensor, node, output_nr)


cdef int attach(TensorBase tensor, Node node, int slot) except -1:
    describe(&node.slots[slot], tensor.array)
    Py_INCREF(node)
    tensor.node = <PyObject *>node
    tensor.slot = slot
    tensor.needs = True
    return 0


# ---------------------------------------------------------------- operations

cdef dict KERNELS = {
    np.add: ADD, np.subtract: SUBTRACT, np.multiply: MULTIPLY, np.true_divide: DIVIDE,
    np.negative: NEGATIVE, np.exp: EXP, np.tanh: TANH, np.sqrt: SQRT, np.square: SQUARE,
    np.reshape: RESHAPE, operator.getitem: GETITEM,
}
cdef dict NAMED_KERNELS = {"relu": RELU, "sigmoid": SIGMOID, "sum": SUM}
cdef dict OPS = {}          # function -> Op
cdef dict FUNCTIONS = {}    # function -> callable on tensors, for functions made of operations


@cython.final
cdef class Op:
    """A function on arrays with its gradient rules; calling it records the graph.

    Parameters
    ----------
    function
        Takes and returns arrays.
    name
        For graphs and errors; default the function's.
    differentiable
        False: results never require grad.
    """

    def __init__(self, function, name=None, differentiable=True):
        self.function = function
        self.name = name or function.__name__
        self.differentiable = differentiable
        self.kernel = KERNELS.get(function) or NAMED_KERNELS.get(name, 0)
        self.rules = ()
        for i in range(8):
            self.needs[i] = NEED_ALL

    @property
    def __name__(self):
        return self.name

    @property
    def has_rules(self):
        return self.variadic is not None or len(self.rules) > 0

    def defvjp(self, *rules, needs=None, variadic=None):
        """Set one gradient rule for each argument.

        Parameters
        ----------
        rules
            ``rule(g, ans, *args, **kwargs)`` returns the gradient of its argument for the
            gradient `g` of the result `ans`; None for an argument without gradient. Rules need
            not undo broadcasting: the engine sums gradients down to the argument's shape.
        needs
            For each rule what it reads: ``"x"``, ``"y"``, ``"z"`` the first arguments, ``"a"``
            the result, ``"s"`` shapes of arguments (which are `Spec` then); default all.
        variadic
            Instead of rules, one for any argument: ``rule(position, g, ans, *args, **kwargs)``.
        """
        self.rules = rules
        self.variadic = variadic
        if needs is not None:
            for i, names in enumerate(needs):
                self.needs[i] = 0
                for name in names:
                    if name == "s":
                        self.shapes = True
                    else:
                        self.needs[i] |= NEED_ANSWER if name == "a" else 1 << "xyz".index(name)
        return self

    def __call__(self, *args, **kwargs):
        return call_op(self, args, kwargs)


def register(function, implementation):
    """Make `implementation` (an `Op`, or a callable on tensors) what a function means.

    It is used when NumPy's `function` is called with a Tensor.
    """
    if isinstance(implementation, Op):
        OPS[function] = implementation
    FUNCTIONS[function] = implementation


def operation(function):
    """Return the `Op` registered for an array function; make one without rules if there is none."""
    op = OPS.get(function)
    if op is None:
        op = Op(function)
        register(function, op)
    return op


def registered():
    """Return a copy of the table of functions that work on tensors."""
    return dict(FUNCTIONS)


cdef object rule_of(Op op, int argument):
    """The rule for an argument, or a TypeError that names the two ways out."""
    if op.variadic is not None:
        return op.variadic
    if argument < len(op.rules):
        rule = op.rules[argument]
        if rule is not None:
            return rule
    raise TypeError(no_rule(op.name, f" for argument {argument}"))


cdef str no_rule(str name, str what):
    return (
        f"cannot differentiate {name}: no gradient rule{what}\n"
        "hint: pass tensor.detach() to leave it out of the graph, or wrap the function "
        "in @distgrad.primitive and give it rules with defvjp"
    )


cdef inline unsigned int need_mask(Op op, int argument) noexcept:
    return op.needs[argument if argument < 8 else 7]


@cython.final
@cython.no_gc
cdef class OpNode(Node):
    """A recorded call of an operation."""

    def __init__(self):
        raise TypeError("cannot create OpNode: operations record themselves")

    def name(self):
        return "".join([part.capitalize() for part in self.op.name.split("_")]) + "Backward"


cdef OpNode new_node(Op op, Py_ssize_t n_args):
    cdef OpNode node = OpNode.__new__(OpNode)
    make_room(node, n_args, 1)
    node.op = op
    node.n_args = <int>n_args
    if tracing:
        hooks_of(node).notes[RECORDED_AT] = call_site()
    return node


cdef int connect(OpNode node, TensorBase tensor, int argument, unsigned int *mask) except -1:
    rule_of(node.op, argument)
    mask[0] |= need_mask(node.op, argument)
    add_edge(node, edge_of(tensor), tensor.slot, argument)
    return 0


cdef object saved_argument(OpNode node, object value, int argument, unsigned int mask):
    cdef TensorBase tensor
    if not isinstance(value, TensorBase):
        return value
    tensor = <TensorBase>value
    if mask & (1u << min(argument, 30)):
        if tensor.storage is not None:
            node.writes += tensor.storage.writes
        return value
    if tensor.needs or not node.op.shapes:
        return None     # the slot that its edge leads to knows the shape
    return new_spec((<object>tensor.array).shape, tensor.array.dtype)


cdef Spec new_spec(tuple shape, object dtype):
    cdef Spec spec = Spec.__new__(Spec)
    spec.shape = shape
    spec.dtype = dtype
    return spec


cdef int save(OpNode node, tuple args, dict kwargs, object answer, unsigned int mask) except -1:
    cdef int i
    cdef bint any_plain = False
    for i in range(node.n_args):
        any_plain |= not isinstance(args[i], TensorBase)
    if any_plain or node.op.shapes or (mask & ~<unsigned int>NEED_ANSWER):
        node.args = tuple([saved_argument(node, args[i], i, mask) for i in range(node.n_args)])
    if kwargs:
        node.kwargs = kwargs
    if mask & <unsigned int>NEED_ANSWER:
        node.answer = answer
    node.sequence = dg_next_sequence()
    return 0


cdef tuple NO_ARGS = ()
cdef type tensor_class = TensorBase     # Tensor, once tensor.pyx is loaded


def set_tensor_class(cls):
    """Tell which class results have; called once by the module of Tensor."""
    global tensor_class
    tensor_class = cls


cdef TensorBase wrap(object result):
    """A tensor without history over an array or scalar."""
    cdef TensorBase tensor = <TensorBase>dg_new(tensor_class, NO_ARGS)
    if not cnp.PyArray_CheckExact(result):
        if cnp.PyArray_CheckScalar(result) and not cnp.PyArray_Check(result):
            result = array_from_scalar(result, NULL)
        else:
            result = np.asarray(result)
    tensor.array = <cnp.ndarray>result
    # Only hooks can close a cycle; until there is one, the collector need not look.
    PyObject_GC_UnTrack(tensor)
    return tensor


cdef object unwrap(object value):
    return (<TensorBase>value).array if isinstance(value, TensorBase) else value


cdef int check_fresh(TensorBase tensor) except -1:
    """A recorded in-place write through another tensor leaves this one without history."""
    if tensor.storage is not None and tensor.storage.rebases != tensor.rebases:
        raise GraphError(
            f"cannot use a tensor: its memory was written by {tensor.storage.writer} through "
            "another tensor in the graph",
            hint="take the view again after the write",
        )
    return 0


cdef object call_op(Op op, tuple args, dict kwargs):
    """Run an operation, and record it if an argument requires grad; arrays alone stay arrays."""
    if kwargs and "out" in kwargs:
        return FUNCTIONS["out"](op, args, kwargs)
    cdef Py_ssize_t i, n = PyTuple_GET_SIZE(args)
    cdef TensorBase tensor
    cdef bint tracked = False, plain = True
    cdef tuple values = PyTuple_New(n)
    for i in range(n):
        value = <object>PyTuple_GET_ITEM(args, i)
        if isinstance(value, TensorBase):
            plain = False
            tensor = <TensorBase>value
            check_fresh(tensor)
            tracked |= tensor.needs
            value = tensor.array
        Py_INCREF(value)
        PyTuple_SET_ITEM(values, i, value)
    if kwargs:
        for value in kwargs.values():
            if isinstance(value, TensorBase):
                kwargs = {key: unwrap_constant(op, value) for key, value in kwargs.items()}
                break
    result = PyObject_Call(op.function, values, <PyObject *>kwargs if kwargs else NULL)
    if plain:
        return result
    outputs = wrap_outputs(result, args)
    if tracked and op.differentiable and grad_enabled():
        record(op, args, kwargs, outputs)
    return outputs


cdef object unwrap_constant(Op op, object value):
    if isinstance(value, TensorBase):
        if (<TensorBase>value).needs and op.differentiable and grad_enabled():
            raise TypeError(no_rule(op.name, " for keyword arguments"))
        return (<TensorBase>value).array
    return value


cdef object wrap_outputs(object result, tuple args):
    """Tensors for arrays and scalars; views share the storage of what they look at."""
    if isinstance(result, (tuple, list)):
        return tuple([wrap_outputs(part, args) for part in result])
    if not (cnp.PyArray_Check(result) or cnp.PyArray_CheckScalar(result)):
        return result
    cdef TensorBase output = wrap(result)
    base = (<object>output.array).base
    for arg in args:
        if isinstance(arg, TensorBase):
            array = <object>(<TensorBase>arg).array
            if array is <object>output.array or (
                base is not None and (base is array or base is array.base)
            ):
                share_storage(output, <TensorBase>arg)
                break
    return output


cdef int record(Op op, tuple args, dict kwargs, object outputs) except -1:
    cdef OpNode node = new_node(op, PyTuple_GET_SIZE(args))
    cdef unsigned int mask = 0
    cdef int i
    cdef bint many = isinstance(outputs, tuple)
    for i in range(node.n_args):
        value = args[i]
        if isinstance(value, TensorBase) and (<TensorBase>value).needs:
            connect(node, <TensorBase>value, i, &mask)
    parts = outputs if many else (outputs,)
    if many:
        node.slots = NULL
        make_room(node, 0, max(2, len(parts)))
    answer = tuple([unwrap(part) for part in parts]) if many else unwrap(outputs)
    save(node, args, kwargs, answer, mask)
    for i, part in enumerate(parts):
        if isinstance(part, TensorBase):
            attach_output(<TensorBase>part, node, i)
    return 0


cdef int attach_output(TensorBase output, OpNode node, int slot) except -1:
    if not is_inexact(cnp.PyArray_TYPE(output.array)):
        return 0
    attach(output, node, slot)
    if node.answer is not None and output.storage is not None:
        node.storage = output.storage
        node.writes += output.storage.writes
    return 0


cdef object unary(Op op, TensorBase x):
    """A ufunc of one argument: `call_op` without its loops and containers."""
    cdef OpNode node
    cdef unsigned int mask = 0
    cdef PyObject *value = <PyObject *>x.array
    check_fresh(x)
    result = small_negative(x.array) if op.kernel == NEGATIVE else None
    if result is None:
        result = PyObject_Vectorcall(op.function, &value, 1, NULL)
    cdef TensorBase output = wrap(result)
    if x.needs and op.differentiable and grad_enabled():
        node = new_node(op, 1)
        connect(node, x, 0, &mask)
        if (mask & 1) or op.shapes:
            node.args = (saved_argument(node, x, 0, mask),)
        finish(node, output, mask)
    return output


cdef int finish(OpNode node, TensorBase output, unsigned int mask) except -1:
    """Give a fresh result the node as its history."""
    if mask & <unsigned int>NEED_ANSWER:
        node.answer = output.array
    node.sequence = dg_next_sequence()
    if is_inexact(cnp.PyArray_TYPE(output.array)):
        attach(output, node, 0)
    return 0


cdef object binary(Op op, object a, object b):
    """A binary operator: `call_op` without its loops and containers."""
    cdef PyObject *values[2]
    cdef bint left = isinstance(a, TensorBase), right = isinstance(b, TensorBase)
    cdef bint tracked = False
    cdef TensorBase output
    if left:
        check_fresh(<TensorBase>a)
        tracked |= (<TensorBase>a).needs
        values[0] = <PyObject *>(<TensorBase>a).array
    elif is_operand(a):
        values[0] = <PyObject *>a
    else:
        return NotImplemented
    if right:
        check_fresh(<TensorBase>b)
        tracked |= (<TensorBase>b).needs
        values[1] = <PyObject *>(<TensorBase>b).array
    elif is_operand(b):
        values[1] = <PyObject *>b
    else:
        return NotImplemented
    result = None
    if op.kernel:
        result = small_binary(op.kernel, <object>values[0], <object>values[1])
    if result is None:
        result = PyObject_Vectorcall(op.function, values, 2, NULL)
    output = wrap(result)
    if tracked and op.differentiable and grad_enabled():
        record_binary(op, a, b, output)
    return output


cdef inline bint is_operand(object value):
    return (
        isinstance(value, (float, int, complex, list, tuple))
        or cnp.PyArray_Check(value) or cnp.PyArray_CheckScalar(value)
    )


cdef int record_binary(Op op, object a, object b, TensorBase output) except -1:
    cdef OpNode node = new_node(op, 2)
    cdef unsigned int mask = 0
    if isinstance(a, TensorBase) and (<TensorBase>a).needs:
        connect(node, <TensorBase>a, 0, &mask)
    if isinstance(b, TensorBase) and (<TensorBase>b).needs:
        connect(node, <TensorBase>b, 1, &mask)
    if (mask & 3) or op.shapes:
        node.args = (saved_argument(node, a, 0, mask), saved_argument(node, b, 1, mask))
    return finish(node, output, mask)


# ---------------------------------------------------------------- shared memory

cdef Storage storage_of(TensorBase tensor):
    """The write counter of a tensor's memory, made when it is first shared or written."""
    cdef OpNode node
    if tensor.storage is None:
        tensor.storage = Storage.__new__(Storage)
        if tensor.node != NULL and type(<object>tensor.node) is OpNode:
            node = <OpNode>tensor.node
            if node.answer is not None and (
                node.answer is tensor.array or type(node.answer) is tuple
            ):
                node.storage = tensor.storage
    return tensor.storage


cdef int share_storage(TensorBase view, TensorBase base) except -1:
    view.storage = storage_of(base)
    view.rebases = view.storage.rebases
    view.is_view = True
    return 0


cdef int mark_written(TensorBase tensor, str writer) except -1:
    cdef Storage storage = storage_of(tensor)
    storage.writes += 1
    storage.writer = f"{writer} at {call_site()}" if tracing else writer
    return 0
