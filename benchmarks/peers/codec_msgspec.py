"""The messages of bench_codec as MessagePack; arrays as (dtype, shape, bytes) by hand."""

from __future__ import annotations

import measure
import messages
import numpy as np


class MsgspecCodec(measure.Peer):
    def __init__(self) -> None:
        import msgspec

        self.version = msgspec.__version__
        self.encode = msgspec.msgpack.Encoder(enc_hook=array_to_fields).encode
        self.decode = msgspec.msgpack.Decoder().decode
        self.gradients, self.arguments = messages.gradients(), messages.ARGUMENTS
        self.gradients_sent = self.encode(self.gradients)
        self.arguments_sent = self.encode(self.arguments)

    def time_gradients_encode(self) -> None:
        self.encode(self.gradients)

    def time_gradients_decode(self) -> None:
        [fields_to_array(fields) for fields in self.decode(self.gradients_sent)]

    def time_arguments_encode(self) -> None:
        self.encode(self.arguments)

    def time_arguments_decode(self) -> None:
        self.decode(self.arguments_sent)


def array_to_fields(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()


def fields_to_array(fields: list) -> np.ndarray:
    dtype, shape, data = fields
    return np.frombuffer(data, dtype).reshape(shape).copy()


if __name__ == "__main__":
    measure.serve(MsgspecCodec)
