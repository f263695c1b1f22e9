"""What a front tells Prometheus.

Each call into Triton's metrics costs a message to the server (about 0.1 ms), so a thread of its own makes them: one for
each request and histogram, and a few a second for everything else.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

from roundhouse.engine.protocol import ErrorCode, FinishReason, Stats
from roundhouse.triton.stream import Stream

PUBLISH_SECONDS = 0.25
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
# Upstream's gauges: family -> (description, label, label value -> how to read it from Stats).
GAUGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nv_trt_llm_request_metrics": ("TRT LLM request metrics", "request_type", {
        "active": lambda s: s.active + s.waiting,
        "max": lambda s: s.max_active,
        "scheduled": lambda s: s.active,
        "context": lambda s: s.context,
        "waiting": lambda s: s.waiting,
    }),
    "nv_trt_llm_runtime_memory_metrics": ("TRT LLM runtime memory metrics", "memory_type", {
        "cpu": lambda s: s.memory_cpu_bytes,
        "gpu": lambda s: s.memory_gpu_bytes,
        "pinned": lambda s: s.memory_pinned_bytes,
    }),
    "nv_trt_llm_kv_cache_block_metrics": ("TRT LLM KV cache block metrics", "kv_cache_block_type", {
        "max": lambda s: s.blocks_max,
        "free": lambda s: s.blocks_max - s.blocks_used,
        "used": lambda s: s.blocks_used,
        "tokens_per": lambda s: s.tokens_per_block,
        "reused": lambda s: s.blocks_reused,
        "fraction": lambda s: s.blocks_used / s.blocks_max if s.blocks_max else 0.0,
    }),
    "nv_trt_llm_inflight_batcher_metrics": (
        "TRT LLM inflight_batcher-specific metrics", "inflight_batcher_specific_metric", {
            "total_context_tokens": lambda s: s.context_tokens,
            "generation_requests": lambda s: s.generation,
            "micro_batch_id": lambda s: 0,
            "paused_requests": lambda s: s.paused,
        },
    ),
    "nv_trt_llm_general_metrics": ("General TRT LLM metrics", "general_type", {
        "timestamp": lambda s: s.timestamp_ns // 1000,
        "iteration_counter": lambda s: s.steps,
    }),
}  # fmt: skip


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
    def of(cls, stream: Stream, now_ns: int) -> Self:
        perf, error = stream.perf, stream.error
        arrival = stream.job.arrival_ns
        outcome = None
        if error is not None:
            refused = error.code in (ErrorCode.INVALID_ARGUMENT, ErrorCode.UNSUPPORTED) or "queue size" in error.message
            outcome = "roundhouse_rejected_total" if refused else "roundhouse_failed_total"
        elif stream.job.cancelled or stream.finish_reason is FinishReason.CANCELLED:
            outcome = "roundhouse_cancelled_total"
        itl = None
        if perf is not None and stream.generated > 1:
            itl = (perf.last_token_ns - perf.first_token_ns) / (stream.generated - 1) / 1e9
        scheduled = perf is not None and perf.first_scheduled_ns > 0
        return cls(
            prompt_tokens=len(stream.generation.request.prompt),
            generated_tokens=stream.generated,
            request_seconds=(now_ns - arrival) / 1e9,
            queue_seconds=(perf.first_scheduled_ns - arrival) / 1e9 if perf is not None and scheduled else None,
            itl_seconds=itl,
            outcome=outcome,
            kv_blocks_reused=perf.reused_blocks if perf is not None else 0,
            draft_tokens=perf.draft_tokens if perf is not None else 0,
            accepted_draft_tokens=perf.accepted_draft_tokens if perf is not None else 0,
        )


class Metrics:
    """The metrics of one front. `gauges`: this front publishes the engine's, of which there is one set a server."""

    def __init__(self, pb_utils: Any, model: str, version: str, *, gauges: bool) -> None:
        family = pb_utils.MetricFamily
        upstream = {"model": "tensorrt_llm", "version": version}  # where dashboards look for it
        own = {"model": model, "version": version}
        self._keep: list[Any] = []  # a family must outlive its metrics
        self._histograms: dict[str, Any] = {}
        for name, (description, labels, buckets) in HISTOGRAMS.items():
            base = upstream if name.startswith("nv_") else own
            made = family(name=name, description=description, kind=family.HISTOGRAM)
            self._histograms[name] = made.Metric(labels={**base, **labels}, buckets=buckets)
            self._keep.append(made)
        self._counters = {}
        for name, description in COUNTERS.items():
            made = family(name=name, description=description, kind=family.COUNTER)
            self._counters[name] = made.Metric(labels=own)
            self._keep.append(made)
        self._gauges: list[tuple[Any, Any]] = []
        for name, (description, label, readings) in GAUGES.items() if gauges else ():
            made = family(name=name, description=description, kind=family.GAUGE)
            self._keep.append(made)
            self._gauges += [(made.Metric(labels={**upstream, label: value}), read) for value, read in readings.items()]
        self._counts: Counter[str] = Counter()
        self._restarts = 0
        self._next = 0.0
        self._work: queue.SimpleQueue[tuple[str, float] | Stats | Counter[str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def first_token(self, nanoseconds: int) -> None:
        self._work.put(("roundhouse_time_to_first_token_seconds", nanoseconds / 1e9))

    def rejected(self) -> None:
        """A prompt was refused before it became a stream."""
        self._work.put(Counter({"roundhouse_rejected_total": 1}))

    def finished(self, record: Record) -> None:
        self._work.put(("nv_llm_input_token_len", record.prompt_tokens))
        self._work.put(("nv_llm_output_token_len", record.generated_tokens))
        self._work.put(("roundhouse_request_seconds", record.request_seconds))
        if record.queue_seconds is not None:
            self._work.put(("roundhouse_queue_seconds", record.queue_seconds))
        if record.itl_seconds is not None:
            self._work.put(("roundhouse_inter_token_latency_seconds", record.itl_seconds))
        self._counts["roundhouse_requests_total"] += 1
        self._counts["roundhouse_prompt_tokens_total"] += record.prompt_tokens
        self._counts["roundhouse_generated_tokens_total"] += record.generated_tokens
        self._counts["roundhouse_kv_blocks_reused_total"] += record.kv_blocks_reused
        self._counts["roundhouse_draft_tokens_total"] += record.draft_tokens
        self._counts["roundhouse_accepted_draft_tokens_total"] += record.accepted_draft_tokens
        if record.outcome is not None:
            self._counts[record.outcome] += 1

    def publish(self, stats: Stats | None, restarts: int) -> None:
        """Hand over what has gathered; does nothing if it was called less than PUBLISH_SECONDS ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PUBLISH_SECONDS
        if restarts > self._restarts:
            self._counts["roundhouse_engine_restarts_total"] += restarts - self._restarts
            self._restarts = restarts
        if self._counts:
            self._work.put(self._counts)
            self._counts = Counter()
        if self._gauges and stats is not None:
            self._work.put(stats)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            if isinstance(item, tuple):
                name, value = item
                self._histograms[name].observe(value)
            elif isinstance(item, Counter):
                for name, increment in item.items():
                    if increment:
                        self._counters[name].increment(increment)
            else:
                for metric, read in self._gauges:
                    metric.set(read(item))
