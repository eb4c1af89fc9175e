"""Functions of single elements; the engine undoes their broadcasting."""

from __future__ import annotations

from typing import Any

import numpy as np

from distgrad._core import Tensor
from distgrad.ops.registry import conj, constant, defvjp, implements, write

__all__ = ["absolute_sign", "call_with_options"]

LN2 = float(np.log(2.0))
LN10 = float(np.log(10.0))


# ------------------------------------------------------------ arithmetic

defvjp(np.add, lambda g, ans, x, y: g, lambda g, ans, x, y: g, needs=("", ""))
defvjp(np.subtract, lambda g, ans, x, y: g, lambda g, ans, x, y: -g, needs=("", ""))
defvjp(
    np.multiply,
    lambda g, ans, x, y: g * conj(y),
    lambda g, ans, x, y: g * conj(x),
    needs=("y", "x"),
)
defvjp(
    np.true_divide,
    lambda g, ans, x, y: g / conj(y),
    lambda g, ans, x, y: -g * conj(ans / y),
    needs=("y", "ya"),
)
defvjp(np.negative, lambda g, ans, x: -g, needs=("",))
defvjp(np.positive, lambda g, ans, x: g, needs=("",))
defvjp(np.square, lambda g, ans, x: g * conj(2 * x), needs=("x",))
defvjp(np.reciprocal, lambda g, ans, x: -g * conj(ans * ans), needs=("a",))
defvjp(
    np.remainder,
    lambda g, ans, x, y: g,
    lambda g, ans, x, y: -g * np.floor(x / y),
    needs=("", "xy"),
)
defvjp(
    np.fmod,
    lambda g, ans, x, y: g,
    lambda g, ans, x, y: -g * np.trunc(x / y),
    needs=("", "xy"),
)


def power_base(g: Any, ans: Any, x: Any, y: Any) -> Any:
    """d/dx of x**y is y x**(y-1), and 0 where y is 0, also at x = 0."""
    if isinstance(y, int | float):
        return g * conj(y * x ** (y - 1)) if y != 0 else np.zeros_like(g)
    return g * conj(y * x ** np.where(y == 0, 1, y - 1))


def power_exponent(g: Any, ans: Any, x: Any, y: Any) -> Any:
    """d/dy of x**y is x**y log x, and 0 at x = 0."""
    zero = np.equal(x, 0)
    return g * conj(np.where(zero, 0, ans * np.log(np.where(zero, 1, x))))


defvjp(np.power, power_base, power_exponent, needs=("xy", "xya"))
defvjp(np.float_power, power_base, power_exponent, needs=("xy", "xya"))


# ------------------------------------------------------------ exponentials, roots

defvjp(np.exp, lambda g, ans, x: g * conj(ans), needs=("a",))
defvjp(np.exp2, lambda g, ans, x: g * conj(ans * LN2), needs=("a",))
defvjp(np.expm1, lambda g, ans, x: g * conj(ans + 1), needs=("a",))
defvjp(np.log, lambda g, ans, x: g / conj(x), needs=("x",))
defvjp(np.log2, lambda g, ans, x: g / conj(x * LN2), needs=("x",))
defvjp(np.log10, lambda g, ans, x: g / conj(x * LN10), needs=("x",))
defvjp(np.log1p, lambda g, ans, x: g / conj(x + 1), needs=("x",))
defvjp(np.sqrt, lambda g, ans, x: g / conj(2 * ans), needs=("a",))
defvjp(np.cbrt, lambda g, ans, x: g / (3 * ans * ans), needs=("a",))
defvjp(
    np.logaddexp,
    lambda g, ans, x, y: g * np.exp(x - ans),
    lambda g, ans, x, y: g * np.exp(y - ans),
    needs=("xa", "ya"),
)
defvjp(
    np.logaddexp2,
    lambda g, ans, x, y: g * np.exp2(x - ans),
    lambda g, ans, x, y: g * np.exp2(y - ans),
    needs=("xa", "ya"),
)


# ------------------------------------------------------------ trigonometry

defvjp(np.sin, lambda g, ans, x: g * conj(np.cos(x)), needs=("x",))
defvjp(np.cos, lambda g, ans, x: -g * conj(np.sin(x)), needs=("x",))
defvjp(np.tan, lambda g, ans, x: g * conj(1 + ans * ans), needs=("a",))
defvjp(np.arcsin, lambda g, ans, x: g / conj(np.sqrt(1 - x * x)), needs=("x",))
defvjp(np.arccos, lambda g, ans, x: -g / conj(np.sqrt(1 - x * x)), needs=("x",))
defvjp(np.arctan, lambda g, ans, x: g / conj(1 + x * x), needs=("x",))
defvjp(np.sinh, lambda g, ans, x: g * conj(np.cosh(x)), needs=("x",))
defvjp(np.cosh, lambda g, ans, x: g * conj(np.sinh(x)), needs=("x",))
defvjp(np.tanh, lambda g, ans, x: g * conj(1 - ans * ans), needs=("a",))
defvjp(np.arcsinh, lambda g, ans, x: g / conj(np.sqrt(x * x + 1)), needs=("x",))
defvjp(np.arccosh, lambda g, ans, x: g / conj(np.sqrt(x - 1) * np.sqrt(x + 1)), needs=("x",))
defvjp(np.arctanh, lambda g, ans, x: g / conj(1 - x * x), needs=("x",))
defvjp(
    np.arctan2,
    lambda g, ans, y, x: g * x / (x * x + y * y),
    lambda g, ans, y, x: -g * y / (x * x + y * y),
    needs=("xy", "xy"),
)
defvjp(
    np.hypot,
    lambda g, ans, x, y: g * x / ans,
    lambda g, ans, x, y: g * y / ans,
    needs=("xa", "ya"),
)
for degrees in (np.degrees, np.rad2deg):
    defvjp(degrees, lambda g, ans, x: g * (180.0 / np.pi), needs=("",))
