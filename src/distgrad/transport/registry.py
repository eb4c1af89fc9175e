"""From the scheme of an address to the transport that serves it.

A transport is found in this order: registered in this process, shipped with distgrad,
installed by another package under the entry-point group ``distgrad.transports``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

from distgrad.errors import TransportError
from distgrad.transport.address import parse_address
from distgrad.transport.base import Transport

__all__ = ["known_schemes", "register_transport", "transport_for"]

GROUP = "distgrad.transports"

# Named, not imported: a worker loads only the transports that it uses.
_SHIPPED = {
    "inproc": "distgrad.transport.inproc:InprocTransport",
    "unix": "distgrad.transport.stream:UnixTransport",
    "tcp": "distgrad.transport.stream:TcpTransport",
}
_registered: dict[str, Callable[[], Transport]] = {}


def register_transport(scheme: str, factory: Callable[[], Transport]) -> None:
    """Let addresses ``scheme://…`` be served by the transport that ``factory()`` makes.

    A later registration of the same scheme, or of a scheme that distgrad ships, replaces
    the earlier one. Packages can do without a call: an entry point of the group
    ``distgrad.transports`` named after the scheme does the same.
    """
    parse_address(f"{scheme}://check")
    _registered[scheme] = factory


def transport_for(scheme: str) -> Transport:
    """Make the transport of a scheme.

    Raises
    ------
    TransportError
        No transport has that scheme.
    """
    if scheme in _registered:
        return _registered[scheme]()
    if scheme in _SHIPPED:
        module, _, name = _SHIPPED[scheme].partition(":")
        transport: Transport = getattr(import_module(module), name)()
        return transport
    for point in entry_points(group=GROUP, name=scheme):
        installed: Transport = point.load()()
        return installed
    raise TransportError(
        f"cannot find a transport for {scheme!r}: known are {', '.join(known_schemes())}",
        hint="register_transport(scheme, factory) adds one",
    )


def known_schemes() -> list[str]:
    """List the schemes that `transport_for` knows, sorted."""
    installed = {point.name for point in entry_points(group=GROUP)}
    return sorted({*_registered, *_SHIPPED, *installed})
