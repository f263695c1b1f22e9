"""What the fronts of both doors tell Prometheus, whatever library tells it: the families, and a sequence's share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from roundhouse.engine.protocol import Error, ErrorCode, Perf

TOKEN_BUCKETS = [10.0, 50.0, 100.0, 500.0, 1000.0]
TTFT_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
ITL_BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0]
REQUEST_BUCKETS = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]

# Histogram name -> (description, labels beyond model and version, buckets). The first two are upstream's.
HISTOGRAMS: dict[str, tuple[str, dict[str, str], list[float]]] = {
    "nv_llm_input_token_len": (
        "TRT LLM response metrics", {"response_metric_type": "total_input_tokens"}, TOKEN_BUCKETS,
    ),
    "nv_llm_output_token_len": (
        "TRT LLM response metrics", {"response_metric_type": "total_output_tokens"}, TOKEN_BUCKETS,
    ),
    "roundhouse_time_to_first_token_seconds": (
        "From the arrival of a request to the sending of its first response with a token", {}, TTFT_BUCKETS,
    ),
    "roundhouse_inter_token_latency_seconds": (
        "Mean time between the tokens of a request after the first, as the engine made them", {}, ITL_BUCKETS,
    ),
    "roundhouse_queue_seconds": (
        "From the arrival of a request to its first engine step", {}, TTFT_BUCKETS,
    ),
    "roundhouse_request_seconds": (
        "From the arrival of a request to the sending of its last response", {}, REQUEST_BUCKETS,
    ),
}  # fmt: skip
COUNTERS = {
    "roundhouse_requests_total": "Sequences that ended, for whatever reason",
    "roundhouse_prompt_tokens_total": "Prompt tokens of sequences that ended",
    "roundhouse_generated_tokens_total": "Tokens that were generated for clients",
    "roundhouse_cancelled_total": "Sequences whose client went away or cancelled",
    "roundhouse_rejected_total": "Prompts and sequences that were refused",
    "roundhouse_failed_total": "Sequences that ended with an error of the server",
    "roundhouse_kv_blocks_reused_total": "KV blocks that sequences found in the cache",
    "roundhouse_draft_tokens_total": "Draft tokens that were proposed",
    "roundhouse_accepted_draft_tokens_total": "Draft tokens that were accepted",
    "roundhouse_engine_restarts_total": "Restarts of the engine process",
}


@dataclass(frozen=True, slots=True)
class Record:
    """What one sequence adds to the metrics. Times in seconds; None where there is no such time."""

    prompt_tokens: int
    generated_tokens: int
    request_seconds: float
    queue_seconds: float | None
    itl_seconds: float | None
    outcome: str | None  # a counter's name, beyond roundhouse_requests_total
    kv_blocks_reused: int
    draft_tokens: int
    accepted_draft_tokens: int

    @classmethod
    def of(
        cls,
        *,
        prompt_tokens: int,
        generated_tokens: int,
        arrival_ns: int,
        now_ns: int,
        perf: Perf | None,
        error: Error | None,
        cancelled: bool,
    ) -> Self:
        outcome = None
        if error is not None:
            refused = error.code in (ErrorCode.INVALID_ARGUMENT, ErrorCode.UNSUPPORTED, ErrorCode.QUEUE_FULL)
            outcome = "roundhouse_rejected_total" if refused else "roundhouse_failed_total"
        elif cancelled:
            outcome = "roundhouse_cancelled_total"
        itl = None
        if perf is not None and generated_tokens > 1:
            itl = (perf.last_token_ns - perf.first_token_ns) / (generated_tokens - 1) / 1e9
        scheduled = perf is not None and perf.first_scheduled_ns > 0
        return cls(
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            request_seconds=(now_ns - arrival_ns) / 1e9,
            queue_seconds=(perf.first_scheduled_ns - arrival_ns) / 1e9 if perf is not None and scheduled else None,
            itl_seconds=itl,
            outcome=outcome,
            kv_blocks_reused=perf.reused_blocks if perf is not None else 0,
            draft_tokens=perf.draft_tokens if perf is not None else 0,
            accepted_draft_tokens=perf.accepted_draft_tokens if perf is not None else 0,
        )

    def observations(self) -> Iterator[tuple[str, float]]:
        """Histogram and value. A refused sequence has none: it would make latencies look better than they are."""
        if self.outcome == "roundhouse_rejected_total":
            return
        yield "nv_llm_input_token_len", self.prompt_tokens
        yield "nv_llm_output_token_len", self.generated_tokens
        yield "roundhouse_request_seconds", self.request_seconds
        if self.queue_seconds is not None:
            yield "roundhouse_queue_seconds", self.queue_seconds
        if self.itl_seconds is not None:
            yield "roundhouse_inter_token_latency_seconds", self.itl_seconds

    def counts(self) -> Iterator[tuple[str, int]]:
        """Counter and increment."""
        yield "roundhouse_requests_total", 1
        yield "roundhouse_prompt_tokens_total", self.prompt_tokens
        yield "roundhouse_generated_tokens_total", self.generated_tokens
        yield "roundhouse_kv_blocks_reused_total", self.kv_blocks_reused
        yield "roundhouse_draft_tokens_total", self.draft_tokens
        yield "roundhouse_accepted_draft_tokens_total", self.accepted_draft_tokens
        if self.outcome is not None:
            yield self.outcome, 1
