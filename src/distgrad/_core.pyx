"""Tensors, the graph they leave behind, and the backward pass over it.

Operations run on plain arrays; if an argument requires grad, an OpNode is recorded
that keeps what the gradient rules of the operation read. `GraphTask` walks nodes in
order of their creation, newest first, without recursion, with all state of the pass
in C arrays of its own (so two passes may walk one graph at once).
"""

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport Py_EQ, Py_GE, Py_GT, Py_LE, Py_LT, Py_NE, PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF, Py_XINCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.string cimport memset

import operator

from contextlib import ContextDecorator

import numpy as np

from distgrad.errors import GraphError

cnp.import_array()
cnp.import_umath()

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
    """
    void dg_release(PyObject *object) noexcept
    unsigned long long dg_next_sequence() noexcept nogil

cdef extern from "Python.h":
    PyObject *Py_True
    object PyContextVar_New(const char *name, PyObject *default)
    int PyContextVar_Get(PyObject *var, PyObject *default, PyObject **value) except -1
    object PyContextVar_Set(object var, object value)
    int PyContextVar_Reset(object var, object token) except -1
    object PyObject_Vectorcall(object callable, PyObject **args, size_t n, PyObject *names)
    object PyObject_VectorcallDict(object callable, PyObject **args, size_t n, PyObject *kwargs)
    object PyObject_Call(object callable, object args, PyObject *kwargs)
    Py_ssize_t Py_REFCNT(PyObject *object) noexcept
    int PyErr_CheckSignals() except -1
    PyObject *PyDict_GetItemWithError(object table, object key) except? NULL
    void *PyThread_allocate_lock() noexcept
    void PyThread_free_lock(void *lock) noexcept
    int PyThread_acquire_lock(void *lock, int wait) noexcept nogil
    void PyThread_release_lock(void *lock) noexcept nogil

cdef object grad_mode = PyContextVar_New(b"distgrad.grad_mode", Py_True)
cdef object numpy_add = np.add


# ---------------------------------------------------------------- grad mode

cdef bint grad_enabled() except -1:
    cdef PyObject *value = NULL
    PyContextVar_Get(<PyObject *>grad_mode, NULL, &value)
    cdef bint enabled = value == Py_True
    Py_XDECREF(value)
    return enabled


def is_grad_enabled() -> bool:
    """Tell whether operations are recorded in this thread or task."""
    return grad_enabled()


class _GradMode(ContextDecorator):
    """Switch recording on or off inside a ``with`` block or a decorated function."""

    mode = True

    def __init__(self):
        self._tokens = []

    def __enter__(self):
        self._tokens.append(PyContextVar_Set(grad_mode, bool(self.mode)))
        return self

    def __exit__(self, *exc):
        PyContextVar_Reset(grad_mode, self._tokens.pop())

    def _recreate_cm(self):
        return type(self)()


class no_grad(_GradMode):
    """Do not record operations: context manager and decorator."""

    mode = False


class enable_grad(_GradMode):
    """Record operations, also inside `no_grad`: context manager and decorator."""


class set_grad_enabled(_GradMode):
    """Switch recording at once; as a context manager, restore it on leaving.

    Parameters
    ----------
    mode
        Whether operations are recorded.
    """

    def __init__(self, mode):
        super().__init__()
        self.mode = bool(mode)
        self._tokens.append(PyContextVar_Set(grad_mode, self.mode))

    def __enter__(self):
        return self

    def __call__(self, function):
        self.__exit__()
        return super().__call__(function)

    def _recreate_cm(self):
        return type(self)(self.mode)


# ---------------------------------------------------------------- what a slot takes

cdef inline cnp.npy_intp *meta_dims(Meta *meta) noexcept:
    return meta.far if meta.ndim > NEAR_DIMS else meta.near


cdef int describe(Meta *meta, cnp.ndarray array) except -1:
    cdef int i, ndim = cnp.PyArray_NDIM(array)
    meta.ndim = ndim
    meta.typenum = cnp.PyArray_TYPE(array)
    if ndim > NEAR_DIMS and meta.far == NULL:
        meta.far = <cnp.npy_intp *>PyMem_Malloc(cnp.NPY_MAXDIMS * 2 * sizeof(cnp.npy_intp))
        if meta.far == NULL:
            raise MemoryError()
    cdef cnp.npy_intp *dims = meta_dims(meta)
    for i in range(ndim):
        dims[i] = cnp.PyArray_DIM(array, i)
    return 0


cdef inline bint same_meta(Meta *meta, cnp.ndarray array) noexcept:
    cdef int i
    cdef cnp.npy_intp *dims = meta_dims(meta)
    if cnp.PyArray_NDIM(array) != meta.ndim or cnp.PyArray_TYPE(array) != meta.typenum:
        return False
    for i in range(meta.ndim):
        if cnp.PyArray_DIM(array, i) != dims[i]:
            return False
    return True


cdef tuple meta_shape(Meta *meta):
    return tuple([meta_dims(meta)[i] for i in range(meta.ndim)])


cdef object meta_dtype(Meta *meta):
    return cnp.PyArray_DescrFromType(meta.typenum)


cdef inline bint is_inexact(int typenum) noexcept:
    return (
        typenum == cnp.NPY_FLOAT64 or typenum == cnp.NPY_FLOAT32 or typenum == cnp.NPY_FLOAT16
        or typenum == cnp.NPY_COMPLEX64 or typenum == cnp.NPY_COMPLEX128
    )


cdef inline bint is_exclusive(PyObject *array) noexcept:
    """Invariant 5, for an array of which the caller holds one reference."""
    return (
        Py_REFCNT(array) == 1
        and cnp.PyArray_CheckExact(<object>array)
        and cnp.PyArray_CHKFLAGS(
            <cnp.ndarray>array, cnp.NPY_ARRAY_OWNDATA | cnp.NPY_ARRAY_WRITEABLE)
    )


cdef object sum_axes(object gradient, tuple shape):
    """Undo broadcasting: sum `gradient` (array or Tensor) down to `shape`."""
    cdef int extra = gradient.ndim - len(shape)
    if extra < 0:
        return None
    axes = [i for i in range(gradient.ndim)
            if i < extra or (shape[i - extra] == 1 and gradient.shape[i] != 1)]
    if axes:
        gradient = gradient.sum(axis=tuple(axes), keepdims=True)
    if gradient.shape[extra:] != shape:
        return None
    return gradient.reshape(shape) if extra else gradient


cdef object fit(object gradient, Meta *meta, Node node, bint create):
    """Bring a gradient to the shape and dtype of the value it belongs to, or raise."""
    if create:
        if not isinstance(gradient, Tensor):
            gradient = wrap(np.asarray(gradient))
    else:
        if isinstance(gradient, Tensor):
            gradient = (<Tensor>gradient).array
        elif type(gradient) is not np.ndarray:
            gradient = np.asarray(gradient)
    if meta.ndim < 0:
        return gradient
    cdef cnp.ndarray array = (<Tensor>gradient).array if create else gradient
    if same_meta(meta, array):
        return gradient
    shape = meta_shape(meta)
    fitted = gradient if gradient.shape == shape else sum_axes(gradient, shape)
    if fitted is None:
        raise GraphError(
            f"cannot use a gradient of {node.name()}: it has shape {gradient.shape}, "
            f"the value it belongs to {shape}"
        )
    dtype = meta_dtype(meta)
    if fitted.dtype.kind == "c" and dtype.kind != "c":
        fitted = fitted.real
    if fitted.dtype != dtype:
        fitted = fitted.astype(dtype)
    return fitted if create else np.asarray(fitted)


cdef object add_gradients(PyObject *first, PyObject *second, bint create):
    """Sum of two gradients of one slot; either is overwritten if it is exclusive."""
    cdef PyObject *args[3]
    cdef size_t n = 3
    if create:
        return <object>first + <object>second
    args[0] = first
    args[1] = second
    if is_exclusive(first):
        args[2] = first
    elif is_exclusive(second):
        args[2] = second
    else:
        n = 2
    total = PyObject_Vectorcall(numpy_add, args, n, NULL)
    return total if cnp.PyArray_CheckExact(total) else np.asarray(total)


# ---------------------------------------------------------------- nodes

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


cdef class Hooks:
    def __cinit__(self):
        self.tensor = {}
        self.before = []
        self.after = []
        self.stored = []
        self.retained = {}


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
        self.sequence = dg_next_sequence()

    def __dealloc__(self):
        cdef int i
        for i in range(self.n_edges):
            dg_release(self.edges[i].node)
        for i in range(self.n_slots):
            PyMem_Free(self.slots[i].far)
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

    @property
    def metadata(self):
        """A dictionary for whatever the user wants to remember with this node."""
        if self.notes is None:
            self.notes = {}
        return self.notes

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


cdef AccumulateGrad accumulator_of(Tensor leaf):
    cdef AccumulateGrad node
    if leaf.accumulator != NULL:
        return <AccumulateGrad>leaf.accumulator
    node = AccumulateGrad.__new__(AccumulateGrad)
    describe(&node.near_slot, leaf.array)
    node.sequence = dg_next_sequence()
    node.variable = leaf
    leaf.accumulator = <PyObject *>node
    return node


cdef inline Node edge_of(Tensor tensor):
    if tensor.node != NULL:
        return <Node>tensor.node
    return accumulator_of(tensor)


def gradient_edge(Tensor tensor not None):
    """Return where the gradient of a tensor goes: (node, gradient slot).

    The node is the operation that made the tensor, or for a leaf its AccumulateGrad.
    """
    if not tensor.needs:
        raise GraphError("cannot find a gradient edge: the tensor does not require grad")
    return edge_of(tensor), tensor.slot


def set_history(Tensor tensor not None, Node node not None, int output_nr):
    """Make a fresh tensor the output `output_nr` of `node`."""
    if not 0 <= output_nr < node.n_slots:
        raise ValueError(f"cannot set history: {node.name()} has no output {output_nr}")
    if not is_inexact(cnp.PyArray_TYPE(tensor.array)):
        raise GraphError(f"cannot set history: {tensor.array.dtype} has no gradient")
    if tensor.node != NULL or tensor.accumulator != NULL:
        raise GraphError("cannot set history: the tensor already is part of a graph")
    attach(tensor, node, output_nr)


cdef int attach(Tensor tensor, Node node, int slot) except -1:
    describe(&node.slots[slot], tensor.array)
    Py_INCREF(node)
    tensor.node = <PyObject *>node
    tensor.slot = slot
    tensor.needs = True
    return 0


# ---------------------------------------------------------------- operations

cdef dict OPS = {}          # function -> Op
cdef dict FUNCTIONS = {}    # function -> callable on tensors, for functions made of operations


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
        self.doc = getattr(function, "__doc__", None)
        self.differentiable = differentiable
        self.rules = ()
        for i in range(8):
            self.needs[i] = NEED_ALL

    @property
    def __doc__(self):
        return self.doc

    @property
    def __name__(self):
        return self.name

    @property
    def has_rules(self):
        return self.variadic is not None or len(self.rules) > 0

    def define(self, *rules, needs=None, variadic=None):
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

    def __call__(self, *args, **kwargs):
        return call_op(self, args, kwargs)


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
    return op.needs[argument] if argument < 8 else <unsigned int>NEED_ALL


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
    return node


cdef int connect(OpNode node, Tensor tensor, int argument, unsigned int *mask) except -1:
    rule_of(node.op, argument)
    mask[0] |= need_mask(node.op, argument)
    add_edge(node, edge_of(tensor), tensor.slot, argument)
    return 0


cdef object saved_argument(OpNode node, object value, int argument, unsigned int mask):
    cdef Tensor tensor
    cdef Spec spec
    if not isinstance(value, Tensor):
        return value
    tensor = <Tensor>value
    if argument >= 31 or mask & (1u << argument):
        if tensor.storage is not None:
            node.writes += tensor.storage.writes
        return value
    if not node.op.shapes:
        return None
    spec = Spec.__new__(Spec)
    spec.shape = np.shape(tensor.array)
    spec.dtype = tensor.array.dtype
    return spec


cdef int save(OpNode node, tuple args, dict kwargs, object answer, unsigned int mask) except -1:
    cdef int i
    if (mask & ~<unsigned int>NEED_ANSWER) or node.op.shapes:
        node.args = tuple([saved_argument(node, args[i], i, mask) for i in range(node.n_args)])
    if kwargs:
        node.kwargs = kwargs
    if mask & <unsigned int>NEED_ANSWER:
        node.answer = answer
    node.sequence = dg_next_sequence()
    return 0


cdef inline Tensor wrap(object result):
    """A tensor without history over an array or scalar."""
    cdef Tensor tensor = Tensor.__new__(Tensor)
    if not cnp.PyArray_CheckExact(result):
        result = np.asarray(result)
    tensor.array = <cnp.ndarray>result
    return tensor


cdef inline object unwrap(object value):
    return (<Tensor>value).array if isinstance(value, Tensor) else value


cdef inline int check_fresh(Tensor tensor) except -1:
    """A recorded in-place write through another tensor leaves this one without history."""
    if tensor.storage is not None and tensor.storage.rebases != tensor.rebases:
        raise GraphError(
            f"cannot use a tensor: its memory was written by {tensor.storage.writer} through "
            "another tensor in the graph",
            hint="take the view again after the write",
        )
    return 0


cdef object call_op(Op op, tuple args, dict kwargs):
    """Run an operation on arrays, and record it if an argument requires grad."""
    cdef Py_ssize_t i, n = PyTuple_GET_SIZE(args)
    cdef Tensor tensor
    cdef bint tracked = False
    values = []
    for i in range(n):
        value = <object>PyTuple_GET_ITEM(args, i)
        if isinstance(value, Tensor):
            tensor = <Tensor>value
            check_fresh(tensor)
            tracked |= tensor.needs
            value = tensor.array
        values.append(value)
    if kwargs:
        kwargs = {key: unwrap_constant(op, value) for key, value in kwargs.items()}
    result = PyObject_Call(op.function, tuple(values), <PyObject *>kwargs if kwargs else NULL)
    outputs = wrap_outputs(result, args)
    if tracked and op.differentiable and grad_enabled():
        record(op, args, kwargs, outputs)
    return outputs


cdef object unwrap_constant(Op op, object value):
    if isinstance(value, Tensor):
        if (<Tensor>value).needs and op.differentiable and grad_enabled():
            raise TypeError(no_rule(op.name, " for keyword arguments"))
        return (<Tensor>value).array
    return value


cdef object wrap_outputs(object result, tuple args):
    """Tensors for arrays and scalars; views share the storage of what they look at."""
    if isinstance(result, (tuple, list)):
        return tuple([wrap_outputs(part, args) for part in result])
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    cdef Tensor output = wrap(result)
    base = (<object>output.array).base
    for arg in args:
        if isinstance(arg, Tensor):
            array = <object>(<Tensor>arg).array
            if array is <object>output.array or (
                base is not None and (base is array or base is array.base)
            ):
                share_storage(output, <Tensor>arg)
                break
    return output


cdef int record(Op op, tuple args, dict kwargs, object outputs) except -1:
    cdef OpNode node = new_node(op, PyTuple_GET_SIZE(args))
    cdef unsigned int mask = 0
    cdef int i
    cdef bint many = isinstance(outputs, tuple)
    for i in range(node.n_args):
        value = args[i]
        if isinstance(value, Tensor) and (<Tensor>value).needs:
            connect(node, <Tensor>value, i, &mask)
    parts = outputs if many else (outputs,)
    if many:
        node.slots = NULL
        make_room(node, 0, max(2, len(parts)))
    answer = tuple([unwrap(part) for part in parts]) if many else unwrap(outputs)
    save(node, args, kwargs, answer, mask)
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            attach_output(<Tensor>part, node, i)
    return 0


cdef int attach_output(Tensor output, OpNode node, int slot) except -1:
    if not is_inexact(cnp.PyArray_TYPE(output.array)):
        return 0
    attach(output, node, slot)
    if node.answer is not None and output.storage is not None:
        node.storage = output.storage
        node.writes += output.storage.writes
    return 0


cdef object binary(Op op, object a, object b):
    """A binary operator: `call_op` without its loops and containers."""
    cdef PyObject *values[2]
    cdef bint left = isinstance(a, Tensor), right = isinstance(b, Tensor)
    cdef bint tracked = False
    cdef Tensor output
    if left:
        check_fresh(<Tensor>a)
        tracked |= (<Tensor>a).needs
        values[0] = <PyObject *>(<Tensor>a).array
    elif is_operand(a):
        values[0] = <PyObject *>a
    else:
        return NotImplemented
    if right:
        check_fresh(<Tensor>b)
        tracked |= (<Tensor>b).needs
        values[1] = <PyObject *>(<Tensor>b).array
    elif is_operand(b):
        values[1] = <PyObject *>b
    else:
        return NotImplemented
    output = wrap(PyObject_Vectorcall(op.function, values, 2, NULL))
    if tracked and op.differentiable and grad_enabled():
        record_binary(op, a, b, output)
    return output


cdef inline bint is_operand(object value):
    return (
        isinstance(value, (float, int, np.ndarray, complex, np.generic, list, tuple))
    )


cdef int record_binary(Op op, object a, object b, Tensor output) except -1:
    cdef OpNode node = new_node(op, 2)
    cdef unsigned int mask = 0
    if isinstance(a, Tensor) and (<Tensor>a).needs:
        connect(node, <Tensor>a, 0, &mask)
    if isinstance(b, Tensor) and (<Tensor>b).needs:
        connect(node, <Tensor>b, 1, &mask)
    if (mask & 3) or op.shapes:
        node.args = (saved_argument(node, a, 0, mask), saved_argument(node, b, 1, mask))
    if mask & <unsigned int>NEED_ANSWER:
        node.answer = output.array
    node.sequence = dg_next_sequence()
    if is_inexact(cnp.PyArray_TYPE(output.array)):
        attach(output, node, 0)
    return 0


# ---------------------------------------------------------------- in-place writes

cdef Storage storage_of(Tensor tensor):
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


cdef int share_storage(Tensor view, Tensor base) except -1:
    view.storage = storage_of(base)
    view.rebases = view.storage.rebases
    view.is_view = True
    return 0


cdef int mark_written(Tensor tensor, str writer) except -1:
    cdef Storage storage = storage_of(tensor)
    storage.writes += 1
    storage.writer = writer
    return 0


cdef int check_writable(Tensor tensor, str writer) except -1:
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


cdef int rebase(Tensor tensor, Node node, int slot, str writer) except -1:
    """Give a tensor whose memory was written the history of the write."""
    cdef PyObject *old = tensor.node
    cdef Storage storage
    mark_written(tensor, writer)
    storage = tensor.storage
    storage.rebases += 1
    tensor.rebases = storage.rebases
    attach(tensor, node, slot)
    dg_release(old)
    return 0


cdef object write_operator(Op op, Tensor target, object other, str writer):
    """``target op= other``."""
    cdef Tensor result
    if not ((target.needs or (isinstance(other, Tensor) and (<Tensor>other).needs))
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


cdef int write_item(Tensor target, object index, object value) except -1:
    cdef OpNode node
    cdef unsigned int mask = 0
    cdef bint tracked = target.needs or (isinstance(value, Tensor) and (<Tensor>value).needs)
    plain_index = unwrap_index(index)
    if not (tracked and grad_enabled()):
        target.array[plain_index] = unwrap(value)
        return mark_written(target, "__setitem__")
    check_writable(target, "__setitem__")
    node = new_node(<Op?>OPS[operator.setitem], 3)
    if target.needs:
        connect(node, target, 0, &mask)
    if isinstance(value, Tensor) and (<Tensor>value).needs:
        check_fresh(<Tensor>value)
        connect(node, <Tensor>value, 1, &mask)
    args = (target, value if isinstance(value, Tensor) else wrap(value), plain_index)
    save(node, args, None, None, mask)
    target.array[plain_index] = unwrap(value)
    return rebase(target, node, 0, "__setitem__")


cdef object unwrap_index(object index):
    if isinstance(index, Tensor):
        return (<Tensor>index).array
    if type(index) is tuple:
        return tuple([unwrap_index(part) for part in index])
    if type(index) is list:
        return [unwrap_index(part) for part in index]
    return index


# ---------------------------------------------------------------- NumPy's protocols

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


cdef object strip(object value, str name):
    """Replace tensors by arrays in nested arguments of a function without rule."""
    if isinstance(value, Tensor):
        if (<Tensor>value).needs and grad_enabled():
            raise TypeError(no_rule(name, ""))
        return (<Tensor>value).array
    if type(value) is tuple or type(value) is list:
        return type(value)([strip(part, name) for part in value])
    if type(value) is dict:
        return {key: strip(part, name) for key, part in value.items()}
    return value


cdef object call_function(object function, tuple args, dict kwargs):
    implementation = FUNCTIONS.get(function)
    if implementation is not None:
        return implementation(*args, **kwargs)
    module = getattr(function, "__module__", None) or "numpy"
    name = f"{module}.{function.__name__}"
    result = function(*strip(args, name), **strip(kwargs, name))
    return wrap_outputs(result, ())


cdef object call_ufunc(object ufunc, str method, tuple inputs, dict kwargs):
    cdef Op op = OPS.get(ufunc)
    if method == "__call__" and not kwargs:
        if op is not None:
            return call_op(op, inputs, None)
        return call_function(ufunc, inputs, kwargs)
    special = FUNCTIONS.get((ufunc, method))
    if special is None:
        special = FUNCTIONS.get(method) if op is not None else None
        if special is not None:
            return special(ufunc, *inputs, **kwargs)
    if special is not None:
        return special(*inputs, **kwargs)
    name = f"numpy.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
    result = getattr(ufunc, method)(*strip(inputs, name), **strip(kwargs, name))
    return wrap_outputs(result, ())


# ---------------------------------------------------------------- tensors

cdef Op ADD = operation(np.add)
cdef Op SUBTRACT = operation(np.subtract)
cdef Op MULTIPLY = operation(np.multiply)
cdef Op DIVIDE = operation(np.true_divide)
cdef Op POWER = operation(np.power)
cdef Op MATMUL = operation(np.matmul)
cdef Op REMAINDER = operation(np.remainder)
cdef Op NEGATIVE = operation(np.negative)
cdef Op ABSOLUTE = operation(np.absolute)


cdef Op plain(object function):
    op = Op(function, differentiable=False)
    register(function, op)
    return op


cdef Op FLOOR_DIVIDE = plain(np.floor_divide)
cdef Op BITWISE_AND = plain(np.bitwise_and)
cdef Op BITWISE_OR = plain(np.bitwise_or)
cdef Op BITWISE_XOR = plain(np.bitwise_xor)
cdef Op INVERT = plain(np.invert)
cdef tuple COMPARISONS = tuple([plain(getattr(np, name)) for name in (
    "less", "less_equal", "equal", "not_equal", "greater", "greater_equal")])    # Py_LT ... Py_GE


@cython.freelist(512)
cdef class Tensor:
    """An array that remembers how it was made.

    Parameters
    ----------
    data
        Array or anything `numpy.asarray` takes; an array is not copied.
    requires_grad
        Record operations on this tensor; only float and complex dtypes.
    """

    __array_priority__ = 1000

    def __init__(self, data, requires_grad=False):
        array = unwrap(data)
        self.array = array if cnp.PyArray_CheckExact(array) else np.array(array, subok=False)
        if requires_grad:
            self.requires_grad_()

    def __dealloc__(self):
        dg_release(self.node)

    # -- state

    @property
    def data(self):
        return self.array

    @data.setter
    def data(self, value):
        array = np.asarray(unwrap(value))
        if np.shape(array) != np.shape(self.array) or array.dtype != self.array.dtype:
            raise ValueError(
                f"cannot set data: {array.dtype}{np.shape(array)} is not "
                f"{self.array.dtype}{np.shape(self.array)}"
            )
        mark_written(self, "data")
        self.array = array

    @property
    def grad(self):
        return self.gradient

    @grad.setter
    def grad(self, value):
        if value is not None:
            if not isinstance(value, Tensor):
                raise TypeError(f"cannot set grad: {type(value).__name__} is not a Tensor")
            if value.shape != self.shape or value.dtype != self.dtype:
                raise ValueError(f"cannot set grad: {value.dtype}{value.shape} is not "
                                 f"{self.dtype}{self.shape}")
        self.gradient = value

    @property
    def grad_fn(self):
        return <object>self.node if self.node != NULL else None

    @property
    def is_leaf(self):
        return self.node == NULL

    @property
    def requires_grad(self):
        return self.needs

    @requires_grad.setter
    def requires_grad(self, value):
        self.requires_grad_(value)

    @property
    def output_nr(self):
        return self.slot

    @property
    def shape(self):
        return (<object>self.array).shape

    @property
    def dtype(self):
        return (<object>self.array).dtype

    @property
    def ndim(self):
        return cnp.PyArray_NDIM(self.array)

    @property
    def size(self):
        return cnp.PyArray_SIZE(self.array)

    @property
    def nbytes(self):
        return cnp.PyArray_NBYTES(self.array)

    @property
    def itemsize(self):
        return cnp.PyArray_ITEMSIZE(self.array)

    @property
    def device(self):
        return "cpu"

    @property
    def T(self):
        return call_function(np.transpose, (self,), {})

    @property
    def mT(self):
        return call_function(np.matrix_transpose, (self,), {})

    @property
    def real(self):
        return call_function(np.real, (self,), {})

    @property
    def imag(self):
        return call_function(np.imag, (self,), {})

    @property
    def at(self):
        """``t.at[index].set(value)`` and ``.add(value)``: written copies of the tensor."""
        return FUNCTIONS["at"](self)

    def requires_grad_(self, requires_grad=True):
        """Set whether operations on this leaf are recorded; returns the tensor."""
        if requires_grad and not is_inexact(cnp.PyArray_TYPE(self.array)):
            raise GraphError(
                f"cannot require grad: {self.array.dtype} has no gradient",
                hint="only float16/32/64 and complex64/128 do: tensor.astype(float)",
            )
        if not requires_grad and self.node != NULL:
            raise GraphError("cannot change requires_grad: the tensor was computed",
                             hint="use tensor.detach()")
        self.needs = requires_grad
        return self

    def detach(self):
        """Return a tensor over the same memory that has no history."""
        cdef Tensor tensor = wrap(self.array)
        share_storage(tensor, self)
        tensor.is_view = self.is_view
        return tensor

    def clone(self):
        """Return a copy, recorded in the graph."""
        return call_function(np.copy, (self,), {})

    def numpy(self):
        """Return the array itself, not a copy; refused if the tensor requires grad."""
        if self.needs:
            raise GraphError("cannot hand out the array: the tensor requires grad",
                             hint="tensor.detach().numpy()")
        return self.array

    def item(self, *args):
        """Return one element as a Python scalar."""
        return self.array.item(*args)

    def tolist(self):
        """Return the elements as nested lists."""
        return self.array.tolist()

    def astype(self, dtype, copy=True):
        """Return the tensor in another dtype; gradients are cast back."""
        return FUNCTIONS["astype"](self, dtype, copy=copy)

    def to(self, device):
        """Return the tensor on another device; only ``"cpu"`` exists so far."""
        if device is not None and device != "cpu":
            raise ValueError(f"cannot move a tensor to {device!r}: only 'cpu' is known")
        return self

    # -- gradients

    def backward(self, gradient=None, *, retain_graph=None, create_graph=False, inputs=None):
        """Add the gradients of this tensor to ``.grad`` of the leaves it depends on.

        Parameters
        ----------
        gradient
            Of some scalar with respect to this tensor, in its shape; may be left out if the
            tensor has one element.
        retain_graph
            Keep saved values for another pass; default `create_graph`.
        create_graph
            Record the pass itself, for higher derivatives.
        inputs
            Only these tensors get gradients.
        """
        cdef int i
        if inputs is not None:
            inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        task = GraphTask([(self, seed_of(self, gradient, create_graph))],
                         retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)
        task.run()
        if inputs is not None:
            for i, found in enumerate(task.captured):
                if found is not None:
                    store_gradient(<Tensor?>inputs[i], <PyObject *>found)

    def retain_grad(self):
        """Keep ``.grad`` although the tensor is not a leaf."""
        if not self.needs:
            raise GraphError("cannot retain grad: the tensor does not require grad")
        if self.node != NULL:
            hooks_of(<Node>self.node).retained[self.slot] = weak_reference(self)

    def register_hook(self, hook):
        """Call ``hook(gradient)`` in each pass; a Tensor it returns replaces the gradient."""
        if not self.needs:
            raise GraphError("cannot register a hook: the tensor does not require grad")
        hooks = leaf_hooks(self) if self.node == NULL else hooks_of(<Node>self.node)
        return add_hook((<Hooks>hooks).tensor.setdefault(self.slot, []), hook)

    def register_post_accumulate_grad_hook(self, hook):
        """Call ``hook(tensor)`` after a pass wrote ``.grad`` of this leaf."""
        if not self.needs or self.node != NULL:
            raise GraphError("cannot register a hook: the tensor is not a leaf that requires grad")
        return add_hook(leaf_hooks(self).stored, hook)

    # -- NumPy's protocols

    def __array__(self, dtype=None, copy=None):
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return call_ufunc(ufunc, method, inputs, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return call_function(function, args, kwargs)

    def __dlpack__(self, **kwargs):
        return self.numpy().__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return (<object>self.array).__dlpack_device__()

    def __array_namespace__(self, *, api_version=None):
        from distgrad import xp
        return xp

    # -- Python's protocols

    def __repr__(self):
        prefix = "tensor("
        text = np.array2string(self.array, separator=", ", prefix=prefix)
        notes = [text]
        if self.array.dtype not in (np.float64, np.int64, np.bool_, np.complex128):
            notes.append(f"dtype={self.array.dtype}")
        if self.node != NULL:
            notes.append(f"grad_fn=<{(<Node>self.node).name()}>")
        elif self.needs:
            notes.append("requires_grad=True")
        return f"{prefix}{', '.join(notes)})"

    def __hash__(self):
        return <Py_ssize_t>(<size_t><PyObject *>self >> 4)

    def __len__(self):
        return len(self.array)

    def __bool__(self):
        return bool(self.array)

    def __int__(self):
        return int(self.array)

    def __index__(self):
        return operator.index(self.array)

    def __float__(self):
        return float(self.array)

    def __complex__(self):
        return complex(self.array)

    def __contains__(self, value):
        return unwrap(value) in self.array

    def __iter__(self):
        if cnp.PyArray_NDIM(self.array) == 0:
            raise TypeError("cannot iterate over a tensor without dimensions")
        return iter([self[i] for i in range(len(self.array))])

    def __getitem__(self, index):
        return call_op(<Op?>OPS[operator.getitem], (self, unwrap_index(index)), None)

    def __setitem__(self, index, value):
        write_item(self, index, value)

    def __format__(self, spec):
        return format(self.array if cnp.PyArray_NDIM(self.array) else self.item(), spec)

    def __copy__(self):
        return self.clone()

    def __deepcopy__(self, memo):
        if self.node != NULL:
            raise GraphError("cannot deep-copy a tensor that was computed",
                             hint="copy tensor.detach(), or use tensor.clone()")
        return type(self)(self.array.copy(), requires_grad=self.needs)

    def __reduce__(self):
        if self.node != NULL:
            raise GraphError("cannot pickle a tensor that was computed",
                             hint="pickle tensor.detach()")
        return type(self), (self.array, self.needs)

    # -- operators

    def __add__(self, other):
        return binary(ADD, self, other)

    def __radd__(self, other):
        return binary(ADD, other, self)

    def __iadd__(self, other):
        return write_operator(ADD, self, other, "__iadd__")

    def __sub__(self, other):
        return binary(SUBTRACT, self, other)

    def __rsub__(self, other):
        return binary(SUBTRACT, other, self)

    def __isub__(self, other):
        return write_operator(SUBTRACT, self, other, "__isub__")

    def __mul__(self, other):
        return binary(MULTIPLY, self, other)

    def __rmul__(self, other):
        return binary(MULTIPLY, other, self)

    def __imul__(self, other):
        return write_operator(MULTIPLY, self, other, "__imul__")

    def __truediv__(self, other):
        return binary(DIVIDE, self, other)

    def __rtruediv__(self, other):
        return binary(DIVIDE, other, self)

    def __itruediv__(self, other):
        return write_operator(DIVIDE, self, other, "__itruediv__")

    def __pow__(self, other, modulo):
        if modulo is not None:
            return NotImplemented
        return binary(POWER, self, other)

    def __rpow__(self, other, modulo):
        return binary(POWER, other, self)

    def __ipow__(self, other):
        return write_operator(POWER, self, other, "__ipow__")

    def __matmul__(self, other):
        return binary(MATMUL, self, other)

    def __rmatmul__(self, other):
        return binary(MATMUL, other, self)

    def __mod__(self, other):
        return binary(REMAINDER, self, other)

    def __rmod__(self, other):
        return binary(REMAINDER, other, self)

    def __floordiv__(self, other):
        return binary(FLOOR_DIVIDE, self, other)

    def __rfloordiv__(self, other):
        return binary(FLOOR_DIVIDE, other, self)

    def __and__(self, other):
        return binary(BITWISE_AND, self, other)

    def __rand__(self, other):
        return binary(BITWISE_AND, other, self)

    def __or__(self, other):
        return binary(BITWISE_OR, self, other)

    def __ror__(self, other):
        return binary(BITWISE_OR, other, self)

    def __xor__(self, other):
        return binary(BITWISE_XOR, self, other)

    def __rxor__(self, other):
        return binary(BITWISE_XOR, other, self)

    def __invert__(self):
        return call_op(INVERT, (self,), None)

    def __neg__(self):
        return call_op(NEGATIVE, (self,), None)

    def __pos__(self):
        return self

    def __abs__(self):
        return call_op(ABSOLUTE, (self,), None)

    def __richcmp__(self, other, int comparison):
        return binary(<Op>COMPARISONS[comparison], self, other)

    # -- NumPy's methods

    def sum(self, axis=None, dtype=None, *, keepdims=False):
        return call_function(np.sum, (self,), {"axis": axis, "dtype": dtype, "keepdims": keepdims})

    def prod(self, axis=None, *, keepdims=False):
        return call_function(np.prod, (self,), {"axis": axis, "keepdims": keepdims})

    def mean(self, axis=None, *, keepdims=False):
        return call_function(np.mean, (self,), {"axis": axis, "keepdims": keepdims})

    def var(self, axis=None, *, ddof=0, keepdims=False):
        return call_function(np.var, (self,), {"axis": axis, "ddof": ddof, "keepdims": keepdims})

    def std(self, axis=None, *, ddof=0, keepdims=False):
        return call_function(np.std, (self,), {"axis": axis, "ddof": ddof, "keepdims": keepdims})

    def max(self, axis=None, *, keepdims=False):
        return call_function(np.max, (self,), {"axis": axis, "keepdims": keepdims})

    def min(self, axis=None, *, keepdims=False):
        return call_function(np.min, (self,), {"axis": axis, "keepdims": keepdims})

    def argmax(self, axis=None, *, keepdims=False):
        return call_function(np.argmax, (self,), {"axis": axis, "keepdims": keepdims})

    def argmin(self, axis=None, *, keepdims=False):
        return call_function(np.argmin, (self,), {"axis": axis, "keepdims": keepdims})

    def any(self, axis=None, *, keepdims=False):
        return call_function(np.any, (self,), {"axis": axis, "keepdims": keepdims})

    def all(self, axis=None, *, keepdims=False):
        return call_function(np.all, (self,), {"axis": axis, "keepdims": keepdims})

    def cumsum(self, axis=None):
        return call_function(np.cumsum, (self,), {"axis": axis})

    def dot(self, other):
        return call_function(np.dot, (self, other), {})

    def reshape(self, *shape):
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = shape[0]
        return call_function(np.reshape, (self, shape), {})

    def transpose(self, *axes):
        if len(axes) == 1 and not isinstance(axes[0], int):
            axes = axes[0]
        return call_function(np.transpose, (self, axes or None), {})

    def swapaxes(self, axis1, axis2):
        return call_function(np.swapaxes, (self, axis1, axis2), {})

    def squeeze(self, axis=None):
        return call_function(np.squeeze, (self,), {"axis": axis})

    def ravel(self):
        return call_function(np.ravel, (self,), {})

    def flatten(self):
        return call_function(np.ravel, (self,), {}).clone()

    def take(self, indices, axis=None):
        return call_function(np.take, (self, indices), {"axis": axis})

    def clip(self, min=None, max=None):
        return call_function(np.clip, (self, min, max), {})

    def conj(self):
        return call_function(np.conjugate, (self,), {})

    def round(self, decimals=0):
        return call_function(np.round, (self, decimals), {})

    def copy(self):
        return self.clone()


cdef object weak_reference(object target):
    import weakref
    return weakref.ref(target)


cdef Hooks leaf_hooks(Tensor leaf):
    if leaf.hooks is None:
        leaf.hooks = Hooks()
    return leaf.hooks


cdef object seed_of(Tensor root, object gradient, bint create):
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
        return np.ones_like(root.array)
    shape = np.shape(unwrap(gradient))
    if shape != np.shape(root.array):
        raise GraphError(f"cannot run backward: the gradient has shape {shape}, "
                         f"the tensor {root.shape}")
    return gradient if create and isinstance(gradient, Tensor) else np.asarray(unwrap(gradient))



# ---------------------------------------------------------------- gradients of leaves

cdef int store_gradient(Tensor leaf, PyObject *gradient) except -1:
    """Add to ``.grad``: take an exclusive array, copy a shared one, then add in place."""
    cdef Tensor old = <Tensor>leaf.gradient
    if old is None:
        if isinstance(<object>gradient, Tensor):
            leaf.gradient = <object>gradient
        elif is_exclusive(gradient):
            leaf.gradient = wrap(<object>gradient)
        else:
            leaf.gradient = wrap(np.array(<object>gradient, order="K"))
    elif (isinstance(<object>gradient, Tensor) or old.needs
            or not cnp.PyArray_ISWRITEABLE(old.array)):
        leaf.gradient = old + <object>gradient
    else:
        numpy_add(old.array, <object>gradient, out=old.array)
        mark_written(old, "backward")
    return 0


cdef class GradientTable:
    """Gradients of leaves, kept apart from ``.grad``: those of one autograd context.

    An arriving array is kept as it is and not written while anybody else can see it; the
    second contribution allocates, later ones add in place. Passes may accumulate from
    several threads at once: the leaf's AccumulateGrad takes its lock.
    """

    def __cinit__(self):
        self.entries = {}

    def __len__(self):
        return len(self.entries)

    def clear(self):
        """Forget all gradients."""
        self.entries.clear()

    def get(self, Tensor leaf not None):
        """Return the gradient of a leaf as a Tensor, or None."""
        cdef PyObject *entry = PyDict_GetItemWithError(self.entries, leaf)
        if entry == NULL:
            return None
        if not isinstance(<object>entry, Tensor):
            if Py_REFCNT(entry) > 1 or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>entry):
                self.entries[leaf] = wrap((<object>entry).copy())
            else:
                self.entries[leaf] = wrap(<object>entry)
        return self.entries[leaf]

    def as_dict(self):
        """Return {leaf: gradient}, in order of their arrival."""
        return {leaf: self.get(leaf) for leaf in list(self.entries)}


cdef int tabulate(GradientTable table, Tensor leaf, PyObject *gradient) except -1:
    """Add to the leaf's entry, of which the table alone has a reference or others see it."""
    cdef PyObject *entry = PyDict_GetItemWithError(table.entries, leaf)
    if entry == NULL:
        table.entries[leaf] = <object>gradient
    elif not isinstance(<object>entry, Tensor):
        total = add_gradients(entry, gradient, isinstance(<object>gradient, Tensor))
        if <PyObject *>total != entry:
            table.entries[leaf] = total
    elif isinstance(<object>gradient, Tensor):
        table.entries[leaf] = <object>entry + <object>gradient
    else:
        table.entries[leaf] = wrap(numpy_add((<Tensor>entry).array, <object>gradient))
    return 0


