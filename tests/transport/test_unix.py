"""The unix transport keeps the contract."""

from distgrad.testing.transport_contract import TransportContract
from distgrad.transport.stream import UnixTransport


class TestUnix(TransportContract):
    new_transport = UnixTransport
