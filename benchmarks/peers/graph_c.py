"""The control of adding up gradients: a loop in C, compiled for this processor."""

from __future__ import annotations

import compiled
import graphs
import measure


class Loops(measure.Peer):
    version = "cc -O3 -march=native"

    def __init__(self) -> None:
        self.add = compiled.accumulate().by_loop

    def time_accumulate_16(self) -> None:
        self.add(16, graphs.SUMS)

    def time_accumulate_1024(self) -> None:
        self.add(1024, graphs.SUMS)

    def time_accumulate_65536(self) -> None:
        self.add(65536, graphs.SUMS)


if __name__ == "__main__":
    measure.serve(Loops)
