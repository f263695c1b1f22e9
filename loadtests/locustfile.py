"""Locust users for LLM servers: `locust -f loadtests/locustfile.py --host localhost:8001`; see README.md beside it."""

from __future__ import annotations

import grpc.experimental.gevent as grpc_gevent

grpc_gevent.init_gevent()  # before any channel: without it, users hang for ever in Locust's patched process

import http.client  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import asdict, dataclass, field, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, ClassVar  # noqa: E402
from urllib.parse import urlsplit  # noqa: E402

import gevent  # noqa: E402
import numpy as np  # noqa: E402
import tritonclient.grpc as triton  # noqa: E402
from gevent.queue import Queue  # noqa: E402
from locust import LoadTestShape, User, events, task  # noqa: E402
from locust.runners import MasterRunner, WorkerRunner  # noqa: E402
from tritonclient.utils import InferenceServerException, triton_to_np_dtype  # noqa: E402

from roundhouse import deployment as deployments  # noqa: E402
from roundhouse.bench import metrics, scenario, wire  # noqa: E402
from roundhouse.bench.metrics import Objective, Trace  # noqa: E402
from roundhouse.bench.prompts import PromptError, PromptMaker  # noqa: E402
from roundhouse.bench.scenario import Bursts, Poisson, Request, Scenario, Session, Sessions  # noqa: E402
from roundhouse.text.tokenizer import Tokenizer  # noqa: E402

DEPLOYMENT = Path(__file__).resolve().parents[1] / "deployments/local-cpu.yaml"
KEPT_GAPS = 200_000  # inter-token latencies that a process keeps for its quantiles, drawn at random from all
LATE_SECONDS = 0.05
STEP_SECONDS = 10.0  # of a ramp, if there is no run time to divide


# --- options ------------------------------------------------------------------------------------------


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    add = parser.add_argument_group("LLM", "what is sent").add_argument
    add("--client", choices=sorted(CLIENTS), default="grpc", help="protocol of the users")
    add("--scenario", default="fixed-512-256", help="a name in loadtests/scenarios, or a path")
    add("--rate", type=float, default=None, help="open loop: requests a second")
    add("--deployment", default=str(DEPLOYMENT), help="deployment file: tokenizer, limits, SLO")
    add("--model", default="ensemble", help="model that is asked")
    add("--seed", type=int, default=1, help="of prompts and arrivals")
    add("--prompts", type=int, default=500, help="different sessions that each process makes before it starts")
    add("--response-timeout", type=float, default=120.0, help="seconds without a response after which a request fails")
    add("--of-workers", type=int, default=None, help="workers that share an open loop; default: --processes")
    add("--summary", default=None, help="JSON file to write the summary to")


# --- what is known of a run ---------------------------------------------------------------------------


@dataclass
class Records:
    """Finished requests, with first and last response only; and a sample of the times between responses."""

    traces: list[Trace] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    gaps_seen: int = 0
    responses: int = 0

    def add(self, trace: Trace) -> None:
        for gap in metrics.gaps(trace):
            self.gaps_seen += 1
            if len(self.gaps) < KEPT_GAPS:
                self.gaps.append(gap)
            elif (place := random.randrange(self.gaps_seen)) < KEPT_GAPS:
                self.gaps[place] = gap
        self.responses += len(trace.times)
        if len(trace.times) > 2:
            times = [trace.times[0], trace.times[-1]]
            trace = replace(trace, times=times, tokens=[trace.tokens[0], sum(trace.tokens[1:])])
        self.traces.append(trace)

    def merge(self, sent: dict[str, Any]) -> None:
        """What a worker sent."""
        self.traces += [Trace(**trace) for trace in sent["traces"]]
        self.gaps = (self.gaps + sent["gaps"])[-KEPT_GAPS:]
        self.gaps_seen += sent["gaps_seen"]
        self.responses += sent["responses"]

    def summary(self, objective: Objective | None) -> metrics.Summary | None:
        if not self.traces:
            return None
        start = min(trace.sent for trace in self.traces)
        end = max(trace.ended for trace in self.traces)
        found = metrics.summarise(self.traces, start, end + 1e-6, objective)
        tokens = sum(map(metrics.output_tokens, self.traces))
        return replace(
            found,
            itl_ms=metrics.quantiles(self.gaps, 1e3),
            tokens_per_response=round(tokens / self.responses, 3) if self.responses else 0.0,
        )


