# cython: auto_pickle=False, autotestdict=False
"""Fused steps of optimizers: each parameter in one pass over its memory, without temporaries.

U1  What is done here has the bits of the formulas in ``Optimizer._update``, and is done for
    contiguous arrays of float32 and float64; everything else is left to those.
U2  A step in place writes the parameter and its state. A prepared step writes the arrays of
    `Change` and exchanges them when it is committed; what came out is written by the next one.
U3  Such an array is written only if nobody else can see it: one reference, its own memory.
"""

cimport cython
cimport numpy as cnp
from cpython.dict cimport PyDict_GetItemWithError
from cpython.object cimport PyObject
from libc.math cimport pow, sqrt
from libc.string cimport memset

from distgrad.graph._gradient cimport GradientTable
from distgrad.graph._kernels cimport UNLOCKED, is_loopable
from distgrad.graph._node cimport TensorBase, mark_written

import numpy as np

cnp.import_array()

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *)

cdef extern from "optim/kernels.h" nogil:
    void dg_sgd_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_sgd_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept
    void dg_momentum_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_momentum_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept
    void dg_adam_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_adam_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept
    void dg_adagrad_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_adagrad_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept
    void dg_rmsprop_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_rmsprop_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept
    void dg_adadelta_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_adadelta_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept
    void dg_adamax_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_adamax_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept
    void dg_rprop_f64(Py_ssize_t, double **, double **, const double *, const Rates *) noexcept
    void dg_rprop_f32(Py_ssize_t, float **, float **, const float *, const Rates *) noexcept


@cython.final
cdef class Update:
    """The kernel of an optimizer with the settings of one group."""

    cdef int set_step(self, long step) except -1:
        """Bring up to date what depends on how many steps a parameter has made."""
        if step == self.step:
            return 0
        self.step = step
        self.rates.lr = self.lr / (1.0 + (step - 1) * self.lr_decay)
        if self.corrects:
            self.rates.lr = self.lr / (1.0 - pow(self.beta, step))
            self.rates.scale = sqrt(1.0 - pow(self.beta2, step))
        return 0

    cdef bint apply(self, cnp.ndarray data, object gradient, dict state,
                    cnp.ndarray target, dict fresh) except -1:
        """Step from ``data`` and ``state`` to ``target`` and ``fresh``, which may be the same.

        ``state`` is None or empty before the first step. What else ``fresh`` has is forgotten.

        Returns
        -------
        bool
            Whether the kernel takes such arrays; if not, neither parameter nor state changed.
        """
        cdef void *source[MOST_ARRAYS]
        cdef void *sink[MOST_ARRAYS]
        cdef Py_ssize_t i = 0, expected = len(self.names) + self.counts
        cdef Py_ssize_t kept = 0 if state is None else len(state)
        cdef long step = 1
        cdef cnp.ndarray old, new
        if not (is_loopable(data) and is_like(gradient, data) and (kept == 0 or kept == expected)
                and cnp.PyArray_ISWRITEABLE(target)):
            return False
        if self.counts and kept:
            step = state.get("step", 0) + 1
        memset(source, 0, sizeof(source))
        memset(sink, 0, sizeof(sink))
        source[0] = cnp.PyArray_DATA(data)
        sink[0] = cnp.PyArray_DATA(target)
        self.rates.first = kept == 0
        for name in self.names:
            i += 1
            found = state.get(name) if kept else None
            if found is None:
                if kept:
                    return False
                found = self.first(data, i)
                new = fresh[name] = found
            elif not is_like(found, data):
                return False
            else:
                new = writable(fresh, name, found)
            old = found
            source[i] = cnp.PyArray_DATA(old)
            sink[i] = cnp.PyArray_DATA(new)
        self.set_step(step)
        self.run(cnp.PyArray_TYPE(data), cnp.PyArray_SIZE(data), source, sink,
                 cnp.PyArray_DATA(<cnp.ndarray>gradient))
        if self.counts:
            fresh["step"] = step
        if len(fresh) != expected:
            for name in fresh.keys() - {*self.names, "step"}:
                del fresh[name]
        return True

    cdef object first(self, cnp.ndarray data, Py_ssize_t number):
        """Return an array of the state as it is before the first step."""
        if number == len(self.names):
            return np.full_like(data, self.fill)
        return np.zeros_like(data)

    cdef int run(self, int typenum, Py_ssize_t n, void **source, void **sink,
                 const void *gradient) except -1:
        cdef Rates rates = self.rates   # another thread may set the step meanwhile
        if n < UNLOCKED:
            self.launch(typenum, n, source, sink, gradient, &rates)
        else:
            with nogil:
                self.launch(typenum, n, source, sink, gradient, &rates)
        return 0

    cdef void launch(self, int typenum, Py_ssize_t n, void **source, void **sink,
                     const void *gradient, const Rates *rates) noexcept nogil:
        if typenum == cnp.NPY_FLOAT64:
            self.run64(n, <double **>source, <double **>sink, <const double *>gradient, rates)
        else:
            self.run32(n, <float **>source, <float **>sink, <const float *>gradient, rates)


