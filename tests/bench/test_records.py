"""What a load test remembers is what it saw, however it was divided among processes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundhouse.bench import metrics
from roundhouse.bench.metrics import Objective, Trace
from roundhouse.bench.records import Histogram, Records, report
from tests.bench.test_metrics import traces


def recorded(all_: list[Trace]) -> Records:
    records = Records()
    for trace in all_:
        records.add(trace)
    return records


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=80))
def test_a_histogram_is_within_a_bucket_of_the_truth(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    found = histogram.quantiles()
    for percent in metrics.QUANTILES:
        exact = float(np.percentile(values, percent, method="inverted_cdf"))
        assert found[f"p{percent}"] == pytest.approx(exact, rel=0.003, abs=1e-4)
    assert found["mean"] == pytest.approx(np.mean(values), rel=0.003, abs=1e-4)


@given(st.lists(traces(), max_size=15), st.lists(traces(), max_size=15))
def test_records_of_processes_add_up(here: list[Trace], there: list[Trace]) -> None:
    joined = recorded(here)
    joined.merge(Records.from_message(json.loads(json.dumps(recorded(there).as_message()))))
    assert report(joined, Objective(100, 50)) == report(recorded(here + there), Objective(100, 50))


@given(st.lists(traces(), min_size=1, max_size=15))
def test_what_was_left_out_changes_no_figure(all_: list[Trace]) -> None:
    summary = recorded(all_).summary(Objective(100, 50))
    start, end = min(trace.sent for trace in all_), max(trace.ended for trace in all_)
    whole = metrics.summarise(all_, start, end + 1e-6, Objective(100, 50))
    assert summary is not None
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "goodput", "tokens_per_response", "finished"):
        assert getattr(summary, name) == getattr(whole, name)


def test_the_lines_say_why_there_is_no_verdict() -> None:
    unary = Trace("any", 7, 1.0, 1.0, [2.0], [3], 2.0, streamed=False)
    assert "not judged" in report(recorded([unary]), Objective(1, 1))["lines"][-1]
    assert "none in the deployment" in report(recorded([unary]), None)["lines"][-1]
    assert report(Records(), None)["lines"] == ["no request was finished"]
