"""Addresses and the registry of schemes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.errors import TransportError
from distgrad.transport import registry
from distgrad.transport.address import (
    Address,
    format_host_port,
    parse_address,
    split_host_port,
)
from distgrad.transport.inproc import InprocTransport
from distgrad.transport.registry import known_schemes, register_transport, transport_for


@pytest.mark.parametrize(
    ("text", "scheme", "location"),
    [
        ("tcp://127.0.0.1:80", "tcp", "127.0.0.1:80"),
        ("unix:///tmp/x/s", "unix", "/tmp/x/s"),
        ("inproc://1/2", "inproc", "1/2"),
        ("a+b-c.d://x://y", "a+b-c.d", "x://y"),
    ],
)
def test_address_text_gives_scheme_and_location(text: str, scheme: str, location: str) -> None:
    assert parse_address(text) == Address(scheme, location)
    assert str(parse_address(text)) == text


@pytest.mark.parametrize("text", ["", "tcp", "tcp:/x", "tcp://", "://x", "T://x", "x" * 5000])
def test_address_malformed_raises(text: str) -> None:
    with pytest.raises(TransportError, match="cannot read address"):
        parse_address(text)


@given(st.sampled_from(["127.0.0.1", "::1", "node-7.example", "fe80::1"]), st.integers(0, 65535))
def test_host_and_port_survive_formatting(host: str, port: int) -> None:
    assert split_host_port(format_host_port(host, port)) == (host, port)


@pytest.mark.parametrize(
    "location", ["host", ":80", "host:", "host:-1", "host:65536", "::1:80", "host:²", "[]:1"]
)
def test_host_and_port_malformed_raise(location: str) -> None:
    with pytest.raises(TransportError, match="not host:port"):
        split_host_port(location)


@given(st.text(max_size=40))
def test_address_of_any_text_parses_or_raises_transport_error(text: str) -> None:
    try:
        split_host_port(parse_address(text).location)
    except TransportError:
        return


def test_registry_ships_three_transports() -> None:
    assert {"inproc", "unix", "tcp"} <= set(known_schemes())
    for scheme in ("inproc", "unix", "tcp"):
        assert transport_for(scheme).scheme == scheme


def test_registry_unknown_scheme_raises_and_names_the_known() -> None:
    with pytest.raises(TransportError, match="known are inproc, tcp, unix"):
        transport_for("pigeon")


def test_registered_transport_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pigeon(InprocTransport):
        scheme = "pigeon"

    monkeypatch.setattr(registry, "_registered", {})
    register_transport("pigeon", Pigeon)
    assert isinstance(transport_for("pigeon"), Pigeon)
    assert "pigeon" in known_schemes()


def test_register_of_a_malformed_scheme_raises() -> None:
    with pytest.raises(TransportError, match="cannot read address"):
        register_transport("No Scheme", InprocTransport)
