"""What a load test remembers of its requests: little enough for hours, and whole enough for exact verdicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from roundhouse.bench import metrics
from roundhouse.bench.metrics import QUANTILES, Objective, Summary, Trace

STEPS = 200  # of a histogram for each factor of e: what is read from it is within 0.25 % of the truth
LATE_SECONDS = 0.05


class Histogram:
    """Counts of positive numbers in buckets that grow by 0.5 %. Histograms of several processes add up."""

    def __init__(self, buckets: Mapping[int, int] | None = None) -> None:
        self.buckets = Counter(buckets or {})

    def add(self, value: float) -> None:
        self.buckets[round(math.log(max(value, 1e-9)) * STEPS)] += 1

    @staticmethod
    def value(bucket: int) -> float:
        """The middle of a bucket."""
        return math.exp(bucket / STEPS)

    def merge(self, other: Histogram) -> None:
        self.buckets.update(other.buckets)

    def quantiles(self, scale: float = 1.0) -> dict[str, float]:
        """As metrics.quantiles, but for the width of the buckets."""
        count = self.buckets.total()
        if not count:
            return {}
        ordered = sorted(self.buckets.items())
        found = {f"p{percent}": self._at(ordered, math.ceil(percent / 100 * count)) for percent in QUANTILES}
        mean = sum(Histogram.value(bucket) * number for bucket, number in ordered) / count
        found |= {"mean": mean, "min": Histogram.value(ordered[0][0]), "max": Histogram.value(ordered[-1][0])}
        return {name: round(value * scale, 4) for name, value in found.items()}

    @staticmethod
    def _at(ordered: list[tuple[int, int]], rank: int) -> float:
        for bucket, number in ordered:
            rank -= number
            if rank <= 0:
                return Histogram.value(bucket)
        return Histogram.value(ordered[-1][0])


@dataclass
class Records:
    """Ended requests, with their first and last response only; and a histogram of the times between responses."""

    traces: list[Trace] = field(default_factory=list)
    gaps: Histogram = field(default_factory=Histogram)
    responses: int = 0

    def add(self, trace: Trace) -> None:
        for gap in metrics.gaps(trace):
            self.gaps.add(gap)
        self.responses += len(trace.times)
        if len(trace.times) > 2:
            times = [trace.times[0], trace.times[-1]]
            trace = replace(trace, times=times, tokens=[trace.tokens[0], sum(trace.tokens[1:])])
        self.traces.append(trace)

    def merge(self, other: Records) -> None:
        self.traces += other.traces
        self.gaps.merge(other.gaps)
        self.responses += other.responses

    def as_message(self) -> dict[str, Any]:
        """For Locust's channel between processes: plain values only."""
        traces = [asdict(trace) for trace in self.traces]
        return {"traces": traces, "gaps": list(self.gaps.buckets.items()), "responses": self.responses}

    @classmethod
    def from_message(cls, sent: dict[str, Any]) -> Self:
        return cls([Trace(**trace) for trace in sent["traces"]], Histogram(dict(sent["gaps"])), sent["responses"])

    def summary(self, objective: Objective | None) -> Summary | None:
        """Figures from the first request to the end of the last; None if there was none."""
        if not self.traces:
            return None
        start = min(trace.sent for trace in self.traces)
        end = max(trace.ended for trace in self.traces)
        found = metrics.summarise(self.traces, start, end + 1e-6, objective)
        tokens = sum(map(metrics.output_tokens, self.traces))
        each = round(tokens / self.responses, 3) if self.responses else 0.0
        return replace(found, itl_ms=self.gaps.quantiles(1e3), tokens_per_response=each)


def report(records: Records, objective: Objective | None) -> dict[str, Any]:
    """The summary, the verdicts, and both as lines for people."""
    summary = records.summary(objective)
    if summary is None:
        return {"summary": None, "verdicts": [], "lines": ["no request was finished"]}
    judged = objective is not None and any(trace.streamed for trace in records.traces)
    verdicts = metrics.verdicts(records.traces, objective) if objective is not None and judged else []
    lines = list(_figures(summary))
    late = sum(trace.sent - trace.due > LATE_SECONDS for trace in records.traces)
    if late:
        lines.append(
            f"{late} requests were sent late, since all users were busy or this process was: raise -u, --processes"
        )
    if objective is None:
        lines.append("SLO: none in the deployment (slo.ttft_ms, slo.itl_ms), so no verdict")
    elif not judged:
        lines.append("SLO: not judged, answers in one response have no first token")
    else:
        lines.append(f"goodput: {summary.goodput:.3f} requests/s within the SLO ({summary.good_percent} %)")
        lines += [verdict.line() for verdict in verdicts]
    shown = [{**asdict(verdict), "met": verdict.met} for verdict in verdicts]
    return {"summary": summary.as_json(), "verdicts": shown, "lines": lines}


def _figures(summary: Summary) -> Iterator[str]:
    yield (
        f"{summary.requests} requests in {summary.seconds:.1f} s: {summary.finished} finished, "
        f"{summary.aborted} aborted or open at the end, {summary.failed} failed"
    )
    yield (
        f"{summary.output_tokens_per_second:.1f} tokens/s out, {summary.input_tokens_per_second:.1f} in, "
        f"{summary.tokens_per_response:.2f} a response"
    )
    for name, values in (
        ("TTFT", summary.ttft_ms), ("ITL", summary.itl_ms), ("TPOT", summary.tpot_ms), ("end to end", summary.e2e_ms),
    ):  # fmt: skip
        if values:
            shown = ", ".join(f"p{percent} {values[f'p{percent}']:.2f}" for percent in QUANTILES)
            yield f"{name}: {shown} ms"
