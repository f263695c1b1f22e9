"""What one sequence adds to the metrics."""

from __future__ import annotations

import pytest

from roundhouse.engine.protocol import Error, ErrorCode
from roundhouse.metrics import Record


@pytest.mark.parametrize(
    ("code", "counter", "observed"),
    [
        (ErrorCode.QUEUE_FULL, "roundhouse_rejected_total", False),
        (ErrorCode.UNAVAILABLE, "roundhouse_failed_total", True),
        (None, None, True),
    ],
)
def test_refused_sequences_are_counted_but_do_not_flatter_latencies(
    code: ErrorCode | None, counter: str | None, observed: bool
) -> None:
    record = Record.of(
        prompt_tokens=3,
        generated_tokens=0,
        arrival_ns=0,
        now_ns=10**9,
        perf=None,
        error=Error(code, "no") if code is not None else None,
        cancelled=False,
    )
    assert record.outcome == counter
    assert bool(list(record.observations())) is observed
    assert ("roundhouse_requests_total", 1) in list(record.counts())