cdef int accumulate(AccumulateGrad node, PyObject *gradient, GradientTable table) except -1:
    """Add a gradient of a leaf to the table, or to ``.grad`` without one."""
    if not PyThread_acquire_lock(node.lock, 0):
        with nogil:
            PyThread_acquire_lock(node.lock, 1)
    try:
        if table is None:
            store_gradient(node.variable, gradient)
        else:
            tabulate(table, node.variable, gradient)
    finally:
        PyThread_release_lock(node.lock)
    return 0


# ---------------------------------------------------------------- hooks and saved values

cdef inline object as_tensor(object gradient):
    return gradient if gradient is None or isinstance(gradient, Tensor) else wrap(gradient)


cdef object hooked(list hooks, object gradient, bint create):
    """Run tensor hooks on one gradient."""
    for hook in list(hooks):
        result = hook(as_tensor(gradient))
        if result is not None:
            gradient = result
    return gradient if create else unwrap(gradient)


cdef int run_before(Node node, list grads, bint create) except -1:
    """Tensor hooks, retained gradients and pre-hooks of a node with hooks, in this order."""
    cdef Tensor tensor
    for slot in range(len(grads)):
        if grads[slot] is None:
            continue
        if slot in node.hooks.tensor:
            grads[slot] = hooked(node.hooks.tensor[slot], grads[slot], create)
        reference = node.hooks.retained.get(slot)
        tensor = reference() if reference is not None else None
        if tensor is not None:
            gradient = grads[slot]
            store_gradient(tensor, <PyObject *>gradient)
    for hook in list(node.hooks.before):
        result = hook(tuple([as_tensor(gradient) for gradient in grads]))
        if result is not None:
            grads[:] = [gradient if create else unwrap(gradient) for gradient in result]
    return 0


