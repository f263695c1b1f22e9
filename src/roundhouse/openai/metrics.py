"""What the front door tells Prometheus: the server's page with its own figures in it, under the same names.

Each worker writes its figures to files in a folder that all workers share (prometheus_client's multi-process mode), so
that any worker can tell the sum. PROMETHEUS_MULTIPROC_DIR must be set before this module is imported.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from roundhouse.engine.protocol import FinishReason
from roundhouse.metrics import COUNTERS, HISTOGRAMS, Record
from roundhouse.openai.answer import Answer, Choice

LABELS = {"model": "openai", "version": "1"}  # beside those of the models inside Triton
PAGE_SECONDS = 2.0


class Metrics:
    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._histograms = {}
        for name, (description, labels, buckets) in HISTOGRAMS.items():
            labels = {**LABELS, **labels}
            made = Histogram(name, description, labels, buckets=buckets, registry=registry)
            self._histograms[name] = made.labels(**labels)
        self._counters = {
            name: Counter(name, description, LABELS, registry=registry).labels(**LABELS)
            for name, description in COUNTERS.items()
        }
        self._responses = Counter(
            "roundhouse_openai_responses_total", "HTTP responses", ("path", "status"), registry=registry
        )

    def responded(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def rejected(self) -> None:
        self._counters["roundhouse_rejected_total"].inc()

    def closed(self, answer: Answer) -> None:
        if answer.first_token_ns:
            seconds = (answer.first_token_ns - answer.arrival_ns) / 1e9
            self._histograms["roundhouse_time_to_first_token_seconds"].observe(seconds)
        now_ns = time.monotonic_ns()
        for choice in answer.choices:
            self._finished(record_of(answer, choice, now_ns))

    def _finished(self, record: Record) -> None:
        for name, value in record.observations():
            self._histograms[name].observe(value)
        for name, value in record.counts():
            if value:
                self._counters[name].inc(value)


def record_of(answer: Answer, choice: Choice, now_ns: int) -> Record:
    gone = answer.gone and not choice.last
    return Record.of(
        prompt_tokens=len(choice.request.prompt),
        generated_tokens=choice.generated,
        arrival_ns=answer.arrival_ns,
        now_ns=now_ns,
        perf=choice.perf,
        error=choice.error,
        cancelled=gone or choice.finish_reason is FinishReason.CANCELLED,
    )


def own_page() -> str:
    """The figures of all workers."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry).decode()


def server_page(url: str) -> str:
    """The page of the server's metrics port; empty if it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=PAGE_SECONDS) as response:
            page: bytes = response.read()
    except OSError:
        return ""
    return page.decode()


def merged(pages: Iterable[str]) -> str:
    """One page of several. A family that is in more than one gets one header: parsers refuse a second."""
    families: dict[str, tuple[list[str], list[str]]] = {}  # name -> header lines, samples
    for page in pages:
        name = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                header, _ = families.setdefault(name, ([], []))
                if not any(have.startswith(line[: len("# HELP ") + len(name)]) for have in header):
                    header.append(line)
            elif line and not line.startswith("#"):
                families.setdefault(name, ([], []))[1].append(line)
    lines = [line for header, samples in families.values() for line in (*header, *samples)]
    return "\n".join(lines) + "\n"
