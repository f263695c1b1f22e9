"""The metric definitions hold for every trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundhouse.bench import metrics
from roundhouse.bench.metrics import Objective, Trace

SECONDS = st.floats(0, 100)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    sent = draw(SECONDS)
    steps = draw(st.lists(st.floats(0, 5), max_size=20))
    times = list(sent + np.cumsum(steps)) if steps else []
    trace = Trace("any", draw(st.integers(1, 100)), sent - draw(st.floats(0, 1)), sent, [float(t) for t in times])
    trace.tokens = draw(st.lists(st.integers(1, 5), min_size=len(times), max_size=len(times)))
    trace.ended = trace.times[-1] if times else sent
    fate = draw(st.sampled_from(["fine", "fine", "failed", "aborted", "one response"]))
    trace.error = "it broke" if fate == "failed" else None
    trace.aborted = fate == "aborted"
    trace.streamed = fate != "one response"
    return trace


@given(traces())
def test_the_latencies_of_a_request_add_up(trace: Trace) -> None:
    first, each, total = metrics.ttft(trace), metrics.tpot(trace), metrics.end_to_end(trace)
    if each is not None:
        assert first is not None
        assert total == pytest.approx(first + each * (metrics.output_tokens(trace) - 1), abs=1e-6)
        assert sum(metrics.gaps(trace)) == pytest.approx(total - first, abs=1e-6)
    if total is not None and first is not None:
        assert 0 <= first <= total
    assert (total is None) == (not trace.finished)


@given(traces(), st.floats(-1000, 1000))
def test_the_clocks_zero_does_not_matter(trace: Trace, shift: float) -> None:
    moved = trace.shifted(shift)
    for figure in (metrics.ttft, metrics.tpot, metrics.end_to_end):
        assert figure(moved) == pytest.approx(figure(trace), abs=1e-6)
    assert metrics.gaps(moved) == pytest.approx(metrics.gaps(trace), abs=1e-6)


def test_an_example_by_hand() -> None:
    """Sent at 10.0; 1 token at 10.2, 2 at 10.3, 1 at 10.5."""
    trace = Trace("any", 7, 10.0, 10.0, [10.2, 10.3, 10.5], [1, 2, 1], 10.5)
    assert metrics.ttft(trace) == pytest.approx(0.2)
    assert metrics.gaps(trace) == pytest.approx([0.1, 0.2])
    assert metrics.tpot(trace) == pytest.approx(0.1)
    assert metrics.end_to_end(trace) == pytest.approx(0.5)
    summary = metrics.summarise([trace], 10.0, 11.0, Objective(200.1, 100.1))
    assert summary.output_tokens_per_second == 4
    assert summary.whole_run_tokens_per_second == 8
    assert summary.input_tokens_per_second == 7
    assert (summary.goodput, summary.good_percent) == (1, 100)
    assert summary.tokens_per_second_per_user["p50"] == pytest.approx(10)
    assert metrics.summarise([trace], 10.0, 11.0, Objective(199, 100.1)).goodput == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_quantiles_are_numpys(values: list[float]) -> None:
    found = metrics.quantiles(values)
    for percent in metrics.QUANTILES:
        assert found[f"p{percent}"] == pytest.approx(np.percentile(values, percent), abs=1e-3, rel=1e-9)
    assert found["min"] <= found["p50"] <= found["p90"] <= found["p95"] <= found["p99"] <= found["max"]


@given(st.lists(traces(), max_size=20), st.floats(1, 2000), st.floats(1, 2000))
def test_good_requests_are_some_of_those_that_finished(all_: list[Trace], first: float, each: float) -> None:
    summary = metrics.summarise(all_, -1, 200, Objective(first, each))
    assert summary.goodput is not None
    assert summary.goodput * summary.seconds <= summary.finished + 0.1
    assert summary.finished + summary.failed + summary.aborted <= summary.requests == len(all_)
    wider = metrics.summarise(all_, -1, 200, Objective(2 * first, 2 * each))
    assert wider.goodput is not None
    assert wider.goodput >= summary.goodput


@given(st.lists(traces(), max_size=20), st.floats(1, 99))
def test_windows_add_up(all_: list[Trace], cut: float) -> None:
    whole, before, after = (metrics.summarise(all_, *window, None) for window in ((-1, 300), (-1, cut), (cut, 300)))
    assert before.requests + after.requests == whole.requests
    parts = before.output_tokens_per_second * before.seconds + after.output_tokens_per_second * after.seconds
    assert parts == pytest.approx(sum(map(metrics.output_tokens, all_)), abs=5)


@given(st.lists(traces(), min_size=1, max_size=40), st.floats(1, 5000))
def test_a_verdict_is_met_exactly_if_95_of_100_kept_to_it(all_: list[Trace], limit: float) -> None:
    judged = [trace for trace in all_ if trace.streamed and (trace.times or trace.error)]
    kept = [trace for trace in judged if trace.error is None and 1e3 * (metrics.ttft(trace) or 0) <= limit]
    verdict = metrics.verdicts(all_, Objective(limit, 1e9))[0]
    assert verdict.requests == len(judged)
    assert verdict.met == (bool(judged) and len(kept) >= 0.95 * len(judged))
    assert ("MISSED" in verdict.line()) == (not verdict.met)


@given(traces(), st.floats(1, 5000), st.floats(1, 5000), st.data())
def test_what_an_open_request_has_missed_it_can_not_make_good(
    trace: Trace, first: float, each: float, data: st.DataObject
) -> None:
    came = data.draw(st.integers(0, max(0, len(trace.times) - 1)))
    ended = data.draw(st.floats(0, 1)) * (trace.ended - trace.sent) + trace.sent
    cut = replace(trace, times=[at for at in trace.times[:came] if at <= ended], ended=ended)
    cut.tokens = trace.tokens[: len(cut.times)]
    if Objective(first, each).missed_by(cut, metrics.output_tokens(trace)) is not None:
        assert not Objective(first * (1 - 1e-6), each * (1 - 1e-6)).met_by(trace)


def test_what_an_open_request_has_missed() -> None:
    limits = Objective(ttft_ms=500, itl_ms=100)

    def missed(ended: float, times: list[float], *, streamed: bool = True) -> str | None:
        trace = Trace("any", 7, 0, 0, times, [1] * len(times), ended, streamed=streamed)
        return limits.missed_by(trace, answer_tokens=11)

    assert missed(0.4, []) is None
    assert missed(0.6, []) == "no first token by the end of the test"
    assert missed(60, [], streamed=False) is None
    assert missed(1.2, [0.3, 0.4]) is None, "the nine others may still come together at 1.3"
    assert missed(1.4, [0.3, 0.4]) == "no end in time by the end of the test"


def test_nothing_is_no_success() -> None:
    assert not any(verdict.met for verdict in metrics.verdicts([], Objective(100, 100)))
    with pytest.raises(ValueError, match="nothing was measured"):
        metrics.summarise([], 5, 5, None)


def test_warm_up_requests_are_left_out() -> None:
    trace = Trace("any", 7, 1.0, 1.0, [9.0], [1], 9.0, warm_up=True)
    assert metrics.summarise([trace], 0, 10, Objective(1, 1)).requests == 0
    assert metrics.verdicts([trace], Objective(1, 1))[0].requests == 0
