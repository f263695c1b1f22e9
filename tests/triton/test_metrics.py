"""What a front tells Prometheus, over a double of Triton's metrics."""

from __future__ import annotations

import pytest

from roundhouse.engine.protocol import Stats
from roundhouse.triton import metrics


class Metric:
    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value


class Family:
    """`pb_utils.MetricFamily`; keeps every metric by its family's name and the values of its labels."""

    HISTOGRAM = COUNTER = GAUGE = None
    made: dict[tuple[str, ...], Metric]

    def __init__(self, name: str, description: str, kind: None) -> None:
        self._name = name

    def Metric(self, labels: dict[str, str], buckets: object = None) -> Metric:  # noqa: N802
        return self.made.setdefault((self._name, *labels.values()), Metric())


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], Metric]:
    monkeypatch.setattr(metrics, "PUBLISH_SECONDS", 0)
    monkeypatch.setattr(Family, "made", {}, raising=False)
    return Family.made


def test_an_engine_that_is_gone_has_no_requests(gauges: dict[tuple[str, ...], Metric]) -> None:
    """Or alerts and autoscalers would go by what it had when it died, for as long as the next one loads."""

    class PbUtils:
        MetricFamily = Family

    def read(family: str, label: str) -> float:
        return gauges[f"nv_trt_llm_{family}_metrics", "tensorrt_llm", "1", label].value

    told = metrics.Metrics(PbUtils, "tensorrt_llm", "1", gauges=True)
    told.publish(Stats(steps=9, active=24, waiting=5, max_active=64, blocks_max=100, blocks_used=50), 0)
    told.publish(None, 0)
    told.publish(None, 0)
    told.close()
    assert [read("request", label) for label in ("active", "waiting", "scheduled", "max")] == [0, 0, 0, 64]
    assert read("kv_cache_block", "used") == 0
    assert read("kv_cache_block", "fraction") == 0
    assert read("general", "iteration_counter") == 9, "a counter stands still"
