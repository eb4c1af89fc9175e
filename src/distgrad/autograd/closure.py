# cython: annotation_typing=False
"""Who takes part in a pass, as its root learns from the reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distgrad.errors import ProtocolError

__all__ = ["Closure", "report_of"]


def report_of(worker: int, peers: Sequence[int]) -> tuple[int, ...]:
    """Return the report of a worker as it travels: its id, the number of peers, the peers."""
    return (worker, len(peers), *peers)


class Closure:
    """The workers reached from the root by closing over the reports.

    Parameters
    ----------
    root
        Where the pass started.

    Attributes
    ----------
    reached
        Workers that take part.
    reports
        What each worker reported: ids of its peers, and ``~id`` of those that it left out
        because they were lost before it began. Workers that were not reached may report.
    missing
        Workers that take part and have not reported.
    partial
        Whether a worker that takes part left somebody out.
    """

    __slots__ = ("missing", "partial", "reached", "reports")

    def __init__(self, root: int) -> None:
        self.reached = {root}
        self.missing = {root}
        self.partial = False
        self.reports: dict[int, Iterable[int]] = {}

    def take(self, reports: Sequence[int]) -> None:
        """Take in reports, as `report_of` makes them, one behind the other."""
        start, count = 0, len(reports)
        while start < count:
            end = start + 2 + (reports[start + 1] if start + 1 < count else count)
            if not start + 2 <= end <= count:
                raise ProtocolError("cannot read the reports of a pass: they end too early")
            self.report(reports[start], reports[start + 2 : end])
            start = end

    def report(self, sender: int, peers: Iterable[int]) -> None:
        """Take in the report of a worker, once."""
        reports, reached, missing = self.reports, self.reached, self.missing
        if sender in reports:
            return
        reports[sender] = peers
        todo = [sender] if sender in missing else []
        while todo:
            worker = todo.pop()
            missing.discard(worker)
            for peer in reports[worker]:
                if peer < 0:
                    self.partial = True
                elif peer not in reached:
                    reached.add(peer)
                    missing.add(peer)
                    if peer in reports:
                        todo.append(peer)

    def left_out(self) -> set[int]:
        """Return workers that take part, but not for all of their peers."""
        named = {~peer for peers in self.reports.values() for peer in peers if peer < 0}
        return named & self.reached

    def workers(self) -> set[int]:
        """Return all that take part or think so."""
        return self.reached | self.reports.keys()
