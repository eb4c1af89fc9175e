"""Addresses of workers: ``scheme://location``.

============================  ==========================================
``inproc://<name>``           a listener of this process
``unix:///run/user/0/dg/s``   a Unix socket file
``tcp://127.0.0.1:4000``      a TCP port; IPv6 as ``tcp://[::1]:4000``
============================  ==========================================
"""

from __future__ import annotations

import re
from typing import NamedTuple

from distgrad.errors import TransportError

__all__ = ["Address", "format_host_port", "parse_address", "split_host_port"]

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*\Z")
_MAX_LENGTH = 4096


class Address(NamedTuple):
    """A parsed address; ``str`` gives its text back."""

    scheme: str
    location: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.location}"


def parse_address(text: str) -> Address:
    """Split an address into scheme and location.

    Raises
    ------
    TransportError
        ``text`` is not an address.
    """
    scheme, separator, location = text.partition("://")
    if not separator or not location or not _SCHEME.match(scheme) or len(text) > _MAX_LENGTH:
        raise TransportError(
            f"cannot read address {text[:200]!r}: it is not scheme://location",
            hint="for example tcp://127.0.0.1:4000",
        )
    return Address(scheme, location)


def split_host_port(location: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[ipv6]:port``.

    Raises
    ------
    TransportError
        The port is missing or not in 0-65535, or an IPv6 address lacks its brackets.
    """
    host, separator, port = location.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        separator = ""
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise TransportError(f"cannot read address {location[:200]!r}: it is not host:port")
    return host, int(port)


def format_host_port(host: str, port: int) -> str:
    """Join host and port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