class Run:
    """One test: its scenario, its sessions, its records. One a process."""

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
        self._sessions: list[Session] = []
        self._numbers: Iterator[int] = iter(())
        self._due: Iterator[float] | None = None

    def start(self) -> None:
        """Make the prompts, forget what was recorded."""
        self.records = Records()
        if isinstance(self.environment.runner, MasterRunner):
            return
        worker = max(getattr(self.environment.runner, "worker_index", 0), 0)
        tokenizer = Tokenizer.load(self.deployment.model.tokenizer or self.deployment.model.path)
        maker = Sessions(self.scenario, PromptMaker(tokenizer), self.options.seed + 1_000_003 * worker)
        if not self._sessions:
            self._sessions = maker.take(self.options.prompts)
        self._numbers = itertools.count()
        self._due = None
        level = self.scenario.levels()[0]
        if isinstance(level, Poisson | Bursts):
            began = time.monotonic()
            times = scenario.arrivals(level, self.options.seed)
            self._due = (began + at for at in itertools.islice(times, worker, None, self._workers()))

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

    def left(self, trace: Trace) -> None:
        """The test ended in the middle of a request: its first token counts, its end does not."""
        trace.aborted = True
        trace.ended = time.monotonic()
        if trace.times:
            self.records.add(trace.shifted(self._clock))


RUN: Run | None = None


def run() -> Run:
    assert RUN is not None, "Locust has not fired its init event"
    return RUN


# --- users --------------------------------------------------------------------------------------------


class LlmUser(User):
    """Sends one session after the other. Subclasses say how a request is sent."""

    abstract = True
    protocol: ClassVar[str]
    streams: ClassVar[bool] = True

    @task
    def session(self) -> None:
        due, requests = run().next_session()
        for request in requests:
            now = time.monotonic()
            trace = Trace(request.kind, request.prompt_tokens, min(due, now), now, streamed=self.streams)
            try:
                self.send(request, trace)
            except (wire.ServerError, OSError, http.client.HTTPException) as error:
                trace.error = str(error) or type(error).__name__
            except gevent.GreenletExit:
                run().left(trace)
                raise
            trace.ended = time.monotonic()
            if trace.error is None and not trace.times:
                trace.error = "the answer had no token"
            run().record(trace, self.protocol)
            if trace.error is not None:
                gevent.sleep(0.1)  # a server that refuses at once is not to be flooded
                return
            due = time.monotonic()

    def send(self, request: Request, trace: Trace) -> None:
        """Send a request and note its responses in `trace`. Raises ServerError, OSError or HTTPException."""
        raise NotImplementedError


class GrpcUser(LlmUser):
    """ModelStreamInfer through tritonclient: one client and one stream a user."""

    protocol = "gRPC"

    def on_start(self) -> None:
        self._client = triton.InferenceServerClient(_address(self.host, 8001))
        self._replies: Queue[tuple[Any, Any]] | None = None

    def on_stop(self) -> None:
        self._close()
        self._client.close()

    def send(self, request: Request, trace: Trace) -> None:
        if self._replies is None:
            self._open()
        assert self._replies is not None
        try:
            self._client.async_stream_infer(run().options.model, _tensors(request), enable_empty_final_response=True)
            while True:
                result, error = self._replies.get(timeout=run().options.response_timeout)
                if error is not None:
                    raise wire.ServerError(error.message())
                response = result.get_response()
                counted = result.as_numpy("num_output_tokens")
                if counted is not None and counted.item():
                    trace.note(time.monotonic(), int(counted.item()))
                if response.parameters["triton_final_response"].bool_param:
                    return
                if request.abort_after is not None and metrics.output_tokens(trace) >= request.abort_after:
                    trace.aborted = True
                    self._close()
                    return
        except (InferenceServerException, queue.Empty) as error:
            self._close()
            text = "no response in time" if isinstance(error, queue.Empty) else str(error.message())
            raise wire.ServerError(text) from error
        except wire.ServerError:
            self._close()
            raise

    def _open(self) -> None:
        replies: Queue[tuple[Any, Any]] = Queue()
        self._client.start_stream(lambda result, error: replies.put((result, error)))
        self._replies = replies

    def _close(self) -> None:
        """Drop the stream; what is running on it is cancelled."""
        if self._replies is not None:
            self._replies = None
            self._client.stop_stream(cancel_requests=True)


