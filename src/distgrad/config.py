"""The settings of distgrad: one dataclass, one environment variable a field.

``config`` is read when it is used, so a change takes effect at once, but for fields that say
otherwise. The limits of messages are among those: ``init_rpc`` reads them and tells the other
workers, which keep within them as long as this one lives. They are limits of the process, so
``init_rpc`` of a second worker in it reads them again for both. An environment variable
``DISTGRAD_<FIELD>`` overrides the default of each field at import.

The fields are attributes of this module as well, so that ``distgrad.config.trace_graph = True``
means the same however ``config`` was imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Config", "config"]


@dataclass
class Config:
    """Limits, times and switches.

    Times are in seconds unless the name says otherwise; sizes in bytes.
    """

    #: How long a waiting thread polls before it blocks (µs). 0 switches spinning off.
    spin_us: float = 200.0
    #: How long an idle thread lets the poll role lie free before it takes over (µs); up to 17 times
    #: as long, or 5 ms, after a time in which all tasks were short or where processors are scarce.
    grace_us: float = 200.0
    #: Default deadline of a call. `RpcBackendOptions` reads it when they are made.
    rpc_timeout: float = 60.0
    #: How long a worker waits at start for the rest of the world.
    rendezvous_timeout: float = 60.0
    #: How long a connection may take to prove who it is.
    handshake_timeout: float = 5.0
    #: How often a worker asks whether the process of a peer still runs; 0 for never. A peer that
    #: stays silent for three times as long is lost. Read as ``rpc_timeout`` is.
    heartbeat_interval: float = 4.0
    #: How long a peer may take nothing of what a thread waits to send it; then it is lost. The
    #: kernel's own watch over a TCP connection reads it when that is made.
    stall_timeout: float = 60.0
    #: Connections that may be unauthenticated at one time, a listener.
    max_half_open: int = 64
    #: Deepest nesting of values in a message. This and the next five are read by ``init_rpc``.
    max_depth: int = 64
    #: Largest message without its arrays.
    max_meta_bytes: int = 16 * 2**20
    #: Largest sum of the arrays of one message.
    max_payload_bytes: int = 8 * 2**30
    #: Most elements of one container in a message.
    max_items: int = 1_000_000
    #: Most out-of-band arrays in one message.
    max_buffers: int = 1024
    #: Arrays up to this size travel inside the message's metadata.
    inline_array_bytes: int = 2048
    #: Memory, about, that requests of one peer may take up here before they are answered;
    #: more are refused. A worker reads this at its start.
    max_peer_bytes: int = 2**30
    #: Idle receive buffers that are kept warm.
    pool_bytes: int = 256 * 2**20
    #: Whether workers on one host send through shared memory, on connections made from now on.
    shared_memory: bool = True
    #: How deep calls nested in one chain may run on the stack of the waiting thread.
    inline_depth: int = 16
    #: Most serving threads of a worker. Read by ``init_rpc``.
    max_serving_threads: int = 1024
    #: How long a released context's id is remembered.
    tombstone_s: float = 600.0
    #: Record the forward call site with every node, and show it where the node fails or waits.
    trace_graph: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:
            import difflib  # here, because it takes as long to load as the rest of this module

            near = difflib.get_close_matches(name, self.__dataclass_fields__, 1)
            raise AttributeError(
                f"cannot set {name}: distgrad.config has no such setting"
                + (f"; is {near[0]} meant?" if near else ""),
                name=name,
                obj=self,
            )
        if isinstance(value, (int, float)) and not value >= 0:  # true of NaN
            raise ValueError(f"cannot set {name} to {value!r}: expected 0 or more")
        super().__setattr__(name, value)
        for listener in self.__dict__.get("_listeners", {}).get(name, ()):
            listener(value)

    def on_change(self, field: str, listener: Callable[[Any], object]) -> None:
        """Call ``listener`` with the value of a field, now and whenever it is set.

        For compiled code to which looking the field up costs too much.
        """
        self.__dict__.setdefault("_listeners", {}).setdefault(field, []).append(listener)
        listener(getattr(self, field))


def _parse(kind: str, text: str) -> Any:
    if kind == "bool":
        return text.strip().lower() not in ("", "0", "false", "no", "off")
    return {"int": int, "float": float, "str": str}[kind](text)


def _from_environment() -> Config:
    settings = Config()
    for field in fields(Config):
        variable = f"DISTGRAD_{field.name.upper()}"
        if variable in os.environ:
            try:
                setattr(settings, field.name, _parse(str(field.type), os.environ[variable]))
            except ValueError:
                least = "" if field.type in ("bool", "str") else ", 0 or more"
                raise ValueError(
                    f"cannot read {variable}={os.environ[variable]!r}: expected {field.type}{least}"
                ) from None
    return settings


#: The settings of this process.
config = _from_environment()


class _Module(ModuleType):
    """This module, whose attributes by the names of settings are the settings."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) or name.startswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(config, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *Config.__dataclass_fields__})


def _setting(name: str) -> property:
    return property(lambda _: getattr(config, name))


for _field in fields(Config):
    setattr(_Module, _field.name, _setting(_field.name))
sys.modules[__name__].__class__ = _Module

if TYPE_CHECKING:  # for checkers, which do not see the properties

    def __getattr__(name: str) -> Any: ...
