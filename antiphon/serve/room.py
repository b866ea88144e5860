"""How much room one of several servers has, as far as who sends callers to it can know."""

from __future__ import annotations

import time
from collections import deque


class Room:
    """A server's own word about its free places, less those that were sent there a moment ago.

    A word may be older than who was sent before it came, so it takes nobody off: whoever it counts already is counted
    twice for a moment, which is the same for all servers.

    Args:
        lag: seconds after which whoever was sent is in the server's word.
    """

    def __init__(self, lag: float) -> None:
        self.lag = lag
        self.sent = deque[float]()

    def take(self) -> None:
        """One more has been sent there."""
        self.sent.append(time.monotonic())

    def rank(self, free: int) -> tuple[int, int]:
        """The higher, the better for the next caller; who says it has no place comes after all who say they have one.

        Short requests count as sent too: many of them must not make a server with places look fuller than a full one.
        """
        return min(free, 1), self.left(free)

    def left(self, free: int) -> int:
        """Places left where the server last spoke of `free`; below zero where more were sent."""
        while self.sent and self.sent[0] < time.monotonic() - self.lag:
            self.sent.popleft()
        return free - len(self.sent)
