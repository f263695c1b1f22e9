"""What a client saw, and the figures that follow from it. docs/benchmarking.md compares these definitions with others'.

All functions are pure. Times are seconds on one clock; figures named `_ms` are milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

QUANTILES = (50, 90, 95, 99)
SLO_QUANTILE = 95


@dataclass(slots=True)
class Trace:
    """One request as its client saw it.

    Attributes:
        due: when it should have been sent; `sent`, but for the lateness of the client, in an open loop.
        times: arrival of each response that carried tokens. tokens: how many each carried.
        ended: when nothing more could come. error: the server's message, if it failed.
        aborted: the client went away on purpose. streamed: False: there is one response only, hence no first token.
        warm_up: it only made the server busy, and is left out.
    """

    kind: str
    prompt_tokens: int
    due: float
    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None
    aborted: bool = False
    streamed: bool = True
    warm_up: bool = False

    def note(self, at: float, tokens: int) -> None:
        self.times.append(at)
        self.tokens.append(tokens)

    def shifted(self, seconds: float) -> Trace:
        """The same on a clock that shows `seconds` more."""
        return replace(
            self,
            due=self.due + seconds,
            sent=self.sent + seconds,
            ended=self.ended + seconds,
            times=[at + seconds for at in self.times],
        )

    @property
    def finished(self) -> bool:
        """The whole answer came."""
        return self.error is None and not self.aborted and bool(self.times)


def output_tokens(trace: Trace) -> int:
    return sum(trace.tokens)


def ttft(trace: Trace) -> float | None:
    """Time to first token: from the sending of the request to the first response with a token."""
    return trace.times[0] - trace.sent if trace.times and trace.streamed else None


def end_to_end(trace: Trace) -> float | None:
    """From the sending of the request to the last response with a token."""
    return trace.times[-1] - trace.sent if trace.finished else None


def tpot(trace: Trace) -> float | None:
    """Time per output token: mean time between the tokens after the first. NVIDIA's tools call this ITL."""
    total, first, tokens = end_to_end(trace), ttft(trace), output_tokens(trace)
    if total is None or first is None or tokens < 2:
        return None
    return (total - first) / (tokens - 1)


def gaps(trace: Trace) -> list[float]:
    """Inter-token latencies: the times between responses, as vLLM counts them."""
    return [after - before for before, after in pairwise(trace.times)] if trace.streamed else []


