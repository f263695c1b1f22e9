"""One test of Locust: its scenario, its sessions, its records."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

import gevent
from locust.runners import MasterRunner, WorkerRunner

from roundhouse import deployment as deployments
from roundhouse.bench import metrics, scenario, wire
from roundhouse.bench.metrics import Objective, Trace
from roundhouse.bench.prompts import PromptMaker
from roundhouse.bench.records import Records
from roundhouse.bench.scenario import Bursts, Poisson, Request, Scenario, Session, Sessions
from roundhouse.text.tokenizer import Tokenizer


class Run:
    """One test: its scenario, its sessions, its records. One a process.

    Raises DeploymentError, ScenarioError or PromptError; OSError or ValueError for a tokenizer that cannot be loaded.
    """

    def __init__(self, environment: Any) -> None:
        options = environment.parsed_options
        self.environment = environment
        self.options = options
        self.deployment = deployments.load(options.deployment)
        self.scenario: Scenario = scenario.load(options.scenario)
        if options.rate is not None:
            self.scenario = self.scenario.with_rate(options.rate)
        self.scenario.check(self.deployment.limits.max_seq_len, options.scenario)
        slo = self.deployment.slo
        self.objective = None if slo is None else Objective(slo.ttft_ms, slo.itl_ms)
        self.records = Records()
        self._clock = time.time() - time.monotonic()  # workers on several hosts share this clock only
        self._worker = max(getattr(environment.runner, "worker_index", 0), 0)
        self._sessions = [] if isinstance(environment.runner, MasterRunner) else self._make_sessions()
        self._numbers: Iterator[int] = iter(())
        self._due: Iterator[float] | None = None

    def _make_sessions(self) -> list[Session]:
        """Before the test starts: Locust counts what happens then as part of the run time."""
        maker = PromptMaker(Tokenizer.load(self.deployment.model.tokenizer or self.deployment.model.path))
        count = self.options.prompts
        return Sessions(self.scenario, maker, self.options.seed).take(count, first=self._worker * count)

    def start(self) -> None:
        """Begin with the first session, and forget what was recorded."""
        self.records = Records()
        self._numbers = itertools.count()
        level = self.scenario.levels()[0]
        if isinstance(level, Poisson | Bursts):
            began = time.monotonic()
            times = scenario.arrivals(level, self.options.seed)
            self._due = (began + at for at in itertools.islice(times, self._worker, None, self._workers()))

    def _workers(self) -> int:
        """Workers that share an open loop."""
        if not isinstance(self.environment.runner, WorkerRunner):
            return 1
        processes = self.options.processes or 1
        return self.options.of_workers or (processes if processes > 0 else os.cpu_count() or 1)

    def next_session(self) -> tuple[float, Session]:
        """Wait until it is due (open loop), and say when that was."""
        due = time.monotonic() if self._due is None else next(self._due)
        number = next(self._numbers)
        if number == len(self._sessions):
            print(f"all {number} prompts were sent and are repeated, which favours the cache: raise --prompts")
        gevent.sleep(max(0.0, due - time.monotonic()))
        return due, self._sessions[number % len(self._sessions)]

    def record(self, trace: Trace, protocol: str) -> None:
        """To Locust's statistics and our own."""
        name = trace.kind + (" (aborted)" if trace.aborted else "")
        tokens = metrics.output_tokens(trace)
        self.environment.events.request.fire(
            request_type=protocol,
            name=name,
            response_time=1e3 * (trace.ended - trace.sent),
            response_length=tokens,
            exception=None if trace.error is None else wire.ServerError(trace.error),
            context={},
        )
        total, each, gaps = metrics.end_to_end(trace), metrics.tpot(trace), metrics.gaps(trace)
        rows = {
            "TTFT": metrics.ttft(trace),
            "ITL": sum(gaps) / len(gaps) if gaps else None,
            "TPOT": each,
            "end to end": total,
        }
        for row, value in rows.items():
            if value is not None:
                self._log(row, 1e3 * value, tokens)
        if total:
            self._log("tokens/s (a rate, not ms)", tokens / total, tokens)
        self.records.add(trace.shifted(self._clock))

    def _log(self, row: str, value: float, tokens: int) -> None:
        """A row that has no part in "Aggregated": firing a request event would double Locust's request rate."""
        self.environment.stats.get(row, "METRIC").log(value, tokens)

    def left(self, trace: Trace, request: Request) -> None:
        """The test ended in the middle of a request: what came by then counts, and what was missed by then."""
        trace.ended = time.monotonic()
        trace.error = None if self.objective is None else self.objective.missed_by(trace, request.answer_tokens)
        trace.aborted = trace.error is None
        self.records.add(trace.shifted(self._clock))
