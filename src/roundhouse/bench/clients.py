"""Asyncio clients: send a request of a scenario, note when its tokens came. One for each protocol."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from roundhouse.bench import metrics, wire
from roundhouse.bench.metrics import Trace
from roundhouse.bench.scenario import Request

Protocol = Literal["grpc", "http", "openai"]
PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000, "openai": 8000}
CHANNELS = 8  # connections that the gRPC streams of a process share


class TargetError(Exception):
    """A target cannot be used. The message says how one is written."""


@dataclass(frozen=True)
class Target:
    """A running server. Addresses are `host:port`; `metrics` is that of Triton's metrics port, if it is known."""

    protocol: Protocol
    address: str
    model: str = "ensemble"
    metrics: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`host:port`, `grpc://host:port/MODEL?metrics=8002`, `http://...`, `openai://...`. Raises TargetError."""
        parts = urlsplit(text if "://" in text else f"grpc://{text}")
        try:
            port = parts.port
        except ValueError as error:
            raise TargetError(f"{text!r}: {error}") from error
        if parts.scheme not in PORTS or not parts.hostname:
            raise TargetError(
                f"{text!r} is no target: give a deployment file, or grpc://HOST:PORT[/MODEL][?metrics=PORT], or the "
                "same with http:// (Triton's generate_stream) or openai:// (/v1/completions)"
            )
        protocol: Protocol = parts.scheme
        found = parse_qs(parts.query).get("metrics")
        return cls(
            protocol,
            f"{parts.hostname}:{port or PORTS[protocol]}",
            parts.path.strip("/") or "ensemble",
            f"{parts.hostname}:{found[0]}" if found else None,
        )


class Client(ABC):
    """Use as an asynchronous context manager."""

    def __init__(self, target: Target) -> None:
        self.target = target

    async def __aenter__(self) -> Self:
        return self

    @abstractmethod
    async def __aexit__(self, *_: object) -> None: ...

    @abstractmethod
    async def send(self, request: Request, trace: Trace) -> None:
        """Send it and note its responses. Raises ServerError, or what the library raises for a lost connection."""


class GrpcClient(Client):
    """ModelStreamInfer, on the protocol buffers themselves."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        self._channels = [
            grpc.aio.insecure_channel(target.address, options=[("roundhouse.channel", number)])
            for number in range(CHANNELS)
        ]
        self._stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in self._channels]
        self._next = 0

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def send(self, request: Request, trace: Trace) -> None:
        import grpc

        self._next += 1
        call = self._stubs[self._next % CHANNELS].ModelStreamInfer(iter([grpc_request(self.target.model, request)]))
        refused = ""
        try:
            async for message in call:
                if message.error_message:
                    refused = message.error_message
                    continue  # to the stream's end: Triton keeps 1.4 KB of each that is cancelled
                tokens = _output_tokens(message.infer_response)
                if tokens:
                    trace.note(time.monotonic(), tokens)
                if _goes_away(request, trace):
                    return
        except grpc.aio.AioRpcError as error:
            raise wire.ServerError(f"{error.code().name}: {error.details()}") from error
        finally:
            call.cancel()
        if refused:
            raise wire.ServerError(refused)


def grpc_request(model: str, request: Request) -> Any:
    """A ModelInferRequest."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=model)
    for name, (datatype, value) in wire.fields(request).items():
        message.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        if datatype == "BYTES":
            data = value.encode()
            message.raw_input_contents.append(len(data).to_bytes(4, "little") + data)
        else:
            message.raw_input_contents.append(int(value).to_bytes(1 if datatype == "BOOL" else 4, "little"))
    return message


def _output_tokens(response: Any) -> int:
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "num_output_tokens":
            return int.from_bytes(raw, "little")
    return 0


def _goes_away(request: Request, trace: Trace) -> bool:
    """Whether the client aborts now."""
    trace.aborted = request.abort_after is not None and metrics.output_tokens(trace) >= request.abort_after
    return trace.aborted


class HttpClient(Client):
    """Triton's `generate_stream`."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        import aiohttp

        self._session = aiohttp.ClientSession(
            f"http://{target.address}",
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            read_bufsize=2**20,
        )

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, request: Request, trace: Trace) -> None:
        path, body = self.request(request)
        async with self._session.post(path, json=body, headers=self.headers()) as response:
            if response.status != 200:
                raise wire.refusal(response.status, await response.read())
            async for line in response.content:
                event = wire.event_of(line)
                if event is not None:
                    self.note(trace, event, time.monotonic())
                if _goes_away(request, trace):
                    response.close()
                    return

    def request(self, request: Request) -> tuple[str, dict[str, Any]]:
        return f"/v2/models/{self.target.model}/generate_stream", wire.generate_body(request)

    def headers(self) -> dict[str, str]:
        return {}

    def note(self, trace: Trace, event: dict[str, Any], at: float) -> None:
        wire.note_generated(trace, event, at)


class OpenAiClient(HttpClient):
    """`/v1/completions` with server-sent events."""

    def request(self, request: Request) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", wire.completion_body(request, self.target.model)

    def headers(self) -> dict[str, str]:
        return wire.completion_headers()

    def note(self, trace: Trace, event: dict[str, Any], at: float) -> None:
        wire.note_completed(trace, event, at)


CLIENTS: dict[Protocol, type[Client]] = {"grpc": GrpcClient, "http": HttpClient, "openai": OpenAiClient}