cdef inline bint is_like(object array, cnp.ndarray data) noexcept:
    """A contiguous array of the dtype and shape of the parameter."""
    cdef int i, ndim = cnp.PyArray_NDIM(data)
    if not (is_loopable(array) and cnp.PyArray_NDIM(<cnp.ndarray>array) == ndim
            and cnp.PyArray_TYPE(<cnp.ndarray>array) == cnp.PyArray_TYPE(data)):
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(<cnp.ndarray>array, i) != cnp.PyArray_DIM(data, i):
            return False
    return True


cdef object writable(dict fresh, str name, cnp.ndarray old):
    """Return where a new value goes: the old array itself, a spare, or a new array."""
    cdef PyObject *found = PyDict_GetItemWithError(fresh, name)
    if found == <PyObject *>old:
        return old
    if found == NULL or not is_spare(found, old):
        fresh[name] = empty_like(old)
        return fresh[name]
    return <object>found


cdef bint is_spare(PyObject *array, cnp.ndarray like) noexcept:
    """Whether an array, of which the caller has one uncounted reference, may be written (U3)."""
    return (
        Py_REFCNT(array) == 1
        and is_like(<object>array, like)
        and cnp.PyArray_BASE(<cnp.ndarray>array) == NULL
        and cnp.PyArray_CHKFLAGS(
            <cnp.ndarray>array, cnp.NPY_ARRAY_OWNDATA | cnp.NPY_ARRAY_WRITEABLE)
    )


# --- the parameters of a group --------------------------------------------------------------

@cython.final
cdef class Change:
    """The next values of a parameter and of its state; once it has them, memory for those after.

    The optimizer keeps one a parameter. While a prepared step has it too, another step that is
    prepared meanwhile makes its own.
    """


def gather(params, gradients, Py_ssize_t number, bint in_place):
    """Find the parameters that have gradients, and check that these can be used.

    Parameters
    ----------
    params
        The parameters of a group.
    gradients
        Parameter to gradient, a `GradientTable`, or None for ``.grad``.
    number
        Position of the first parameter among all of the optimizer, for errors.
    in_place
        Whether the parameters themselves will be written.

    Returns
    -------
    params, arrays : list
        The parameters, and their gradients as arrays of the same shape.
    """
    cdef TensorBase param
    cdef list found = [], arrays = []
    if gradients is not None and not hasattr(gradients, "get"):
        raise TypeError(
            f"cannot step with {type(gradients).__name__}: expected a dict from parameters to "
            "gradients, or None for .grad"
        )
    for param in params:
        gradient = gradient_of(param, gradients)
        if gradient is not None:
            array = (
                (<TensorBase>gradient).array if isinstance(gradient, TensorBase) else gradient
            )
            if not is_like(array, param.array):
                array = checked(array, param.array, number)
            if in_place:
                if not cnp.PyArray_ISWRITEABLE(param.array):
                    raise ValueError(
                        f"cannot update parameter {number} in place: its memory is read-only"
                    )
                if overlaps(<cnp.ndarray>array, param.array):
                    array = array.copy()
            found.append(param)
            arrays.append(array)
        number += 1
    return found, arrays


