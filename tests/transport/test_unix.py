"""The unix transport keeps the contract, through shared memory and without."""

import pytest

from distgrad.config import config
from distgrad.testing.transport_contract import TransportContract
from distgrad.transport.stream import UnixTransport


class TestUnix(TransportContract):
    new_transport = UnixTransport


class TestPlainUnix(TransportContract):
    new_transport = UnixTransport

    @pytest.fixture(autouse=True)
    def plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(config, "shared_memory", False)
