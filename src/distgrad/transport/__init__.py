"""Transports: how messages get from one worker to another.

The abstract classes are the contract (`distgrad.transport.base`); a transport of your own
is registered under the scheme of its addresses and passes
`distgrad.testing.transport_contract`.
"""

from distgrad.transport.base import Connection, Handshake, Listener, Transport
from distgrad.transport.registry import find_transport, register_transport, transport_of

__all__ = [
    "Connection",
    "Handshake",
    "Listener",
    "Transport",
    "find_transport",
    "register_transport",
    "transport_of",
]