cdef object gradient_of(TensorBase param, object gradients):
    """Return the gradient of a parameter as its holder has it, or None."""
    cdef PyObject *found
    if gradients is None:
        return param.gradient
    if type(gradients) is dict:
        found = PyDict_GetItemWithError(gradients, param)
    elif type(gradients) is GradientTable:     # what it has is only read here: no need to ask it
        found = PyDict_GetItemWithError((<GradientTable>gradients).entries, param)
    else:
        return gradients.get(param)
    return None if found == NULL else <object>found


cdef object checked(object gradient, cnp.ndarray data, Py_ssize_t number):
    """Return a gradient that is not quite like its parameter as an array of the same dtype."""
    if not cnp.PyArray_CheckExact(gradient):
        gradient = np.asarray(gradient)
    if gradient.shape != (<object>data).shape:
        raise ValueError(
            f"cannot update parameter {number} of shape {(<object>data).shape}: "
            f"its gradient has shape {gradient.shape}"
        )
    if not np.can_cast(gradient.dtype, data.dtype, "same_kind"):
        raise TypeError(
            f"cannot update parameter {number} of dtype {data.dtype}: "
            f"its gradient has dtype {gradient.dtype}"
        )
    return gradient.astype(data.dtype, copy=False)


cdef bint overlaps(cnp.ndarray gradient, cnp.ndarray data) except -1:
    """Whether a gradient may change while the parameter is written."""
    cdef char *a = <char *>cnp.PyArray_DATA(gradient)
    cdef char *b = <char *>cnp.PyArray_DATA(data)
    if is_loopable(gradient) and is_loopable(data):
        return a < b + cnp.PyArray_NBYTES(data) and b < a + cnp.PyArray_NBYTES(gradient)
    return np.may_share_memory(gradient, data)


def step_in_place(Update update, list params not None, list gradients not None,
                  dict states not None):
    """Step parameters.

    Parameters
    ----------
    update
        What to do; None does nothing.
    params, gradients
        As `gather` returns them.
    states
        Parameter to its state.

    Returns
    -------
    list
        Positions of parameters for which there is no kernel: nothing was done there.
    """
    cdef TensorBase param
    cdef Py_ssize_t i
    cdef list left = []
    for i in range(len(params)):
        param = params[i]
        state = states.get(param)
        if state is None:
            state = {}
        if update is not None and update.apply(
                param.array, gradients[i], state, param.array, state):
            mark_written(param, "step")
            states[param] = state
        else:
            left.append(i)
    return left


def step_aside(Update update, list params not None, list gradients not None,
               dict states not None, dict changes not None, list prepared not None):
    """Compute the step of parameters, and change none.

    Parameters
    ----------
    update, params, gradients, states
        See `step_in_place`.
    changes
        Parameter to the `Change` that an optimizer keeps.
    prepared
        Gets the changes that were made.

    Returns
    -------
    list
        See `step_in_place`.
    """
    cdef TensorBase param
    cdef Change change
    cdef PyObject *found
    cdef Py_ssize_t i
    cdef list left = []
    for i in range(len(params)):
        param = params[i]
        if update is None or not is_loopable(param.array):
            left.append(i)
            continue
        found = PyDict_GetItemWithError(changes, param)
        if found == NULL or Py_REFCNT(found) > 1:
            change = changes[param] = new_change(param)
        else:
            change = <Change>found
        if not is_spare(<PyObject *>change.values, param.array):
            change.values = empty_like(param.array)
        if Py_REFCNT(<PyObject *>change.state) > 1:
            change.state = {}
        found = PyDict_GetItemWithError(states, param)
        change.before = None if found == NULL else <dict?><object>found
        if update.apply(param.array, gradients[i], change.before, change.values, change.state):
            prepared.append(change)
        else:
            left.append(i)
    return left


def change_to(TensorBase param not None, cnp.ndarray values not None, dict state not None):
    """Return the `Change` of a parameter to values and state that were made elsewhere."""
    cdef Change change = new_change(param)
    change.values = values
    change.state = state
    return change


cdef inline Change new_change(TensorBase param):
    cdef Change change = Change.__new__(Change)
    change.param = param
    change.state = {}
    return change