class HttpUser(LlmUser):
    """Triton's `generate_stream`."""

    protocol = "HTTP"
    port: ClassVar[int] = 8000

    def on_start(self) -> None:
        self._connection = http.client.HTTPConnection(
            _address(self.host, self.port), timeout=run().options.response_timeout
        )

    def on_stop(self) -> None:
        self._connection.close()

    def send(self, request: Request, trace: Trace) -> None:
        path, body = self.request(request)
        try:
            self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            if response.status != 200:
                raise wire.refusal(response.status, response.read())
            self.read(response, request, trace)
        except BaseException:  # the rest of an answer must not be taken for that of the next request
            self._connection.close()
            raise

    def request(self, request: Request) -> tuple[str, dict[str, Any]]:
        return f"/v2/models/{run().options.model}/generate_stream", wire.generate_body(request)

    def note(self, trace: Trace, event: dict[str, Any], at: float) -> None:
        wire.note_generated(trace, event, at)

    def read(self, response: http.client.HTTPResponse, request: Request, trace: Trace) -> None:
        while line := response.readline():
            event = wire.event_of(line)
            if event is not None:
                self.note(trace, event, time.monotonic())
            if request.abort_after is not None and metrics.output_tokens(trace) >= request.abort_after:
                trace.aborted = True
                self._connection.close()
                return


class UnaryUser(HttpUser):
    """Triton's `generate`: the whole answer in one response, hence no TTFT, ITL or TPOT."""

    streams = False

    def request(self, request: Request) -> tuple[str, dict[str, Any]]:
        return f"/v2/models/{run().options.model}/generate", wire.generate_body(request, stream=False)

    def read(self, response: http.client.HTTPResponse, request: Request, trace: Trace) -> None:
        self.note(trace, json.loads(response.read()), time.monotonic())


class OpenAiUser(HttpUser):
    """`/v1/completions` with server-sent events: vLLM, and whatever speaks like it."""

    protocol = "OpenAI"

    def request(self, request: Request) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", wire.completion_body(request, run().options.model)

    def note(self, trace: Trace, event: dict[str, Any], at: float) -> None:
        wire.note_completed(trace, event, at)


CLIENTS: dict[str, type[LlmUser]] = {"grpc": GrpcUser, "http": HttpUser, "unary": UnaryUser, "openai": OpenAiUser}


def _address(host: str | None, port: int) -> str:
    """`host:port` of what --host says, with or without `http://`."""
    given = urlsplit(host if host and "//" in host else f"//{host or 'localhost'}")
    return f"{given.hostname}:{given.port or port}"


def _tensors(request: Request) -> list[Any]:
    tensors = []
    for name, (datatype, value) in wire.fields(request).items():
        if datatype == "BYTES":
            array = np.array([[value.encode()]], dtype=np.object_)
        else:
            array = np.array([[value]], dtype=triton_to_np_dtype(datatype))
        tensors.append(triton.InferInput(name, [1, 1], datatype))
        tensors[-1].set_data_from_numpy(array)
    return tensors


# --- events -------------------------------------------------------------------------------------------


class Steps(LoadTestShape):
    """A ramp: so many users for so long, then more."""

    abstract = True  # chosen by the scenario, not by Locust

    def __init__(self, users: list[int], seconds: float) -> None:
        super().__init__()
        self._users = users
        self._seconds = seconds

    def tick(self) -> tuple[int, float] | None:
        step = int(self.get_run_time() / self._seconds)
        return (self._users[step], float(self._users[step])) if step < len(self._users) else None


