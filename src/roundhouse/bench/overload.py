"""What overload does to a server: an open loop far above its capacity, between two loads that it can carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roundhouse.bench.metrics import Trace, quantiles, ttft

FULL = "Exceeds maximum queue size"
RECOVERY_SECONDS = 5.0
NORMAL = 1.5  # times the latency of before, and SLACK_MS, is as before
SLACK_MS = 20.0


@dataclass(frozen=True)
class Phase:
    """A part of the load. Times on the clock of the traces."""

    name: str
    start: float
    end: float
    traces: list[Trace]

    def sent_between(self, start: float, end: float) -> list[Trace]:
        return [trace for trace in self.traces if start <= trace.sent < end]


def goodput(traces: Sequence[Trace], start: float, end: float, limit: float) -> float:
    """Answers a second that were complete between `start` and `end` and whose first token came within `limit` s."""
    good = [
        trace
        for trace in traces
        if trace.finished and start <= trace.ended < end and (first := ttft(trace)) is not None and first <= limit
    ]
    return len(good) / (end - start)


def recovery_seconds(after: Phase, normal_ms: float) -> float | None:
    """From the end of the overload until every later second has a median TTFT of about that before it; None: never."""
    seconds = math.floor(after.end - after.start)
    late = -1
    for second in range(seconds):
        sent = after.sent_between(after.start + second, after.start + second + 1)
        found = quantiles((first for trace in sent if (first := ttft(trace)) is not None), 1e3)
        if any(trace.error for trace in sent) or (found and found["p50"] > NORMAL * normal_ms + SLACK_MS):
            late = second
    return None if late == seconds - 1 else float(late + 1)


def judge(
    before: Phase, peak: Phase, over: Phase, after: Phase, *, longest_wait: float, memory_mb: Sequence[float]
) -> dict[str, Any]:
    """The figures. `longest_wait`: seconds until the last place of a full queue is served. `memory_mb`: in overload."""
    refused = [trace for trace in over.traces if trace.error and FULL in trace.error]
    accepted = [first for trace in over.traces if (first := ttft(trace)) is not None]
    normal = quantiles((first for trace in before.traces if (first := ttft(trace)) is not None), 1e3)
    settled = over.start + longest_wait  # before that, answers of the emptier queue are counted
    best = goodput(peak.traces, peak.start + longest_wait, peak.end, longest_wait)
    good = goodput(over.traces, settled, over.end, longest_wait)
    third = max(len(memory_mb) // 3, 1)
    return {
        "goodput_peak": round(best, 2),
        "goodput_overload": round(good, 2),
        "goodput_percent": round(100 * good / best, 1),
        "requests": len(over.traces),
        "refused": len(refused),
        "errors_of_other_kinds": sum(trace.error is not None for trace in over.traces) - len(refused),
        "refusal_ms": quantiles((trace.ended - trace.sent for trace in refused), 1e3),
        "longest_wait_allowed_ms": round(1e3 * longest_wait, 1),
        "ttft_ms": quantiles(accepted, 1e3),
        "ttft_before_ms": normal,
        "recovery_seconds": recovery_seconds(after, normal["p50"]),
        "memory_mb": {
            "first_third": round(sum(memory_mb[:third]) / third, 1),
            "last_third": round(sum(memory_mb[-third:]) / third, 1),
        },
    }
