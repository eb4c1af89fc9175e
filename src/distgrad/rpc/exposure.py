"""What may be called from outside, and under which name.

A function travels as ``module:qualname``. The receiver looks the name up in a table that
was filled when functions were exposed: nothing is imported because a message says so.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np

from distgrad._codec import register_record
from distgrad._core import Tensor, registered
from distgrad.errors import NotExposedError
from distgrad.ops import creation

__all__ = ["Exposure", "expose", "name_of"]

T = TypeVar("T")

# Code that declared itself callable by `expose`: name -> function. A registry of code, like
# sys.modules; what a single worker adds by its options stays in that worker's Exposure.
# `called_names` is its inverse, filled by calls. Compiled code looks into both first.
declared: dict[str, Callable[..., Any]] = {}
_classes: dict[str, type] = {}
# Classes whose instances may come from outside, by `expose` or by the options of any worker:
# what can be sent is, like the codec, the same for all workers of a process.
_known: dict[str, type] = {}
called_names: dict[Any, str] = {}


def expose(target: T) -> T:
    """Declare that other workers may call a function, or the public methods of a class.

    Use as a decorator. A class may also be constructed remotely, and instances of exposed
    dataclasses, named tuples, enums and exceptions may be sent.

    Raises
    ------
    TypeError
        If the target is neither a function nor a class.
    ValueError
        If the target is a lambda or was defined inside a function: the other side could
        not name it.
    """
    if not callable(target):
        raise TypeError(f"cannot expose {target!r}: it is neither a function nor a class")
    name = name_of(target)
    if "<" in name:
        raise ValueError(
            f"cannot expose {name}: other workers could not name it; "
            "define it at the top level of a module"
        )
    for key, function in _offered(name, target):
        declared[key] = function
    if isinstance(target, type):
        _classes[name] = target
        _make_sendable(name, target)
    return target


def _make_sendable(name: str, cls: type) -> None:
    """Let instances of a class travel, if it is of a kind that can."""
    _known[name] = cls
    is_record = dataclasses.is_dataclass(cls) or issubclass(cls, enum.Enum)
    is_record = is_record or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    if is_record and not issubclass(cls, BaseException):
        with suppress(TypeError):  # it cannot be made without its constructor
            register_record(cls, name)


def name_of(function: Any) -> str:
    """Return the name under which a function travels, ``module:qualname``."""
    known = called_names.get(function) if getattr(function, "__hash__", None) else None
    if known is not None:
        return known
    if isinstance(function, np.ufunc):
        return f"numpy:{function.__name__}"
    bound = getattr(function, "__func__", function)
    owner = getattr(function, "__self__", None)
    try:
        if isinstance(owner, type):
            name = f"{owner.__module__}:{owner.__qualname__}.{bound.__name__}"
        else:
            name = f"{bound.__module__}:{bound.__qualname__}"
    except AttributeError:
        raise TypeError(f"cannot call {function!r} remotely: it is not a named function") from None
    if owner is not None and not isinstance(owner, (type, ModuleType)):
        raise TypeError(
            f"cannot call {bound.__qualname__} of an object remotely: the object would not travel; "
            "call a method of an RRef, or pass the object as an argument"
        )
    if bound is function and "<" not in name:
        called_names[function] = name
    return name


def known_class(name: str) -> type | None:
    """Return the class that was exposed under a name, by whomever in this process, or None."""
    return _known.get(name)


def _offered(name: str, target: Any) -> Iterable[tuple[str, Callable[..., Any]]]:
    """Yield every callable that exposing ``target`` offers, with its name."""
    yield name, target
    if isinstance(target, type):
        for attribute, _ in inspect.getmembers(target, callable):
            if not attribute.startswith("_"):
                yield f"{name}.{attribute}", getattr(target, attribute)


class Exposure:
    """The functions that one worker lets others call.

    Parameters
    ----------
    worker_name
        For error messages.
    patterns
        ``"module:name"`` or ``"module:*"``; the modules are imported now.
    """

    def __init__(self, worker_name: str, patterns: Iterable[str] = ()) -> None:
        self.worker_name = worker_name
        self._own: dict[str, Callable[..., Any]] = {}
        self._own_classes: set[type] = set()
        for pattern in patterns:
            self._add(pattern)

    def _add(self, pattern: str) -> None:
        module_name, colon, wanted = pattern.partition(":")
        if not colon or not module_name or not wanted:
            raise ValueError(f"cannot expose {pattern!r}: expected 'module:name' or 'module:*'")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"cannot expose {pattern!r}: {error}") from error
        names = [wanted] if wanted != "*" else _public_names(module)
        for name in names:
            if not hasattr(module, name):
                raise ValueError(f"cannot expose {pattern!r}: {module_name} has no {name!r}")
            target = getattr(module, name)
            if not callable(target):
                raise ValueError(f"cannot expose {pattern!r}: {name} is neither function nor class")
            for key, function in _offered(f"{module_name}:{name}", target):
                self._own[key] = function
            if isinstance(target, type):
                self._own_classes.add(target)
                _make_sendable(name_of(target), target)

    def resolve(self, name: str) -> Callable[..., Any]:
        """Return the function of that name.

        Raises
        ------
        NotExposedError
            If this worker does not offer it.
        """
        function = declared.get(name) or self._own.get(name)
        if function is None:
            function = _operation(name)
            if function is None:
                raise not_exposed(name, self.worker_name)
            self._own[name] = function
        return function

    def resolve_method(self, value: object, method: str) -> Callable[..., Any]:
        """Return a bound public method of a value whose class is exposed.

        Raises
        ------
        NotExposedError
            If the class is not exposed or the method is not public.
        AttributeError
            If there is no such method.
        """
        cls = type(value)
        if method.startswith("_") or not self._offers_class(cls):
            raise not_exposed(f"{cls.__module__}:{cls.__qualname__}.{method}", self.worker_name)
        bound: Any = getattr(value, method)
        if not callable(bound):
            raise TypeError(f"cannot call {cls.__qualname__}.{method}: it is not a method")
        return cast("Callable[..., Any]", bound)

    def _offers_class(self, cls: type) -> bool:
        if cls not in self._own_classes:
            offered = any(
                _classes.get(f"{base.__module__}:{base.__qualname__}") is base
                or base in self._own_classes
                for base in cls.__mro__
            )
            if not offered and not _is_own_value(cls):
                return False
            self._own_classes.add(cls)  # found once is found for good
        return True


def not_exposed(name: str, worker_name: str) -> NotExposedError:
    """Return the error for a function that a worker does not offer."""
    module, _, qualname = name.partition(":")
    if "<" in name:
        return NotExposedError(
            f"cannot call {name} on worker {worker_name!r}: functions travel by name, and it has "
            "none that another process could find",
            hint="define it at the top level of a module, and put `@distgrad.rpc.expose` on it",
        )
    target = qualname.rpartition(".")[0] or qualname
    return NotExposedError(
        f"cannot call {name} on worker {worker_name!r}: it is not exposed there",
        hint=f"put `@distgrad.rpc.expose` on {target} in module {module}, imported by "
        f"{worker_name!r}, or start it with RpcBackendOptions(expose=({module + ':' + target!r},))",
    )


def _is_own_value(cls: type) -> bool:
    """Whether a class is one of distgrad's or NumPy's values, whose methods only compute."""
    return cls.__module__.partition(".")[0] == "distgrad" and cls.__name__ == "Tensor"


def _public_names(module: Any) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return [name for name in listed if callable(getattr(module, name))]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]


def _operation(name: str) -> Callable[..., Any] | None:
    """Return an operation of distgrad's own by name, or one of NumPy's: they only compute."""
    module, _, path = name.partition(":")
    found: Any = None
    if module == "distgrad._core" and path.startswith("Tensor.") and path.count(".") == 1:
        method = path.removeprefix("Tensor.")
        found = None if method.startswith("_") else getattr(Tensor, method, None)
    elif module == creation.__name__ and path in creation.__all__:
        found = getattr(creation, path)
    elif module == "numpy" and isinstance(getattr(np, path, None), np.ufunc):
        found = getattr(np, path)
    elif module.partition(".")[0] == "numpy":  # those that work on tensors
        named = {f"{f.__module__}:{f.__qualname__}": f for f in registered() if _is_function(f)}
        found = named.get(name)
    return found if callable(found) else None


def _is_function(key: Any) -> bool:
    return hasattr(key, "__module__") and hasattr(key, "__qualname__")
