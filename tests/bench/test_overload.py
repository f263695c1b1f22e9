"""What the overload measurement makes of traces, and what is read from processes."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from roundhouse.bench.metrics import Trace
from roundhouse.bench.overload import FULL, Phase, goodput, judge, recovery_seconds
from roundhouse.bench.watch import Watch, as_json, sample


def answered(sent: float, first: float = 0.01, whole: float = 0.1) -> Trace:
    return Trace("t", 1, sent, sent, [sent + first, sent + whole], [1, 1], sent + whole)


def refused(sent: float, after: float = 0.02) -> Trace:
    return Trace("t", 1, sent, sent, ended=sent + after, error=f"UNAVAILABLE: {FULL} of 8")


def test_goodput_counts_what_was_complete_and_in_time() -> None:
    traces = [answered(0.0), answered(0.5, first=2.0, whole=2.1), refused(0.2), answered(9.95)]
    assert goodput(traces, 0.0, 10.0, limit=1.0) == pytest.approx(0.1)
    assert goodput(traces, 0.0, 10.0, limit=3.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("slow_until", "expected"), [(0.0, 0.0), (2.0, 2.0), (10.0, None)], ids=["at once", "two seconds", "never"]
)
def test_recovery_is_when_every_later_second_is_as_before(slow_until: float, expected: float | None) -> None:
    traces = [answered(at / 10, first=0.5 if at / 10 < slow_until else 0.01) for at in range(100)]
    assert recovery_seconds(Phase("after", 0.0, 10.0, traces), normal_ms=10.0) == expected


def test_a_refusal_after_the_overload_is_no_recovery() -> None:
    traces = [*(answered(at / 10) for at in range(100)), refused(4.5)]
    assert recovery_seconds(Phase("after", 0.0, 10.0, traces), normal_ms=10.0) == 5.0


def test_the_judgement() -> None:
    def phase(name: str, start: float, traces: list[Trace]) -> Phase:
        return Phase(name, start, start + 10, traces)

    before = phase("before", 0, [answered(at / 2) for at in range(20)])
    peak = phase("peak", 10, [answered(10 + at / 4) for at in range(40)])
    half = [answered(20 + at / 2) for at in range(20)]
    over = phase("overload", 20, [*half, *(refused(20 + at / 5) for at in range(50))])
    after = phase("after", 30, [answered(30 + at / 2) for at in range(20)])
    figures = judge(before, peak, over, after, longest_wait=1.0, memory_mb=[100, 100, 110, 120, 120, 130])
    assert figures["goodput_percent"] == pytest.approx(50, abs=3)
    assert (figures["requests"], figures["refused"], figures["errors_of_other_kinds"]) == (70, 50, 0)
    assert figures["refusal_ms"]["p99"] == pytest.approx(20)
    assert figures["recovery_seconds"] == 0
    assert figures["memory_mb"] == {"first_third": 100, "last_third": 125}


def test_what_a_process_holds() -> None:
    me = psutil.Process(os.getpid())
    before = sample(me, 3.0)
    with open(os.devnull) as one, open(os.devnull) as two:
        assert sample(me, 3.0).fds == before.fds + 2
        del one, two
    assert before.total_mb > 5
    assert before.blocks_used == 3.0


def test_a_watch_samples_until_its_block_ends() -> None:
    with Watch(psutil.Process(os.getpid()), 0.02) as watch:
        time.sleep(0.3)
    count = len(watch.samples)
    time.sleep(0.1)
    assert len(watch.samples) == count > 1
    assert as_json(watch.samples)[0]["seconds"] == 0.0
