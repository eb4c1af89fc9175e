"""Transports: how messages get from one worker to another.

The abstract classes are the contract (`distgrad.transport.base`); a transport of your own
is registered under the scheme of its addresses and passes
`distgrad.testing.transport_contract`.
"""

from distgrad.transport.base import Connection, Handshake, Listener, Transport
from distgrad.transport.registry import register_transport, transport_for

__all__ = [
    "Connection",
    "Handshake",
    "Listener",
    "Transport",
    "register_transport",
    "transport_for",
]
