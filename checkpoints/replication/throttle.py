"""A limit on bytes per second, shared by all streams of a transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SLICE = 1 << 18  # bytes: what goes out at once, so that a limit is kept within a second, not within a chunk

Throttle = Callable[[int], None]


def unlimited(_size: int) -> None:
    """The throttle that never waits."""


class Bucket:
    """A token bucket: it fills with `rate` bytes per second and holds a tenth of a second's, or one slice."""

    def __init__(
        self,
        rate: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert rate > 0
        self.rate = rate
        self._room = max(rate / 10, float(SLICE))
        self._tokens, self._at = self._room, now()
        self._now, self._sleep, self._lock = now, sleep, threading.Lock()

    def __call__(self, size: int) -> None:
        """Wait until `size` bytes may go. What waits goes into debt, so that no stream starves another."""
        with self._lock:
            now = self._now()
            self._tokens = min(self._room, self._tokens + (now - self._at) * self.rate) - size
            self._at, debt = now, -self._tokens
        if debt > 0:
            self._sleep(debt / self.rate)
