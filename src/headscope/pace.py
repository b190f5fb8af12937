"""How often captures may be made, by what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """How often captures may be made.

    Args:
        overhead: the part of the time that they may take; any, if None.
    """

    def __init__(self, overhead: float | None) -> None:
        self.overhead = overhead
        self.stretched = False
        self._began = self._spent = 0.0

    def due(self) -> bool:
        """Whether the time since the last capture is long enough for what that one took."""
        if self.overhead is None or time.perf_counter() - self._began >= self._spent / self.overhead:
            return True
        self.stretched = True
        return False

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measures a capture."""
        self._began = time.perf_counter()
        try:
            yield
        finally:
            self._spent = time.perf_counter() - self._began
