"""One live request of the TensorRT-LLM engine: what it has, what it cost, what its responses add to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from roundhouse.engine.protocol import FinishReason, Perf, Request
from roundhouse.engine.tensorrt_llm.rounds import Round

NOTHING = Round(0)


@dataclass(slots=True, eq=False)
class Sequence:
    """One live request.

    Attributes:
        ends: end ids that can come; the executor looks for the first.
        part: the round under way. drafts: what the draft model proposed for it. proposing: it is still at that.
        reported: tokens that the executor request under way has given.
        ending: why it ends at its executor's next final response, whatever that says.
        told: its last Output is given; the executor only runs to its end.
    Times are monotonic nanoseconds, 0 for not yet.
    """

    request: Request
    ends: tuple[int, ...]
    generated: list[int] = field(default_factory=list)
    part: Round = NOTHING
    drafts: list[int] = field(default_factory=list)
    proposing: bool = False
    reported: int = 0
    executor_id: int = 0
    ending: FinishReason | None = None
    told: bool = False
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    new_blocks: int = 0
    reused_blocks: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    @property
    def end_id(self) -> int | None:
        return self.ends[0] if self.ends else None

    def add_metrics(self, metrics: Any) -> None:
        """Of one executor request. What later rounds reuse is this sequence's own."""
        if metrics is None:
            return
        times, blocks = metrics.timing_metrics, metrics.kv_cache_metrics
        if not self.first_scheduled_ns:
            self.first_scheduled_ns = _nanoseconds(times.first_scheduled_time)
            self.first_token_ns = _nanoseconds(times.first_token_time)
            self.reused_blocks = blocks.num_reused_blocks
        self.new_blocks = blocks.num_new_allocated_blocks + blocks.num_reused_blocks - self.reused_blocks
        self.last_token_ns = max(self.last_token_ns, _nanoseconds(times.last_token_time))

    def perf(self, tokens_per_block: int) -> Perf:
        return Perf(
            arrival_ns=self.request.arrival_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
            new_blocks=self.new_blocks,
            reused_blocks=self.reused_blocks,
            reused_tokens=self.reused_blocks * tokens_per_block,
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
        )


def gained(sequence: Sequence, result: Any) -> tuple[list[int], list[float]]:
    """The new tokens, and their log probabilities if the request asked: those come for all tokens so far each time."""
    tokens = list(result.output_token_ids[0])
    start, sequence.reported = sequence.reported, sequence.reported + len(tokens)
    if not sequence.request.log_probs:
        return tokens, []
    every = result.log_probs[0] if result.log_probs else []  # a cancelled one may have none
    start = start if len(every) > len(tokens) else 0
    return tokens, [min(float(value), 0.0) for value in every[start : start + len(tokens)]]


def with_end(before: list[int], tokens: list[int], end_id: int | None) -> list[int]:
    """The tokens with the end id that ended them, which the executor leaves out; ours is part of the answer."""
    if end_id is None or [*before, *tokens][-1:] == [end_id]:
        return tokens
    return [*tokens, end_id]


def _nanoseconds(time_point: timedelta) -> int:
    """Of the steady clock, which on Linux is `time.monotonic_ns`."""
    return ((time_point.days * 86400 + time_point.seconds) * 10**6 + time_point.microseconds) * 1000
