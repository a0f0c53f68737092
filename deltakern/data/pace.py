"""How long work has taken and will take, said now and then."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something: "3 d 4 h", "2 h 5 min", "40 s"."""
    left = max(0, round(seconds))
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def figure(value: float) -> str:
    """Three digits at least, no exponent: "0.00412", "3.14", "12,346"."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def counted(count: int, what: str) -> str:
    """ "1 clip", "2 clips"."""
    return f"{count} {what}{'s' * (count != 1)}"


class Pace:
    """Counts work done since it was made, and says when the next line about it is due.

    Args:
        total: of the work that is left.
        every: seconds between two lines; the first is due at once.
    """

    def __init__(self, total: int, every: float) -> None:
        self.total, self.every, self.done = total, every, 0
        self._began, self._said = time.perf_counter(), -float("inf")

    def advance(self, count: int = 1) -> None:
        self.done += count

    def due(self) -> bool:
        """Whether the last line is long enough ago; if so, the next is counted from now."""
        now = time.perf_counter()
        if now - self._said < self.every:
            return False
        self._said = now
        return True

    @property
    def rate(self) -> float:
        """Of the work a second."""
        return self.done / max(1e-9, time.perf_counter() - self._began)

    @property
    def left(self) -> str:
        """How long the rest will take at the pace so far."""
        return duration((self.total - self.done) / self.rate) if self.done else "?"
