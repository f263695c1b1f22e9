"""The parts of scripts/bench_scaling.py that need no server."""

from __future__ import annotations

import argparse
from pathlib import Path

import bench_scaling as bench
import pytest

from roundhouse import deployment
from roundhouse.bench.load import Overhead, Seen
from roundhouse.bench.metrics import Trace


@pytest.mark.parametrize(("fronts", "preprocessing"), [(1, 1), (2, 1), (8, 4)])
def test_the_deployment_is_valid_and_has_room_for_all_streams(fronts: int, preprocessing: int) -> None:
    args = argparse.Namespace(rate=30000.0, streams=[64, 1024], responses_per_second=4000)
    parsed = deployment.parse(bench.deployment(Path("models/tiny"), fronts, args), source="test", base=Path())
    assert (parsed.fronts.tensorrt_llm, parsed.fronts.preprocessing) == (fronts, preprocessing)
    assert parsed.limits.max_batch_size == 1024


def test_figures_count_what_came_in_time() -> None:
    early = Trace("request", 1, 0.0, 0.0, times=[0.9, 1.5], tokens=[5, 10], ended=1.5)
    late = Trace("request", 1, 1.0, 1.0, times=[1.2, 2.5], tokens=[1, 7], ended=2.5, error="cut off")
    seen = Seen([early, late], 1.0, 2.0, Overhead(1, 0.5, 10.0, {}), False)
    figures = bench.figures(seen, 2.0, 100.0)
    assert figures["tokens_per_second"] == 11
    assert figures["delivered_percent"] == 11
    assert figures["tokens_per_response"] == 5.5
    assert figures["ttft_ms"]["p50"] == pytest.approx(200)
    assert figures["tpot_ms"]["p50"] == pytest.approx(1e3 * 0.6 / 14, rel=1e-3)
