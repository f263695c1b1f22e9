"""Medians, intervals and ratios of repeated runs."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundhouse.bench import repeats

RATES = st.lists(st.floats(1, 1e4), min_size=2, max_size=8)


def test_medians_and_intervals_of_nested_figures() -> None:
    runs = [
        {"rate": 10.0, "ttft": {"p50": 1.0}, "name": "x", "only": 3.0},
        {"rate": 14.0, "ttft": {"p50": 5.0}, "name": "x"},
        {"rate": 12.0, "ttft": {"p50": 3.0}, "name": "x"},
    ]
    medians, widths = repeats.combine(runs)
    assert medians == {"rate": 12.0, "ttft": {"p50": 3.0}, "only": 3.0}
    assert widths["rate"] == pytest.approx(4.303 * 2 / math.sqrt(3), abs=1e-3), "Student's t with 2 degrees of freedom"
    assert "only" not in widths


@given(RATES)
def test_a_thing_is_as_fast_as_itself(rates: list[float]) -> None:
    assert repeats.ratio(rates, rates) == pytest.approx((1, 1, 1))


@given(RATES, RATES)
def test_a_ratio_turns_round(first: list[float], other: list[float]) -> None:
    count = min(len(first), len(other))
    found, turned = repeats.ratio(first[:count], other[:count]), repeats.ratio(other[:count], first[:count])
    assert found is not None
    assert turned is not None
    assert found[1] <= found[0] <= found[2]
    assert found[0] * turned[0] == pytest.approx(1)
    logs = [math.log(b / a) for a, b in zip(first[:count], other[:count], strict=True)]
    assert math.log(found[0]) == pytest.approx(statistics.fmean(logs), abs=1e-9)


def test_one_pair_says_nothing_of_its_spread() -> None:
    assert repeats.ratio([2.0], [3.0]) == (pytest.approx(1.5), 0.0, math.inf)
    assert repeats.ratio([0.0], [3.0]) is None
    assert repeats.ratio([2.0, 2.0, 2.0], [0.0, 6.0, 6.0]) == (3.0, 0.0, math.inf), "a run of nothing is not left out"
