"""What a front tells Prometheus.

Each call into Triton's metrics costs a message to the server (about 0.1 ms), so a thread of its own makes them: one for
each request and histogram, and a few a second for everything else.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from typing import Any

from roundhouse.engine.protocol import Stats
from roundhouse.metrics import COUNTERS, HISTOGRAMS, Record

PUBLISH_SECONDS = 0.25
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
        self._stats: Stats | None = None  # the newest, while there is an engine
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
        for observation in record.observations():
            self._work.put(observation)
        for name, increment in record.counts():
            self._counts[name] += increment

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
        if self._gauges:
            if stats is not None:
                self._work.put(stats)
            elif self._stats is not None:  # the engine is gone: nothing is left of what it had
                lost = self._stats
                self._work.put(Stats(steps=lost.steps, max_active=lost.max_active, blocks_max=lost.blocks_max))
            self._stats = stats

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