def exchange(list prepared not None, dict states not None):
    """Put prepared values in the place of the old ones, which the changes hold then.

    Arrays are exchanged, not written: whoever reads a parameter meanwhile sees all of the
    old values or all of the new ones.
    """
    cdef Change change
    cdef TensorBase param
    for change in prepared:
        param = change.param
        mark_written(param, "step")
        param.array, change.values = change.values, param.array
        if change.before is None or change.state:   # else both are empty
            states[param] = change.state
            change.state = {} if change.before is None else change.before
        change.before = None
    prepared.clear()


cdef inline object empty_like(cnp.ndarray array):
    return cnp.PyArray_SimpleNew(
        cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array), cnp.PyArray_TYPE(array))


# --- the optimizers -----------------------------------------------------------------------------

cdef Update new_update(Kernel64 run64, Kernel32 run32, tuple names, dict group):
    cdef Update update = Update.__new__(Update)
    update.run64 = run64
    update.run32 = run32
    update.names = names
    update.lr = group["lr"]
    update.rates.maximize = group["maximize"]
    update.rates.decay = group.get("weight_decay", 0.0)
    update.rates.eps = group.get("eps", 0.0)
    return update


def sgd(dict group not None):
    """Return the update of `distgrad.optim.SGD`."""
    cdef Update update
    if not group["momentum"]:
        return new_update(dg_sgd_f64, dg_sgd_f32, (), group)
    update = new_update(dg_momentum_f64, dg_momentum_f32, ("velocity",), group)
    update.rates.keep = group["momentum"]
    update.rates.take = 1 - group["dampening"]
    update.rates.nesterov = group["nesterov"]
    return update


def adam(dict group not None):
    """Return the update of `distgrad.optim.Adam`, or of `AdamW`."""
    names = ("mean", "square", "largest_square") if group["amsgrad"] else ("mean", "square")
    cdef Update update = new_update(dg_adam_f64, dg_adam_f32, names, group)
    take_betas(update, group)
    update.rates.rest = 1.0
    if group["decoupled_weight_decay"]:
        if group["weight_decay"]:
            update.rates.rest = 1 - group["lr"] * group["weight_decay"]
        update.rates.decay = 0.0
    return update


def adamax(dict group not None):
    """Return the update of `distgrad.optim.Adamax`."""
    cdef Update update = new_update(dg_adamax_f64, dg_adamax_f32, ("mean", "norm"), group)
    take_betas(update, group)
    return update


cdef int take_betas(Update update, dict group) except -1:
    update.beta, update.beta2 = group["betas"]
    update.rates.keep = update.beta
    update.rates.take = 1 - update.beta
    update.rates.keep2 = update.beta2
    update.rates.take2 = 1 - update.beta2
    update.corrects = update.counts = True
    return 0


def adagrad(dict group not None):
    """Return the update of `distgrad.optim.Adagrad`."""
    cdef Update update = new_update(dg_adagrad_f64, dg_adagrad_f32, ("sum",), group)
    update.fill = group["initial_accumulator_value"]
    update.lr_decay = group["lr_decay"]
    update.counts = True
    return update


def rmsprop(dict group not None):
    """Return the update of `distgrad.optim.RMSprop`."""
    centered, momentum = group["centered"], group["momentum"]
    names = ("square",) + ("mean",) * bool(centered) + ("velocity",) * bool(momentum)
    cdef Update update = new_update(dg_rmsprop_f64, dg_rmsprop_f32, names, group)
    update.rates.keep = group["alpha"]
    update.rates.take = 1 - group["alpha"]
    update.rates.keep2 = momentum
    update.rates.centered = centered
    update.counts = True
    return update


def adadelta(dict group not None):
    """Return the update of `distgrad.optim.Adadelta`."""
    cdef Update update = new_update(
        dg_adadelta_f64, dg_adadelta_f32, ("square", "moved"), group)
    update.rates.keep = group["rho"]
    update.rates.take = 1 - group["rho"]
    update.counts = True
    return update


def rprop(dict group not None):
    """Return the update of `distgrad.optim.Rprop`."""
    cdef Update update = new_update(dg_rprop_f64, dg_rprop_f32, ("previous", "size"), group)
    update.rates.low, update.rates.high = group["etas"]
    update.rates.least, update.rates.most = group["step_sizes"]
    update.fill = group["lr"]
    update.counts = True
    return update
