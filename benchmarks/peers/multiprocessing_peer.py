"""multiprocessing: methods of an object behind a manager, called through its proxy."""

from __future__ import annotations

import platform
from multiprocessing.managers import BaseManager

import measure


class Functions:
    def noop(self):
        return None

    def echo(self, value):
        return value


class Manager(BaseManager):
    pass


Manager.register("Functions", Functions)


class MultiprocessingPeer(measure.Peer):
    def __init__(self) -> None:
        import numpy as np

        self.version = f"Python {platform.python_version()}"
        self.manager = Manager()
        self.manager.start()
        self.functions = self.manager.Functions()
        self.small = np.zeros(1, np.float32)
        self.large = np.ones(4 * 2**20, np.float32)
        self.larger = np.ones(16 * 2**20, np.float32)

    def close(self) -> None:
        self.manager.shutdown()

    def time_noop(self) -> None:
        self.functions.noop()

    def time_echo_small(self) -> None:
        self.functions.echo(self.small)

    def time_echo_16mb(self) -> None:
        self.functions.echo(self.large)

    def time_echo_64mb(self) -> None:
        self.functions.echo(self.larger)


if __name__ == "__main__":
    measure.serve(MultiprocessingPeer)
