"""The inproc transport keeps the contract."""

from distgrad.testing.transport_contract import TransportContract
from distgrad.transport.inproc import InprocTransport


class TestInproc(TransportContract):
    new_transport = InprocTransport