def quantile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, with linear interpolation (numpy's default)."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def quantiles(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """p50 to p99, mean, min and max; empty if there is no value."""
    ordered = sorted(values)
    if not ordered:
        return {}
    found = {f"p{percent}": quantile(ordered, percent) for percent in QUANTILES}
    found |= {"mean": math.fsum(ordered) / len(ordered), "min": ordered[0], "max": ordered[-1]}
    return {name: round(value * scale, 4) for name, value in found.items()}


@dataclass(frozen=True)
class Objective:
    """Service level objectives in milliseconds. `itl_ms` limits TPOT, the mean of a request."""

    ttft_ms: float
    itl_ms: float

    def met_by(self, trace: Trace) -> bool:
        """Whether a request was good: it finished, and within every limit that it has a figure for."""
        first, each = ttft(trace), tpot(trace)
        in_time = first is None or 1e3 * first <= self.ttft_ms
        return trace.finished and in_time and (each is None or 1e3 * each <= self.itl_ms)

    def missed_by(self, trace: Trace, answer_tokens: int) -> str | None:
        """What an answer of so many tokens that is open at `trace.ended` has missed, even if the rest came at once.

        None if it can still be good.
        """
        if not trace.streamed:
            return None
        waited = 1e3 * (trace.ended - (trace.times[0] if trace.times else trace.sent))
        if not trace.times:
            return "no first token by the end of the test" if waited > self.ttft_ms else None
        return "no end in time by the end of the test" if waited > self.itl_ms * max(answer_tokens - 1, 1) else None


@dataclass(frozen=True)
class Verdict:
    """One objective: `value_ms` is what 95 of 100 requests kept to; None: that many did not finish at all."""

    name: str
    limit_ms: float
    value_ms: float | None
    requests: int

    @property
    def met(self) -> bool:
        return self.value_ms is not None and self.value_ms <= self.limit_ms

    def line(self) -> str:
        value = "too many requests failed" if self.value_ms is None else f"{self.value_ms:.1f} ms"
        sign = "<=" if self.met else "is not <="
        return (
            f"SLO {self.name} p{SLO_QUANTILE}: {value} {sign} {self.limit_ms:g} ms, {self.requests} requests: "
            f"{'met' if self.met else 'MISSED'}"
        )


def verdicts(traces: Iterable[Trace], objective: Objective) -> list[Verdict]:
    """A verdict for TTFT and one for ITL. A request that failed was infinitely late; one that was aborted has no say
    in ITL. No request at all misses both. One-response requests have no say in either."""
    judged = [trace for trace in traces if trace.streamed and not trace.warm_up]
    first = [_or_never(trace, ttft(trace)) for trace in judged]
    between = [_or_never(trace, tpot(trace)) for trace in judged if not trace.aborted]
    result = []
    for name, limit, values in (("TTFT", objective.ttft_ms, first), ("ITL", objective.itl_ms, between)):
        known = sorted(1e3 * value for value in values if value is not None)
        worst = known[math.ceil(len(known) * SLO_QUANTILE / 100) - 1] if known else math.inf
        result.append(Verdict(name, limit, None if math.isinf(worst) else worst, len(known)))
    return result


def _or_never(trace: Trace, value: float | None) -> float | None:
    return math.inf if trace.error is not None else value


@dataclass(frozen=True)
class Summary:
    """The figures of one load. Rates are those between `start` and `end`; latencies those of requests sent between.

    Attributes:
        whole_run_tokens_per_second: all tokens, from the first request to the last response, as vLLM and NVIDIA count.
        tokens_per_second_per_user: 1 / TPOT. goodput: good requests a second; None without objectives.
        late_ms: how late the client itself sent requests.
    """

    seconds: float
    requests: int
    finished: int
    aborted: int
    failed: int
    errors: dict[str, int]
    requests_per_second: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    whole_run_tokens_per_second: float
    tokens_per_response: float
    tokens_per_second_per_user: dict[str, float]
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    tpot_ms: dict[str, float]
    e2e_ms: dict[str, float]
    late_ms: dict[str, float]
    goodput: float | None
    good_percent: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(traces: Sequence[Trace], start: float, end: float, objective: Objective | None) -> Summary:
    """Figures of the load between `start` and `end`. Raises ValueError if there is no time between them."""
    if end <= start:
        raise ValueError(f"nothing was measured: the window ends {start - end:.3f} s before it starts")
    seconds = end - start
    sent = [trace for trace in traces if start <= trace.sent < end and not trace.warm_up]
    within = [
        (at, tokens)
        for trace in traces
        for at, tokens in zip(trace.times, trace.tokens, strict=True)
        if start <= at < end
    ]
    good = None if objective is None else sum(objective.met_by(trace) for trace in sent)
    judged = sum(not trace.aborted for trace in sent)
    tokens = sum(count for _, count in within)
    each = [value for trace in sent if (value := tpot(trace)) is not None]
    return Summary(
        seconds=round(seconds, 4),
        requests=len(sent),
        finished=sum(trace.finished for trace in sent),
        aborted=sum(trace.aborted for trace in sent),
        failed=sum(trace.error is not None for trace in sent),
        errors=dict(Counter(trace.error for trace in sent if trace.error is not None).most_common(10)),
        requests_per_second=round(len(sent) / seconds, 4),
        input_tokens_per_second=round(sum(trace.prompt_tokens for trace in sent if trace.times) / seconds, 2),
        output_tokens_per_second=round(tokens / seconds, 2),
        whole_run_tokens_per_second=round(whole_run_rate(traces), 2),
        tokens_per_response=round(tokens / len(within), 3) if within else 0.0,
        tokens_per_second_per_user=quantiles(1 / value for value in each if value > 0),
        ttft_ms=quantiles((value for trace in sent if (value := ttft(trace)) is not None), 1e3),
        itl_ms=quantiles((gap for trace in sent for gap in gaps(trace)), 1e3),
        tpot_ms=quantiles(each, 1e3),
        e2e_ms=quantiles((value for trace in sent if (value := end_to_end(trace)) is not None), 1e3),
        late_ms=quantiles((trace.sent - trace.due for trace in sent), 1e3),
        goodput=None if good is None else round(good / seconds, 4),
        good_percent=None if good is None or not judged else round(100 * good / judged, 2),
    )


def whole_run_rate(traces: Sequence[Trace]) -> float:
    """Tokens a second from the first request to the last response."""
    answered = [trace for trace in traces if trace.times]
    if not answered:
        return 0.0
    seconds = max(trace.times[-1] for trace in answered) - min(trace.sent for trace in traces)
    return sum(map(output_tokens, answered)) / seconds if seconds > 0 else 0.0
