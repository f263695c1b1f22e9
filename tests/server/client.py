"""A small client for the tests: what a request gave, response by response, over gRPC or HTTP."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import requests
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

TIMEOUT = 60.0


@dataclass
class Reply:
    """One response of a stream."""

    tensors: dict[str, np.ndarray]
    final: bool
    at: float
    error: InferenceServerException | None = None

    @property
    def text(self) -> str:
        return self.tensors["text_output"].reshape(-1)[0].decode()


@dataclass
class Stream:
    """An open gRPC stream with one request on it."""

    client: grpcclient.InferenceServerClient
    queue: queue.Queue[Reply] = field(default_factory=queue.Queue)
    started: float = 0.0

    def replies(self, timeout: float = TIMEOUT) -> Iterator[Reply]:
        """Up to the final response or the first error. Raises queue.Empty if none comes in time."""
        while True:
            reply = self.queue.get(timeout=timeout)
            if reply.tensors or reply.error:
                yield reply
            if reply.final or reply.error:
                return


@lru_cache
def datatypes(grpc_url: str, model: str) -> dict[str, str]:
    with grpcclient.InferenceServerClient(grpc_url) as client:
        return {tensor.name: tensor.datatype for tensor in client.get_model_metadata(model).inputs}


def tensor(value: Any, datatype: str) -> np.ndarray:
    """`[1, 1]` of a scalar, `[1, n]` of a list; an array stays as it is."""
    if isinstance(value, np.ndarray):
        return value
    values = value if isinstance(value, list) else [value]
    if datatype == "BYTES":
        return np.array([[v if isinstance(v, bytes) else v.encode() for v in values]], dtype=np.object_)
    return np.array([values], dtype=triton_to_np_dtype(datatype))


def grpc_inputs(grpc_url: str, model: str, inputs: Mapping[str, Any]) -> list[grpcclient.InferInput]:
    known = datatypes(grpc_url, model)
    made = []
    for name, value in inputs.items():
        array = tensor(value, known.get(name, "BYTES"))
        made.append(grpcclient.InferInput(name, list(array.shape), known.get(name, "BYTES")))
        made[-1].set_data_from_numpy(array)
    return made


@contextmanager
def opened(server: Any, model: str, inputs: Mapping[str, Any], request_id: str = "") -> Iterator[Stream]:
    """A stream with one request; leaving the block early drops the client, as a user does who goes away."""
    client = grpcclient.InferenceServerClient(server.grpc_url)
    stream = Stream(client)

    def callback(result: grpcclient.InferResult | None, error: InferenceServerException | None) -> None:
        if error is not None:
            stream.queue.put(Reply({}, True, time.monotonic(), error))
            return
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        stream.queue.put(
            Reply({output.name: result.as_numpy(output.name) for output in response.outputs}, final, time.monotonic())
        )

    client.start_stream(callback)
    try:
        stream.started = time.monotonic()
        client.async_stream_infer(
            model,
            grpc_inputs(server.grpc_url, model, inputs),
            request_id=request_id,
            enable_empty_final_response=True,
        )
        yield stream
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def ask(server: Any, model: str, request_id: str = "", **inputs: Any) -> list[Reply]:
    """All responses to one request. Raises InferenceServerException for an error response."""
    with opened(server, model, inputs, request_id) as stream:
        replies = list(stream.replies())
    for reply in replies:
        if reply.error is not None:
            raise reply.error
    return replies


def answer(server: Any, model: str, prompt: str, max_tokens: int = 64, **inputs: Any) -> str:
    """The text of one prompt, streamed unless said otherwise."""
    inputs = {"stream": True, "exclude_input_in_output": True, **inputs}
    return "".join(reply.text for reply in ask(server, model, text_input=prompt, max_tokens=max_tokens, **inputs))


def generate(server: Any, model: str, **body: Any) -> requests.Response:
    return requests.post(f"{server.http_url}/v2/models/{model}/generate", json=body, timeout=TIMEOUT)


def metrics(server: Any) -> dict[str, float]:
    """The page of the metrics port: `name{labels}` -> value."""
    page = requests.get(f"{server.metrics_url}/metrics", timeout=TIMEOUT).text
    samples = (line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def gauge(server: Any, label: str) -> float:
    """A gauge of the engine, by its label's value: `active`, `used`."""
    found = [value for name, value in metrics(server).items() if name.startswith("nv_trt_llm") and f'"{label}"' in name]
    assert len(found) == 1, f"{label}: {len(found)} gauges"
    return found[0]


def until(condition: Any, seconds: float, what: str) -> float:
    """Wait until `condition()` holds; seconds that it took. Fails after `seconds`."""
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        assert waited < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - started
