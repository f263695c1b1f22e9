"""Pacing: how many responses a front may send. First tokens never wait for it."""

from __future__ import annotations


class Pace:
    """A token bucket over responses: `rate` a second, with bursts of `rate / 50`.

    Taking is always allowed and may leave the bucket in debt; `wait` says for how long nothing more should be sent.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._burst = max(rate / 50, 1.0)
        self._level = self._burst
        self._then = now

    def take(self) -> None:
        self._level -= 1

    def wait(self, now: float) -> float:
        """Seconds until a response may be sent; 0 if one may be sent now."""
        self._level = min(self._level + (now - self._then) * self._rate, self._burst)
        self._then = now
        return max((1 - self._level) / self._rate, 0.0)
