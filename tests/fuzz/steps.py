"""An input as a list of steps: what the targets that tell a story read from it."""

from __future__ import annotations


class Steps:
    """The bytes of an input."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> bool:
        """Whether there are more."""
        return self._at < len(self._data)

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes, zeros once there are none."""
        piece = self._data[self._at : self._at + nbytes]
        self._at += nbytes
        return piece.ljust(nbytes, b"\0")

    def choose(self, most: int) -> int:
        """Return a number below ``most``."""
        return self.take(1)[0] % most

    def damage(self, data: bytes) -> bytes:
        """Return the bytes as they are, cut, with others behind them, or with one changed."""
        how = self.choose(4)
        if how == 0:
            return data
        at, value = self.take(2)
        at %= len(data)
        if how == 1:
            return data[:at]
        if how == 2:
            return data + self.take(value)
        return data[:at] + bytes([data[at] ^ (value or 1)]) + data[at + 1 :]