@events.init.add_listener
def on_init(environment: Any, **_: Any) -> None:
    global RUN
    try:
        RUN = Run(environment)
    except (deployments.DeploymentError, scenario.ScenarioError) as error:
        sys.exit(str(error))
    environment.user_classes[:] = [CLIENTS[environment.parsed_options.client]]
    environment.available_user_classes = {user.__name__: user for user in environment.user_classes}
    levels = RUN.scenario.levels()
    if len(levels) > 1 and not isinstance(environment.runner, WorkerRunner):
        users = [level.streams for level in levels if isinstance(level, scenario.Closed)]
        seconds = (environment.parsed_options.run_time or 0) / len(users) or STEP_SECONDS
        environment.shape_class = Steps(users, seconds)
    if environment.web_ui is not None:
        environment.web_ui.app.add_url_rule("/slo", "slo", lambda: json.dumps(_report(), indent=1))


@events.test_start.add_listener
def on_test_start(environment: Any, **_: Any) -> None:
    try:
        run().start()
    except (PromptError, OSError, ValueError) as error:
        print(f"prompts cannot be made: {error}", file=sys.stderr)
        environment.process_exit_code = 1
        environment.runner.quit()


@events.report_to_master.add_listener
def on_report_to_master(client_id: str, data: dict[str, Any]) -> None:
    sent, run().records = run().records, Records()
    data["roundhouse"] = asdict(sent)


@events.worker_report.add_listener
def on_worker_report(client_id: str, data: dict[str, Any]) -> None:
    if "roundhouse" in data:
        run().records.merge(data["roundhouse"])


@events.quitting.add_listener
def on_quitting(environment: Any, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner) or RUN is None:
        return
    report = _report()
    for line in report["lines"]:
        print(line)
    sys.stdout.flush()
    if RUN.options.summary:
        Path(RUN.options.summary).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any(not verdict["met"] for verdict in report["verdicts"]):
        environment.process_exit_code = 1


def _report() -> dict[str, Any]:
    """The summary, the verdicts, and both as lines for people."""
    records, objective = run().records, run().objective
    summary = records.summary(objective)
    if summary is None:
        return {"summary": None, "verdicts": [], "lines": ["no request was finished"]}
    lines = [
        f"{summary.requests} requests in {summary.seconds:.1f} s: {summary.finished} finished, "
        f"{summary.aborted} aborted or open at the end, {summary.failed} failed",
        f"{summary.output_tokens_per_second:.1f} tokens/s out, {summary.input_tokens_per_second:.1f} in, "
        f"{summary.tokens_per_response:.2f} a response",
    ]
    for name, values in (
        ("TTFT", summary.ttft_ms), ("ITL", summary.itl_ms), ("TPOT", summary.tpot_ms), ("end to end", summary.e2e_ms),
    ):  # fmt: skip
        if values:
            shown = ", ".join(f"p{percent} {values[f'p{percent}']:.2f}" for percent in metrics.QUANTILES)
            lines.append(f"{name}: {shown} ms")
    late = sum(trace.sent - trace.due > LATE_SECONDS for trace in records.traces)
    if late:
        lines.append(
            f"{late} requests were sent late, since all users were busy or this process was: raise -u, --processes"
        )
    judged = objective is not None and any(trace.streamed for trace in records.traces)
    verdicts = metrics.verdicts(records.traces, objective) if objective is not None and judged else []
    if objective is None:
        lines.append("SLO: none in the deployment (slo.ttft_ms, slo.itl_ms), so no verdict")
    elif not judged:
        lines.append("SLO: not judged, answers in one response have no first token")
    else:
        lines.append(f"goodput: {summary.goodput:.3f} requests/s within the SLO ({summary.good_percent} %)")
        lines += [verdict.line() for verdict in verdicts]
    shown_verdicts = [{**asdict(verdict), "met": verdict.met} for verdict in verdicts]
    return {"summary": summary.as_json(), "verdicts": shown_verdicts, "lines": lines}
