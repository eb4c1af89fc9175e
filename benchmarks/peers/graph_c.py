"""The control of adding up gradients: a loop in C, compiled for this processor."""

from __future__ import annotations

import compiled
import graphs
import measure


class Loops(measure.Peer):
    version = "cc -O3 -march=native"

    def __init__(self) -> None:
        compiled.sums(16)  # raises here if there is no compiler

    def time_accumulate_16(self) -> None:
        compiled.sums(16).by_loop(graphs.SUMS)

    def time_accumulate_1024(self) -> None:
        compiled.sums(1024).by_loop(graphs.SUMS)

    def time_accumulate_65536(self) -> None:
        compiled.sums(65536).by_loop(graphs.SUMS)


if __name__ == "__main__":
    measure.serve(Loops)
