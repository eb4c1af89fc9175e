"""Exceptions as messages, and as values in messages.

An exception crosses as text, plus those of its arguments and attributes that can be sent. The
receiver gets the original class when it knows it: a builtin, one of distgrad's own, or an
exposed class; otherwise a `RemoteError`. No code of the class is executed to rebuild one:
only the constructor of the builtin that it derives from, which is C.
"""

from __future__ import annotations

import builtins
import threading
import traceback
from typing import Any

from distgrad import _codec, errors
from distgrad.errors import BackwardError, DistgradError, RemoteError
from distgrad.message import Error, code_of
from distgrad.rpc.exposure import known_class

__all__ = ["bare", "contain", "describe", "is_interrupt", "rebuild"]

_PLAIN = (str, int, float, bool, bytes, type(None))
_ERROR = code_of(Error)
_TOLD_APART = ("workers", "remote_traceback")  # attributes that have fields of their own
# What builtins keep neither in their arguments nor among the attributes of the instance.
_KEPT_APART: dict[type[BaseException], tuple[str, ...]] = {
    OSError: ("filename", "filename2"),
    ImportError: ("name", "path"),
    NameError: ("name",),
    AttributeError: ("name",),
}
_CAUSE = "cause"  # of a pass that failed; other causes are in the traceback alone
_MOST_TEXT = 10_000  # characters of what is sent after something longer could not be


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception may be Ctrl-C, which is for this thread and not for a caller alone.

    Everything else that a function raises while it serves a call is its failure: SystemExit
    ends neither the thread that happens to serve nor the program.
    """
    return (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
    )


def contain(error: BaseException, worker_name: str) -> Exception:
    """Return the failure of a served function as what may be raised where its value is used."""
    if isinstance(error, Exception):
        return error
    type_name = f"{type(error).__module__}:{type(error).__qualname__}"
    failure = _unknown(type_name, f" on worker {worker_name!r}", _first_words(error))
    failure.__cause__ = error
    return failure


def describe(error: BaseException, worker_name: str) -> Error:
    """Return the message that tells a caller of ``error``.

    Parameters
    ----------
    error
        What the handler raised.
    worker_name
        The worker it was raised on; appended to the workers it crossed before.
    """
    type_name, text, args, state = _to_wire(error)
    workers = (*getattr(error, "workers", ()), worker_name)
    return Error(type_name, text, args, _remote_text(error), workers, state)


def bare(message: Error) -> Error:
    """Return what is left to tell if all of it together cannot be sent: class and text."""
    return message._replace(
        message=message.message[:_MOST_TEXT],
        args=None,
        traceback=message.traceback[-_MOST_TEXT:],
        state=None,
    )


class _Trial:
    """Stands in for the session while it is tried whether a value can be sent."""

    def slot_of(self, tensor: Any) -> int:
        return -1


_TRIAL = _Trial()


def _to_wire(
    error: BaseException, session: Any = None
) -> tuple[str, str, tuple[Any, ...] | None, dict[str, Any] | None]:
    """Return class, text, arguments and attributes of an exception as what can be sent."""
    # In a trial exceptions within exceptions are not tried in turn: that would take twice as
    # long with each step, and for ever with two that know each other.
    fits = _is_plain if session is _TRIAL else _can_be_sent
    cls = type(error)
    args = error.args if fits(error.args) else None
    state = {
        name: value
        for name, value in {**_kept_apart(error), **vars(error)}.items()
        if not name.startswith("__") and name not in _TOLD_APART and fits(value)
    }
    if isinstance(error, BackwardError) and error.__cause__ and fits(error.__cause__):
        state[_CAUSE] = error.__cause__
    return f"{cls.__module__}:{cls.__qualname__}", _first_words(error), args, state or None


def _kept_apart(error: BaseException) -> dict[str, Any]:
    return {
        name: value
        for kind, names in _KEPT_APART.items()
        if isinstance(error, kind)
        for name in names
        if (value := vars(kind)[name].__get__(error)) is not None
    }


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (
        type(value) is tuple and all(type(member) in _PLAIN for member in value)
    )


def _can_be_sent(value: Any) -> bool:
    if _is_plain(value):
        return True
    try:
        _codec.encode(_ERROR, value, _TRIAL)
    except Exception:  # whatever it is: the error to tell of is another one
        return False
    return True


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
    error = _from_wire((message.type_name, message.message, message.args, message.state))
    if error is not None:
        return error
    return _unknown(message.type_name, f" on worker {message.workers[0]!r}", message.message)


def _from_wire(described: Any) -> BaseException | None:
    """Return what `_to_wire` described; None if its class is not known here."""
    type_name, text, args, state = described
    cls = _known_class(type_name)
    if cls is None:
        return None
    native: Any = cls
    while native.__module__ != "builtins":
        native = native.__base__
    args = tuple(args) if args is not None else (text,)
    try:
        error: BaseException = native.__new__(cls, *args)
        native.__init__(error, *args)
    except Exception:  # a builtin that does not take a bare text, or hostile arguments
        return None
    if isinstance(error, DistgradError):
        vars(error).update(message=text, detail=None, hint=None)
    state = dict(state or {})
    if isinstance(error, BackwardError):
        cause = state.pop(_CAUSE, None)
        error.__cause__ = cause if isinstance(cause, BaseException) else None
    for kind, names in _KEPT_APART.items():
        if isinstance(error, kind):
            for name in state.keys() & set(names):
                vars(kind)[name].__set__(error, state.pop(name))
    for name, value in state.items():
        if not name.startswith("__"):
            vars(error)[name] = value
    return error


def _unknown(type_name: str, where: str, text: str) -> RemoteError:
    hint = "expose the exception's class on both sides to catch it by its own type"
    return RemoteError(
        f"{type_name.replace(':', '.')}{where}: {text}",
        hint=None if type_name.startswith("builtins:") else hint,
    )


def _known_class(type_name: str) -> type[BaseException] | None:
    module, _, name = type_name.partition(":")
    found: Any
    if module == "builtins":
        found = getattr(builtins, name, None)
    elif module == "distgrad.errors":
        found = getattr(errors, name, None) if name in errors.__all__ else None
    else:
        found = known_class(type_name)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _value_from_wire(described: Any, session: Any) -> BaseException:
    error = _from_wire(described)
    return error if error is not None else _unknown(described[0], "", described[1])


_codec.register_exceptions(_to_wire, _value_from_wire)
