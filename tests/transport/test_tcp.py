"""The tcp transport keeps the contract."""

from distgrad.testing.transport_contract import TransportContract
from distgrad.transport.stream import TcpTransport


class TestTcp(TransportContract):
    new_transport = TcpTransport
