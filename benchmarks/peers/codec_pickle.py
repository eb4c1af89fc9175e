"""The messages of bench_codec with pickle, protocol 5."""

from __future__ import annotations

import pickle
import platform

import measure
import messages


class PickleCodec(measure.Peer):
    def __init__(self) -> None:
        self.version = f"Python {platform.python_version()}"
        self.gradients, self.arguments = messages.gradients(), messages.ARGUMENTS
        self.gradients_sent = pickle.dumps(self.gradients, 5)
        self.arguments_sent = pickle.dumps(self.arguments, 5)

    def time_gradients_encode(self) -> None:
        pickle.dumps(self.gradients, 5)

    def time_gradients_decode(self) -> None:
        pickle.loads(self.gradients_sent)

    def time_arguments_encode(self) -> None:
        pickle.dumps(self.arguments, 5)

    def time_arguments_decode(self) -> None:
        pickle.loads(self.arguments_sent)


if __name__ == "__main__":
    measure.serve(PickleCodec)
