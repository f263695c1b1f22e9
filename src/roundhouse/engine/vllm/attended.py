"""Taking requests in while the GPU computes.

vLLM's own server has a thread that makes requests ready, block hashes and all, while its engine thread waits for the
GPU. Ours has one thread. Requests come in groups, as answers end in groups: made ready between two steps they would
keep the GPU waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

PAUSE_SECONDS = 1e-4  # between two looks: so late may a step's tokens be noticed
LONG_SECONDS = 5e-4  # a wait that leaves time to be late: the GPU has its next step already


class Event(Protocol):
    """Of torch.cuda."""

    def query(self) -> bool: ...


class Attention:
    """Waits for steps of the GPU and sees to `meanwhile`, as long as waits are long."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self._waited = 0.0  # seconds, the last time

    def result(self, future: Any, copied: Event) -> Any:
        """Of a vLLM future. `copied`: has happened when the sampled tokens are in the host's memory."""
        begun = time.monotonic()
        while self._waited > LONG_SECONDS and not copied.query():
            self._meanwhile()
            time.sleep(PAUSE_SECONDS)
        result = future.result()
        self._waited = time.monotonic() - begun
        return result


class Attended:
    """What vLLM takes for the future of a step."""

    def __init__(self, attention: Attention, future: Any, copied: Event) -> None:
        self._attention = attention
        self._future = future
        self._copied = copied

    def result(self) -> Any:
        return self._attention.result(self._future, self._copied)


def attend(executor: Any, meanwhile: Callable[[], None]) -> None:
    """Let the results of vLLM's executor be waited for in this way, where the wait is for a GPU of this process."""
    attention = Attention(meanwhile)
    sample = executor.sample_tokens

    def sample_tokens(grammar_output: Any, non_block: bool = False) -> Any:
        given = sample(grammar_output, non_block=non_block)
        output = getattr(given, "async_output", None)
        # Of vLLM's second model runner, and of its first.
        copied = getattr(output, "copy_event", None) or getattr(output, "async_copy_ready_event", None)
        return given if copied is None else Attended(attention, given, copied)

    executor.sample_tokens = sample_tokens