cdef object run_after(Node node, object results, list grads, bint create):
    """Post-hooks of a node; returns the gradients it sends on."""
    outputs = tuple([as_tensor(gradient) for gradient in grads])
    for hook in list(node.hooks.after):
        replaced = hook(tuple([as_tensor(gradient) for gradient in results]), outputs)
        if replaced is not None:
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
            if isinstance(value, Tensor):
                storage = (<Tensor>value).storage
                if storage is not None:
                    writes += storage.writes
                    writer = storage.writer or writer
    if node.storage is not None:
        writes += node.storage.writes
        writer = node.storage.writer or writer
    if writes != node.writes:
        raise GraphError(
            f"cannot run backward through {node.name()}: a value it saved for {node.op.name} "
            f"was modified afterwards by {writer}",
            hint="write into a copy: tensor.clone()",
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
    cdef Tensor tensor = wrap(array)
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


cdef class GraphTask:
    """One backward pass over the local part of a graph; used by one thread at a time.

    Parameters
    ----------
    roots
        (tensor, gradient) pairs; a gradient has the shape of its tensor.
    sends
        Nodes that get their gradients by `deliver` while the pass runs. With any, sums of
        three or more contributions are added in edge order, whatever the order of arrival.
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
        self.failed_node = ""

    def __init__(self, roots, *, sends=(), retain_graph=None, create_graph=False, inputs=None,
                 table=None):
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
            self.order_sums(starts)
        self.seed(starts)

    def __dealloc__(self):
        cdef int i
        if self.pending != NULL:
            for i in range(self.n_slots):
                Py_XDECREF(self.pending[i])
        if self.held != NULL:
            for i in range(self.n_held):
                Py_XDECREF(self.held[i])
        PyMem_Free(self.visits)
        PyMem_Free(self.buckets)
        PyMem_Free(self.targets)
        PyMem_Free(self.places)
        PyMem_Free(self.pending)
        PyMem_Free(self.held_range)
        PyMem_Free(self.held)
        PyMem_Free(self.heap)

    # -- before the pass: discover, count, order

    cdef list start_at(self, roots, sends):
        """Visit the first nodes; returns (visit, slot, gradient) of the roots."""
        cdef Tensor tensor
        cdef Node node
        cdef list starts = []
        for tensor, gradient in roots:
            if not tensor.needs:
                raise GraphError("cannot run backward: a root does not require grad")
            check_fresh(tensor)
            node = edge_of(tensor)
            self.keep.append(node)
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
        cdef Tensor tensor
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

    cdef int order_sums(self, list starts) except -1:
        """Give contributions to slots that get three or more a place in edge order."""
        cdef int i, slot, edge
        cdef int *next_place = <int *>allocate(self.n_slots, sizeof(int))
        try:
            self.held_range = <int *>allocate(2 * self.n_slots, sizeof(int))
            self.places = <int *>allocate(self.n_edges, sizeof(int))
            for i, slot, _ in starts:
                next_place[self.visits[i].first_slot + slot] += 1
            for edge in range(self.n_edges):
                self.places[edge] = -1
            for i in range(self.n_visits):
                for k in range((<Node>self.visits[i].node).n_edges):
                    slot = self.slot_of(i, k)
                    if slot >= 0:
                        next_place[slot] += 1
            for slot in range(self.n_slots):
                self.held_range[2 * slot] = self.n_held
                if next_place[slot] > 2:
                    self.n_held += next_place[slot]
                self.held_range[2 * slot + 1] = self.n_held
                next_place[slot] = self.held_range[2 * slot]
            for i, slot, _ in starts:
                next_place[self.visits[i].first_slot + slot] += 1
            self.place_edges(next_place)
            self.held = <PyObject **>allocate(self.n_held, sizeof(PyObject *))
        finally:
            PyMem_Free(next_place)
        return 0

    cdef void place_edges(self, int *next_place) noexcept:
        cdef int i, k, slot
        for i in range(self.n_visits):
            for k in range((<Node>self.visits[i].node).n_edges):
                slot = self.slot_of(i, k)
                if slot >= 0 and self.held_range[2 * slot] < self.held_range[2 * slot + 1]:
                    self.places[self.visits[i].first_edge + k] = next_place[slot]
                    next_place[slot] += 1

    cdef int slot_of(self, int index, int k) noexcept:
        """The pending slot that edge `k` of a visit leads to, or -1."""
        cdef int target = self.targets[self.visits[index].first_edge + k]
        if target < 0:
            return -1
        return self.visits[target].first_slot + (<Node>self.visits[index].node).edges[k].slot

    cdef int seed(self, list starts) except -1:
        """Put the roots' gradients in, before all edges in the order of sums."""
        cdef int i, slot, place
        for i, slot, gradient in starts:
            slot += self.visits[i].first_slot
            place = -1
            if self.held_range != NULL and self.held_range[2 * slot] < self.held_range[2 * slot + 1]:
                place = self.held_range[2 * slot]
                while self.held[place] != NULL:
                    place += 1
            self.put(slot, place, gradient)
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
            grads = [None if gradient is None else fit(gradient, &node.slots[i], node, self.create)
                     for i, gradient in enumerate(grads)]
        index = self.undelivered.pop(node)
        for i, gradient in enumerate(grads or ()):
            if gradient is not None:
                self.put(self.visits[index].first_slot + i, -1, gradient)
        self.visits[index].waiting -= 1
        self.enqueue_if_ready(index)

    def run(self):
        """Run all that is ready; return the boundary nodes that became complete since last time.

        Returns
        -------
        list
            (node, gradients): a gradient or None for each slot, or None if there is none at all.
        """
        cdef int steps = 0, index = -1
        mode = PyContextVar_Set(grad_mode, bool(self.create))
        try:
            while self.n_heap:
                index = self.pop()
                self.step(index)
                self.remaining -= 1
                steps += 1
                if not steps & 127:
                    breathe()
        except BaseException as error:
            self.failed_node = (<Node>self.visits[index].node).name()
            error.add_note(f"in the backward pass, at {self.failed_node}")
            raise
        finally:
            PyContextVar_Reset(grad_mode, mode)
        complete = self.complete
        self.complete = []
        return complete

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
        cdef int first = self.heap[0].visit, i = 0, child
        cdef Ready last
        self.n_heap -= 1
        last = self.heap[self.n_heap]
        while True:
            child = 2 * i + 1
            if child >= self.n_heap:
                break
            if child + 1 < self.n_heap and self.heap[child + 1].sequence > self.heap[child].sequence:
                child += 1
            if last.sequence >= self.heap[child].sequence:
                break
            self.heap[i] = self.heap[child]
            i = child
        self.heap[i] = last
        return first

    # -- gradients on their way

    cdef int put(self, int slot, int place, object gradient) except -1:
        """Add a contribution to a slot, or keep it apart until those before it are there."""
        cdef PyObject *old
        if place >= 0:
            Py_INCREF(gradient)
            self.held[place] = <PyObject *>gradient
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
        if self.held_range != NULL:
            self.add_held(slot)
        gradient = self.pending[slot]
        if gradient == NULL:
            return None
        self.pending[slot] = NULL
        result = <object>gradient
        Py_XDECREF(gradient)
        return result

    cdef int add_held(self, int slot) except -1:
        cdef int place
        cdef PyObject *held
        for place in range(self.held_range[2 * slot], self.held_range[2 * slot + 1]):
            held = self.held[place]
            if held != NULL:
                self.held[place] = NULL
                try:
                    self.put(slot, -1, <object>held)
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
            gradient = fit(gradient, &owner.slots[edge.slot], node, self.create)
            self.put(
                self.visits[target].first_slot + edge.slot,
                -1 if self.places == NULL else self.places[self.visits[index].first_edge + k],
                gradient,
            )
        self.visits[target].waiting -= 1
        return self.enqueue_if_ready(target)

    # -- running nodes

    cdef int step(self, int index) except -1:
        """Run one node of which all gradients are there."""
        cdef Visit *visit = &self.visits[index]
        cdef Node node = <Node>visit.node
        cdef list grads
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
        grads = [self.take(visit.first_slot + i) for i in range(node.n_slots)]
        if all([gradient is None for gradient in grads]):
            if node.boundary:
                self.complete.append((node, None))
            return self.skip(index)
        if type(node) is AccumulateGrad:
            return self.step_leaf(index, <AccumulateGrad>node, grads)
        if node.hooks is not None:
            run_before(node, grads, self.create)
        if self.wanted is not None:
            self.capture(index, grads)
        if node.boundary:
            self.complete.append((node, tuple(grads)))
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
        """A leaf with hooks, or in a pass with inputs."""
        cdef Hooks hooks = node.variable.hooks
        cdef dict wanted = self.wanted
        if hooks is not None and 0 in hooks.tensor:
            grads[0] = hooked(hooks.tensor[0], grads[0], self.create)
        if node.hooks is not None:
            run_before(node, grads, self.create)
        gradient = fit(grads[0], &node.near_slot, node, self.create)
        grads[0] = None
        if wanted is not None:
            self.capture(index, [gradient])
            return 0
        accumulate(node, <PyObject *>gradient, self.table)
        if node.hooks is not None:
            run_after(node, (), [gradient], self.create)
        if hooks is not None and self.table is None:
            for hook in list(hooks.stored):
                hook(node.variable)
        return 0

    cdef int run_apply(self, int index, Node node, list grads) except -1:
        """A node written in Python."""
        cdef int k
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
                if not self.create and isinstance(<object>stack[3 + i], Tensor):
                    stack[3 + i] = <PyObject *>(<Tensor>stack[3 + i]).array
        try:
            for k in range(node.n_edges):
                value = self.run_rule(index, node, k, stack)
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

    cdef object run_rule(self, int index, OpNode node, int k, PyObject **stack):
        cdef int argument = node.edges[k].argument
        cdef int target = self.targets[self.visits[index].first_edge + k]
        cdef PyObject *kwargs = NULL
        cdef object position
        if target >= 0 and not self.visits[target].needed:
            return None
        if node.kwargs is not None:
            kwargs = <PyObject *>node.kwargs
        if node.op.variadic is not None:
            position = argument
            stack[0] = <PyObject *>position
            return PyObject_VectorcallDict(node.op.variadic, stack, node.n_args + 3, kwargs)
        rule = node.op.rules[argument]
        return PyObject_VectorcallDict(rule, stack + 1, node.n_args + 2, kwargs)


cdef object fill(Node node, list grads):
    """Gradients of all outputs of an operation with several: zeros where none arrived."""
    cdef int i
    return tuple([
        np.zeros(meta_shape(&node.slots[i]), meta_dtype(&node.slots[i]))
        if gradient is None and node.slots[i].ndim >= 0 else gradient
        for i, gradient in enumerate(grads)
    ])


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
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if grad_outputs is None:
        grad_outputs = (None,) * len(outputs)
    elif isinstance(grad_outputs, (Tensor, np.ndarray)):
        grad_outputs = (grad_outputs,)
    if len(grad_outputs) != len(outputs):
        raise ValueError(f"cannot pair {len(outputs)} outputs with {len(grad_outputs)} gradients")
    roots = [(output, seed_of(output, gradient, create_graph))
             for output, gradient in zip(outputs, grad_outputs)]
    task = GraphTask(roots, retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)
    task.run()
    if not allow_unused and any([found is None for found in task.captured]):
        raise GraphError("cannot find a gradient: an input is not used by the outputs",
                         hint="pass allow_unused=True to get None")
    return tuple([as_tensor(found) for found in task.captured])
