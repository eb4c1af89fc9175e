"""Exceptions as messages.

An exception crosses as text, plus its arguments if they can be sent. The caller gets the
original class when it knows it: a builtin, one of distgrad's own, or an exposed class.
Nothing is executed to rebuild one: ``__init__`` is not called.
"""

from __future__ import annotations

import builtins
import traceback

from distgrad import errors
from distgrad.errors import DistgradError, RemoteError
from distgrad.message import Error
from distgrad.rpc.exposure import exposed_class

__all__ = ["describe", "rebuild"]

# What may stand among the arguments of an exception that is sent.
_PLAIN = (str, int, float, bool, bytes, type(None))


def describe(error: BaseException, worker_name: str) -> Error:
    """Return the message that tells a caller of ``error``.

    Parameters
    ----------
    error
        What the handler raised.
    worker_name
        The worker it was raised on; appended to the workers it crossed before.
    """
    cls = type(error)
    args = error.args if all(isinstance(a, _PLAIN) for a in error.args) else None
    hint = getattr(error, "hint", None) if isinstance(error, DistgradError) else None
    return Error(
        f"{cls.__module__}:{cls.__qualname__}",
        _first_words(error),
        args if hint is None else (*(args or (str(error),)), hint),
        _remote_text(error),
        (*getattr(error, "workers", ()), worker_name),
    )


def _first_words(error: BaseException) -> str:
    try:
        return error.message if isinstance(error, DistgradError) else str(error)
    except Exception as second:  # a broken __str__ must not hide the error itself
        return f"<{type(error).__name__} whose text failed: {type(second).__name__}>"


def _remote_text(error: BaseException) -> str:
    earlier = getattr(error, "remote_traceback", None)
    own = "".join(traceback.format_exception(error))
    return f"{earlier}\n{own}" if earlier and earlier not in own else own


def rebuild(message: Error) -> BaseException:
    """Return the exception that a message tells of.

    The exception has the attributes ``workers`` (names, origin first) and
    ``remote_traceback`` (text), and shows both.
    """
    error = _instance(message)
    error.workers = message.workers  # type: ignore[attr-defined]
    error.remote_traceback = message.traceback  # type: ignore[attr-defined]
    route = " <- ".join(repr(name) for name in message.workers)
    error.add_note(f"raised on worker {route}; remote traceback:\n{message.traceback}")
    return error


def _instance(message: Error) -> BaseException:
    cls = _known_class(message.type_name)
    if cls is not None and issubclass(cls, DistgradError):
        hint = message.args[-1] if message.args and len(message.args) > 1 else None
        return cls(message.message, hint=hint)
    if cls is not None:
        args = message.args if message.args is not None else (message.message,)
        try:
            error = cls.__new__(cls, *args)
        except TypeError:  # a class that cannot be made without its constructor
            return _unknown(message)
        error.args = args
        return error
    return _unknown(message)


def _unknown(message: Error) -> RemoteError:
    name = message.type_name.replace(":", ".")
    return RemoteError(
        f"{name} on worker {message.workers[0]!r}: {message.message}",
        hint="expose the exception's class on both sides to catch it by its own type",
    )


def _known_class(type_name: str) -> type[BaseException] | None:
    module, _, name = type_name.partition(":")
    if module == "builtins":
        found = getattr(builtins, name, None)
        known = isinstance(found, type) and issubclass(found, Exception)
    elif module == "distgrad.errors":
        found = getattr(errors, name, None) if name in errors.__all__ else None
        known = found is not None
    else:
        found = exposed_class(type_name)
        known = found is not None and issubclass(found, Exception)
    return found if known else None
