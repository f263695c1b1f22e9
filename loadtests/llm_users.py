"""Locust users: each sends one session after the other, in a protocol of its own.

Import after grpc.experimental.gevent.init_gevent(); see locustfile.py.
"""

from __future__ import annotations

import http.client
import json
import queue
import time
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gevent
import numpy as np
import tritonclient.grpc as triton
from gevent.queue import Queue
from locust import User, task
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from llm_run import Run
from roundhouse.bench import metrics, wire
from roundhouse.bench.metrics import Trace
from roundhouse.bench.scenario import Request


class LlmUser(User):
    """Sends one session after the other. Subclasses say how a request is sent."""

    abstract = True
    protocol: ClassVar[str]
    streams: ClassVar[bool] = True

    @property
    def test(self) -> Run:
        return self.environment.roundhouse

    @task
    def session(self) -> None:
        due, requests = self.test.next_session()
        for request in requests:
            now = time.monotonic()
            trace = Trace(request.kind, request.prompt_tokens, min(due, now), now, streamed=self.streams)
            try:
                self.send(request, trace)
            except (wire.ServerError, OSError, http.client.HTTPException) as error:
                trace.error = str(error) or type(error).__name__
            except gevent.GreenletExit:
                self.test.left(trace, request)
                raise
            trace.ended = time.monotonic()
            if trace.error is None and not trace.times:
                trace.error = "the answer had no token"
            self.test.record(trace, self.protocol)
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
            self._client.async_stream_infer(
                self.test.options.model, _tensors(request), enable_empty_final_response=True
            )
            while True:
                result, error = self._replies.get(timeout=self.test.options.response_timeout)
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
            _address(self.host, self.port), timeout=self.test.options.response_timeout
        )

    def on_stop(self) -> None:
        self._connection.close()

    def send(self, request: Request, trace: Trace) -> None:
        path, body = self.request(request)
        try:
            headers = {"Content-Type": "application/json", **self.headers()}
            self._connection.request("POST", path, json.dumps(body), headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise wire.refusal(response.status, response.read())
            self.read(response, request, trace)
        except BaseException:  # the rest of an answer must not be taken for that of the next request
            self._connection.close()
            raise

    def request(self, request: Request) -> tuple[str, dict[str, Any]]:
        return f"/v2/models/{self.test.options.model}/generate_stream", wire.generate_body(request)

    def headers(self) -> dict[str, str]:
        return {}

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
        return f"/v2/models/{self.test.options.model}/generate", wire.generate_body(request, stream=False)

    def read(self, response: http.client.HTTPResponse, request: Request, trace: Trace) -> None:
        self.note(trace, json.loads(response.read()), time.monotonic())


class OpenAiUser(HttpUser):
    """`/v1/completions` with server-sent events: vLLM, and whatever speaks like it."""

    protocol = "OpenAI"

    def request(self, request: Request) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", wire.completion_body(request, self.test.options.model)

    def headers(self) -> dict[str, str]:
        return wire.completion_headers()

    def note(self, trace: Trace, event: dict[str, Any], at: float) -> None:
        wire.note_completed(trace, event, at)


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
