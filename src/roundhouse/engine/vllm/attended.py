"""Taking requests in while the GPU computes.

vLLM's own server has a thread that makes requests ready, block hashes and all, while its engine thread waits for the
GPU. Ours has one thread. Requests come in groups, as answers end in groups: made ready between two steps they would
keep the GPU waiting (a prompt of 512 tokens takes 0.3 ms).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

PAUSE_SECONDS = 2e-4  # between two looks; the GPU has its next step by then, so it does not wait for this one's tokens


class Event(Protocol):
    """Of torch.cuda."""

    def query(self) -> bool: ...


class Attended:
    """The future of a step that the GPU computes. Whoever waits for it sees to `meanwhile` until it is there."""

    def __init__(self, future: Any, copied: Event, meanwhile: Callable[[], None]) -> None:
        """`copied`: has happened when the sampled tokens are in the host's memory."""
        self._future = future
        self._copied = copied
        self._meanwhile = meanwhile

    def result(self) -> Any:
        while not self._copied.query():
            self._meanwhile()
            time.sleep(PAUSE_SECONDS)
        return self._future.result()


def attend(executor: Any, meanwhile: Callable[[], None]) -> None:
    """Let the results of vLLM's executor be waited for in this way, where the wait is for a GPU of this process."""
    sample = executor.sample_tokens

    def sample_tokens(grammar_output: Any, non_block: bool = False) -> Any:
        given = sample(grammar_output, non_block=non_block)
        output = getattr(given, "async_output", None)
        # Of vLLM's second model runner, and of its first.
        copied = getattr(output, "copy_event", None) or getattr(output, "async_copy_ready_event", None)
        return given if copied is None else Attended(given, copied, meanwhile)

    executor.sample_tokens = sample_tokens
