"""Pacing: how many responses a front may send, and how many may be on their way. First tokens never wait for either."""

from __future__ import annotations

from typing import NamedTuple


class Pace:
    """A token bucket over responses: `rate` a second, with bursts of up to a quarter of a second's.

    Taking is always allowed and may leave the bucket in debt; `wait` says for how long nothing more should be sent.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._burst = max(rate / 4, 1.0)
        self._level = self._burst
        self._then = now

    def take(self) -> None:
        self._level -= 1

    def wait(self, now: float) -> float:
        """Seconds until a response may be sent; 0 if one may be sent now."""
        self._level = min(self._level + (now - self._then) * self._rate, self._burst)
        self._then = now
        return max((1 - self._level) / self._rate, 0.0)


class Departure(NamedTuple):
    """When a chunk was sent: its number among all chunks of the front, and the monotonic time in seconds."""

    number: int
    at: float


class Passage:
    """Chunks on their way through postprocessing, which takes them in order: what came before a passed one is through.

    At most `limit` are on their way, so that a first token that cannot wait finds a short queue there. A chunk whose
    client has gone is never passed; it holds the others up for `patience` seconds at most.
    """

    def __init__(self, limit: int, patience: float) -> None:
        self._limit = limit
        self._patience = patience
        self._sent = 0
        self._passed = 0
        self._then = 0.0

    def send(self, now: float) -> Departure:
        self._sent += 1
        self._then = now
        return Departure(self._sent, now)

    def passed(self, chunk: Departure) -> None:
        """Postprocessing has passed the chunk on."""
        self._passed = max(self._passed, chunk.number)

    def overtook(self, chunk: Departure) -> bool:
        """Whether postprocessing has passed a later chunk on."""
        return self._passed > chunk.number

    def wait(self, now: float) -> float:
        """Seconds until a chunk may be sent, if none is passed before; 0 if one may be sent now."""
        if self._sent - self._passed < self._limit:
            return 0.0
        return max(self._then + self._patience - now, 0.0)
