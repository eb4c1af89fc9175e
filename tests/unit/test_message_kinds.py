"""Every message survives the wire as the tuple of its fields."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from wire_values import whole

from distgrad import message
from distgrad._codec import decode, encode, parse
from distgrad.message import KINDS, code_of


@pytest.mark.parametrize("cls", KINDS.values(), ids=lambda cls: cls.__name__)
def test_message_travels_as_its_fields(cls: Any) -> None:
    body = cls(*(f"field {i}" for i in range(len(cls._fields))))
    frame = parse(whole(encode(code_of(cls), body)))
    assert KINDS[frame.kind](*decode(frame)) == body


@pytest.mark.parametrize("code", KINDS)
def test_message_code_fits_the_header_and_leads_back(code: int) -> None:
    assert 1 <= code <= 255
    assert code_of(KINDS[code]) == code


def test_message_every_class_has_one_code() -> None:
    classes = {
        value
        for name, value in vars(message).items()
        if isinstance(value, type) and value is not NamedTuple and hasattr(value, "_fields")
    }
    assert classes == set(KINDS.values())
    assert len(KINDS) == len(classes)
    assert {cls.__name__ for cls in classes} < set(message.__all__)


def test_message_without_a_code_is_a_mistake_of_the_program() -> None:
    with pytest.raises(KeyError):
        code_of(int)
