"""The messages of bench_codec in distgrad's wire format, headers and checksums included."""

from __future__ import annotations

import measure
import messages

import distgrad
from distgrad._codec import decode, encode, parse

REQUEST = 1


def to_bytes(value: object) -> bytes:
    return b"".join(encode(REQUEST, value).parts())


class DistgradCodec(measure.Peer):
    def __init__(self) -> None:
        self.version = distgrad.__version__
        self.gradients, self.arguments = messages.gradients(), messages.ARGUMENTS
        self.gradients_sent = to_bytes(self.gradients)
        self.arguments_sent = to_bytes(self.arguments)

    def time_gradients_encode(self) -> None:
        encode(REQUEST, self.gradients).parts()

    def time_gradients_decode(self) -> None:
        decode(parse(self.gradients_sent))

    def time_arguments_encode(self) -> None:
        encode(REQUEST, self.arguments).parts()

    def time_arguments_decode(self) -> None:
        decode(parse(self.arguments_sent))


if __name__ == "__main__":
    measure.serve(DistgradCodec)
