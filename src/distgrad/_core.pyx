# cython: auto_pickle=False, autotestdict=False
"""The core: tensors over the graph that they leave behind.

`Tensor` stands here: operators, NumPy's protocols and methods. What it stands on is in
``graph/``: nodes and recording, the accumulation of gradients, and the backward pass. This
module is the face of all of them.
"""

from cpython.object cimport PyObject

cimport numpy as cnp

from distgrad.graph._engine cimport GraphTask, local_pass, seed_of
from distgrad.graph._gradient cimport store_gradient
from distgrad.graph._methods cimport get_item, reshape, total
from distgrad.graph._node cimport (
    FUNCTIONS, OPS, Hooks, Node, Op, TensorBase, add_hook, binary, call_op, grad_enabled,
    hooks_of, is_inexact, mark_written, no_rule, share_storage, unary, unwrap, wrap, wrap_outputs,
)
from distgrad.graph._writes cimport write_item, write_operator

import operator
import weakref

import numpy as np

from distgrad.errors import GraphError
from distgrad.graph._engine import grad
from distgrad.graph._gradient import GradientTable
from distgrad.graph._node import (
    AccumulateGrad,
    RemovableHandle,
    Spec,
    gradient_edge,
    live_objects,
    operation,
    register,
    registered,
    set_history,
    set_tensor_class,
)
from distgrad.graph.modes import enable_grad, is_grad_enabled, no_grad, set_grad_enabled

__all__ = [
    "AccumulateGrad",
    "GradientTable",
    "GraphTask",
    "Node",
    "Op",
    "RemovableHandle",
    "Spec",
    "Tensor",
    "enable_grad",
    "grad",
    "gradient_edge",
    "is_grad_enabled",
    "no_grad",
    "operation",
    "register",
    "registered",
    "set_grad_enabled",
    "set_history",
]

cnp.import_array()

cdef extern from "Python.h":
    bint PyObject_GC_IsTracked(object value)
    void PyObject_GC_Track(object value)


# ---------------------------------------------------------------- NumPy's protocols

cdef frozenset WRITERS = frozenset([np.copyto, np.put, np.place, np.putmask, np.put_along_axis,
                                    np.fill_diagonal])      # into their first argument


cdef object strip(object value, str name, object argument):
    """Replace tensors by arrays in an argument, nested or not, of a function without rule."""
    if isinstance(value, Tensor):
        if (<TensorBase>value).needs and grad_enabled():
            raise TypeError(no_rule(name, f" for argument {argument!r}"))
        return (<TensorBase>value).array
    if type(value) is tuple or type(value) is list:
        return type(value)([strip(part, name, argument) for part in value])
    if type(value) is dict:
        return {key: strip(part, name, argument) for key, part in value.items()}
    return value


cdef object call_on_arrays(object function, str name, bint writes, tuple args, dict kwargs):
    """Call a function without rule; count the writes into ``out`` and, if it writes, `args[0]`."""
    plain_args = [strip(value, name, i) for i, value in enumerate(args)]
    plain_kwargs = {key: strip(value, name, key) for key, value in kwargs.items()}
    out = kwargs.get("out")
    cdef tuple targets = out if type(out) is tuple else (out,)
    for target in targets + args[:writes]:
        if isinstance(target, Tensor):
            mark_written(<TensorBase>target, name)
    result = wrap_outputs(function(*plain_args, **plain_kwargs), targets)
    return targets[0] if len(targets) == 1 and isinstance(targets[0], Tensor) else result


cdef object call_function(object function, tuple args, dict kwargs):
    implementation = FUNCTIONS.get(function)
    if implementation is not None:
        return implementation(*args, **kwargs)
    module = getattr(function, "__module__", None) or "numpy"
    name = f"{module}.{function.__name__}"
    return call_on_arrays(function, name, function in WRITERS, args, kwargs)


cdef object call_ufunc(object ufunc, str method, tuple inputs, dict kwargs):
    cdef Op op = OPS.get(ufunc)
    if method == "__call__" and not kwargs:
        if op is not None:
            if len(inputs) == 1:
                return unary(op, <TensorBase?>inputs[0])
            result = binary(op, inputs[0], inputs[1]) if len(inputs) == 2 else NotImplemented
            return call_op(op, inputs, None) if result is NotImplemented else result
        return call_function(ufunc, inputs, kwargs)
    special = FUNCTIONS.get((ufunc, method))
    if special is not None:
        return special(*inputs, **kwargs)
    if op is not None and method == "__call__":
        return FUNCTIONS[method](ufunc, *inputs, **kwargs)
    name = f"numpy.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
    return call_on_arrays(getattr(ufunc, method), name, method == "at", inputs, kwargs)


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


