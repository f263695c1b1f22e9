"""Pacing: how many responses a front may send, and how many may be on their way. First and last chunks wait for
neither."""

from __future__ import annotations

from typing import NamedTuple

GATHERED = 16  # responses
GATHER_SECONDS = 0.032  # the longest that any waits for others


class Pace:
    """A token bucket over responses: `rate` a second, with bursts of up to a quarter of a second's.

    Taking is always allowed and may leave the bucket in debt; `wait` says for how long nothing more should be sent.
    When the bucket is empty, GATHERED responses come together before the next is due: each that is sent alone wakes
    this process, Triton and the client, and takes a core from an engine that computes on all of them.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._burst = max(rate / 4, 1.0)
        self._gathered = min(GATHERED, max(rate * GATHER_SECONDS, 1.0))
        self._level = self._burst
        self._then = now
        self._due = 1.0  # the level at which the next response is due

    def take(self, cost: float = 1.0) -> None:
        self._level -= cost

    def wait(self, now: float) -> float:
        """Seconds until a response may be sent; 0 if one may be sent now."""
        self._level = min(self._level + (now - self._then) * self._rate, self._burst)
        self._then = now
        if self._level < 1:
            self._due = self._gathered
        elif self._level >= self._due:
            self._due = 1.0
        return max((self._due - self._level) / self._rate, 0.0)


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