for radians in (np.radians, np.deg2rad):
    defvjp(radians, lambda g, ans, x: g * (np.pi / 180.0), needs=("",))


def sinc_rule(g: Any, ans: Any, x: Any) -> Any:
    """Around 0, where the quotient has no value, the slope is that of the parabola."""
    zero = np.equal(x, 0)
    slope = (np.cos(np.pi * x) - ans) / np.where(zero, 1, x)
    return g * conj(np.where(zero, -(np.pi**2) / 3 * x, slope))


defvjp(np.sinc, sinc_rule, needs=("xa",))


# ------------------------------------------------------------ kinks and steps


def absolute_sign(g: Any, ans: Any, x: Any) -> Any:
    """Gradient of the absolute value: the sign, for complex x its direction."""
    return g * np.sign(x)


def turn_rule(g: Any, ans: Any, x: Any) -> Any:
    """Gradient of the sign: none, but of the direction of complex x what is across to it."""
    if x.dtype.kind != "c":
        return np.zeros_like(g)
    size = np.absolute(x)
    across = g - ans * np.real(g * conj(ans))
    return np.where(size == 0, 0, across / np.where(size == 0, 1, size))


def share(g: Any, first: Any, second: Any) -> Any:
    """Give `g` where `first` wins over `second`, half of it where they are equal."""
    return g * np.where(first == second, np.asarray(0.5, g.dtype), first > second)


defvjp(np.absolute, absolute_sign, needs=("x",))
defvjp(np.fabs, absolute_sign, needs=("x",))
defvjp(
    np.maximum,
    lambda g, ans, x, y: share(g, x, y),
    lambda g, ans, x, y: share(g, y, x),
    needs=("xy", "xy"),
)
defvjp(
    np.minimum,
    lambda g, ans, x, y: share(g, y, x),
    lambda g, ans, x, y: share(g, x, y),
    needs=("xy", "xy"),
)
defvjp(
    np.fmax,
    lambda g, ans, x, y: np.where(np.isnan(y), g, share(g, x, y)),
    lambda g, ans, x, y: np.where(np.isnan(x), g, share(g, y, x)),
    needs=("xy", "xy"),
)
defvjp(
    np.fmin,
    lambda g, ans, x, y: np.where(np.isnan(y), g, share(g, y, x)),
    lambda g, ans, x, y: np.where(np.isnan(x), g, share(g, x, y)),
    needs=("xy", "xy"),
)
defvjp(
    np.copysign,
    lambda g, ans, x, y: np.where(np.signbit(x) == np.signbit(y), g, -g),
    None,
    needs=("xy",),
)
defvjp(np.sign, turn_rule, needs=("xa",))
for step in (np.floor, np.ceil, np.trunc, np.rint):
    defvjp(step, lambda g, ans, x: np.zeros_like(g), needs=("",))
defvjp(np.round, lambda g, ans, x, decimals=0: np.zeros_like(g), needs=("",))
defvjp(
    np.nan_to_num,
    lambda g, ans, x, **options: np.where(np.isfinite(x), g, 0),
    needs=("x",),
)


@implements(np.clip)
def clip(a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Any:
    """Limit values; at a limit itself the gradient passes to the value."""
    low = min if a_min is None else a_min
    high = max if a_max is None else a_max
    if low is not None:
        a = np.where(np.less(a, low), low, a)
    return a if high is None else np.where(np.greater(a, high), high, a)


# ------------------------------------------------------------ complex parts

defvjp(np.conjugate, lambda g, ans, x: np.conjugate(g), needs=("",))
defvjp(np.real, lambda g, ans, x: g, needs=("",))
defvjp(np.imag, lambda g, ans, x: g * 1j if x.dtype.kind == "c" else np.zeros_like(g), needs=("s",))
defvjp(np.angle, lambda g, ans, x: g * 1j * x / np.absolute(x) ** 2, needs=("x",))


# ------------------------------------------------------------ without gradient

constant(
    [
        *(np.logical_and, np.logical_or, np.logical_xor, np.logical_not, np.isnan, np.isinf),
        *(np.isfinite, np.signbit, np.heaviside, np.left_shift, np.right_shift, np.isclose),
        *(np.allclose, np.array_equal, np.iscomplexobj, np.isrealobj, np.result_type),
        *(np.zeros_like, np.ones_like, np.empty_like, np.full_like, np.spacing),
    ]
)


# ------------------------------------------------------------ options of ufuncs


@implements("__call__")
def call_with_options(
    ufunc: Any,
    *inputs: Any,
    out: Any = None,
    where: Any = True,
    dtype: Any = None,
    **options: Any,
) -> Any:
    """Call a ufunc with ``where``, ``dtype`` or ``out``, as operations that are recorded."""
    if options:
        raise TypeError(f"cannot record {ufunc.__name__} with the options {sorted(options)}")
    if len(inputs) > ufunc.nin:
        inputs, out = inputs[: ufunc.nin], inputs[ufunc.nin :]
    target = out[0] if isinstance(out, tuple) else out
    if dtype is not None:
        inputs = tuple(
            (x if isinstance(x, Tensor) else np.asarray(x)).astype(dtype) for x in inputs
        )
    result = ufunc(*inputs)
    if where is not True:
        result = np.where(where, result, np.zeros_like(result) if target is None else target)
    return write(target, result)