cdef class Tensor(TensorBase):
    """An array that remembers how it was made.

    Parameters
    ----------
    data
        Array or anything `numpy.asarray` takes; an array is not copied.
    requires_grad
        Record operations on this tensor; only float and complex dtypes.
    """

    __array_priority__ = 1000.0

    def __init__(self, data, requires_grad=False):
        array = unwrap(data)
        self.array = array if cnp.PyArray_CheckExact(array) else np.array(array, subok=False)
        if requires_grad:
            self.requires_grad_()

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
        mark_written(self, "an assignment to .data")
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
    def _version(self):
        """Number of in-place writes to the memory so far."""
        return 0 if self.storage is None else self.storage.writes

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
            Record the pass itself, for higher derivatives. ``.grad`` then holds a graph that
            holds its leaf: set it to None when done, or use `distgrad.grad`.
        inputs
            Only these tensors get gradients.
        """
        cdef int i
        if inputs is not None:
            inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        cdef GraphTask task = local_pass(
            [(self, seed_of(self, gradient, create_graph))], retain_graph, create_graph, inputs)
        if inputs is not None:
            for i, found in enumerate(task.captured):
                if found is not None:
                    store_gradient(<Tensor?>inputs[i], <PyObject *>found)

    def retain_grad(self):
        """Keep ``.grad`` although the tensor is not a leaf."""
        if not self.needs:
            raise GraphError("cannot retain grad: the tensor does not require grad")
        if self.node != NULL:
            hooks_of(<Node>self.node).retained[self.slot] = weakref.ref(self)

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
        check_may_leave(self, "array")
        return np.array(self.array, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return call_ufunc(ufunc, method, inputs, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return call_function(function, args, kwargs)

    def __dlpack__(self, **kwargs):
        return self.numpy().__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return (<object>self.array).__dlpack_device__()

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
        check_may_leave(self, "int")
        return int(self.array)

    def __index__(self):
        return operator.index(self.array)

    def __float__(self):
        check_may_leave(self, "float")
        return float(self.array)

    def __complex__(self):
        check_may_leave(self, "complex")
        return complex(self.array)

    def __contains__(self, value):
        return unwrap(value) in self.array

    def __iter__(self):
        if cnp.PyArray_NDIM(self.array) == 0:
            raise TypeError("cannot iterate over a tensor without dimensions")
        return iter([self[i] for i in range(len(self.array))])

    def __getitem__(self, index):
        return get_item(self, index)

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
        return unary(INVERT, self)

    def __neg__(self):
        return unary(NEGATIVE, self)

    def __pos__(self):
        return self

    def __abs__(self):
        return unary(ABSOLUTE, self)

    def __richcmp__(self, other, int comparison):
        return binary(<Op>COMPARISONS[comparison], self, other)

    # -- NumPy's methods

    def sum(self, axis=None, dtype=None, *, keepdims=False):
        if axis is None and dtype is None and keepdims is False:
            return total(self)
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
        return reshape(self, shape)

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


cdef int check_may_leave(TensorBase tensor, str what) except -1:
    """Values that would leave the graph unseen must be taken out on purpose."""
    if tensor.needs and grad_enabled():
        raise GraphError(
            f"cannot convert to {what}: the tensor requires grad, and gradients end there",
            hint="tensor.item() or tensor.detach() if that is meant, or distgrad.no_grad()",
        )
    return 0


cdef Hooks leaf_hooks(TensorBase leaf):
    if leaf.hooks is None:
        leaf.hooks = Hooks()
        if not PyObject_GC_IsTracked(leaf):
            PyObject_GC_Track(leaf)
    return leaf.hooks


set_tensor_class(Tensor)


# What this module cimports is not among its attributes by itself.
globals().update({cls.__name__: cls for cls in (GraphTask, Node, Op)})
if live_objects() is not None:
    _debug_counts = live_objects
