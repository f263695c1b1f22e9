"""The HTTP endpoints. Each checks its body, asks the engine, and leaves the answer to a `Reply`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from roundhouse.deployment import Deployment
from roundhouse.engine.protocol import EngineInfo
from roundhouse.engine.runtime import DRAINING, runtime_dir
from roundhouse.openai import chat, errors, metrics, requests
from roundhouse.openai.answer import Answer
from roundhouse.openai.engine import AsyncEngine
from roundhouse.openai.errors import ApiError
from roundhouse.openai.formats import ChatFormat, CompletionFormat, Format, ToolFormat, encode
from roundhouse.openai.guard import Guard
from roundhouse.openai.replies import Reply
from roundhouse.openai.schema import Chat, Completion, Detokenize, ErrorBody, Generate, Tokenize
from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.tokenizer import NOT_HASTENED, Tokenizer

JOIN_SECONDS = 5.0  # with no engine by then, listen all the same: /health and /ready say how things are
LARGE_BODY = 50_000  # bytes: from there on, tokenising is left to a thread, so that it delays nobody's tokens
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STOPPING = "the server is stopping and takes no new requests; send it to another server, or again in a while"
NO_ENGINE = "the engine is not running; it is being started again: send the request again in a few seconds"
log = logging.getLogger("roundhouse.openai")
T = TypeVar("T")


class Door:
    """What the endpoints of one worker share.

    `stopping` is set at SIGTERM; the server as a whole says so in its runtime folder.
    """

    def __init__(self, deployment: Deployment, server_pid: int, metrics_url: str) -> None:
        model = deployment.model
        self.deployment = deployment
        self.tokenizer = Tokenizer.load(model.tokenizer or model.path, trust_remote_code=model.trust_remote_code)
        if not self.tokenizer.hasten():
            log.warning(NOT_HASTENED)
        chat.warm_up(self.tokenizer)
        self.detokenizer = Detokenizer(self.tokenizer)
        self.token_texts = Detokenizer(self.tokenizer, skip_special_tokens=False)
        self.models = deployment.openai_section.models or [Path(model.path).name]
        self.created = int(time.time())
        self.metrics = metrics.Metrics()
        self.metrics_url = metrics_url
        self.open = 0  # requests that are being answered
        self.stopping = False
        self._server_pid = server_pid
        self._draining = runtime_dir(server_pid) / DRAINING
        self._engine: AsyncEngine | None = None

    @asynccontextmanager
    async def joined(self, app: FastAPI) -> AsyncIterator[None]:
        """With the engine joined: uvicorn listens once this yields, so no client meets a worker that is not ready."""
        self._engine = AsyncEngine(self._server_pid, "openai", log=log.warning)
        deadline = time.monotonic() + JOIN_SECONDS
        while self._engine.info is None and time.monotonic() < deadline and not self.draining:
            await asyncio.sleep(0.01)
        yield
        self._engine.close()

    @property
    def draining(self) -> bool:
        return self.stopping or self._draining.exists()

    def engine(self) -> tuple[AsyncEngine, EngineInfo]:
        """Raises ApiError while requests cannot be answered."""
        if self.draining:
            raise ApiError(503, STOPPING, code="service_unavailable")
        info = self._engine.info if self._engine is not None else None
        if self._engine is None or info is None:
            raise ApiError(503, NO_ENGINE, code="service_unavailable")
        return self._engine, info

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.models:
            message = f"The model '{name}' does not exist; this server has {', '.join(self.models)}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def answer(self, request: Request, body: Generate, ask: requests.Ask, form: type[Format]) -> Reply:
        """Start on it."""
        engine, _ = self.engine()
        state = request.scope["state"]
        options = body.stream_options
        style = form(
            state["request_id"],
            body.model,
            self.token_texts,
            usage=bool(options and options.include_usage),
            continuous=bool(options and options.continuous_usage_stats),
        )

        def closed(answer: Answer) -> None:
            self.metrics.closed(answer)
            state["tokens"] = (ask.prompt_tokens, sum(choice.generated for choice in answer.choices))

        return Reply(Answer(ask, engine, self.detokenizer), style, stream=bool(body.stream), closed=closed)


def create(door: Door) -> FastAPI:
    app = FastAPI(
        title="Roundhouse",
        description="OpenAI-compatible completions",
        lifespan=door.joined,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses={"default": {"description": "an error in OpenAI's format", "model": ErrorBody}},
    )
    app.add_middleware(Guard, door=door)
    _add_generation(app, door)
    _add_tokens(app, door)
    _add_operations(app, door)
    _add_error_handlers(app)
    _name_models(app, door.models)
    return app


def _name_models(app: FastAPI, models: list[str]) -> None:
    """Say in the schema which models there are."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        schema = plain()
        for body in (Completion, Chat):
            schema["components"]["schemas"][body.__name__]["properties"]["model"]["enum"] = models
        return schema

    app.openapi = described  # type: ignore[method-assign]


def _add_generation(app: FastAPI, door: Door) -> None:
    @app.post("/v1/completions", response_class=Response, tags=["OpenAI"])
    async def completions(body: Completion, request: Request) -> Response:
        door.check_model(body.model)
        _, info = door.engine()
        limit = door.deployment.limits.request_batch
        ask = await _worked_out(request, lambda: requests.completion(body, door.tokenizer, info, limit))
        return door.answer(request, body, ask, CompletionFormat)

    @app.post("/v1/chat/completions", response_class=Response, tags=["OpenAI"])
    async def chat_completions(body: Chat, request: Request) -> Response:
        door.check_model(body.model)
        _, info = door.engine()
        guide = chat.guide(body, info)

        def asked() -> requests.Ask:
            prompt = _chat_prompt(door, info, body)
            return requests.chat(body, prompt, guide, door.tokenizer, info)

        ask = await _worked_out(request, asked)
        return door.answer(request, body, ask, ToolFormat if chat.tools_to_call(body) else ChatFormat)

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(door, name) for name in door.models]})

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> Response:
        door.check_model(name)
        return _json(_model(door, name))


def _add_tokens(app: FastAPI, door: Door) -> None:
    @app.post("/tokenize", response_class=Response, tags=["tokens"])
    async def tokenize(body: Tokenize, request: Request) -> Response:
        door.check_model(body.model)
        _, info = door.engine()
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Send either 'prompt' or 'messages'.", param="prompt")

        def ids() -> list[int]:
            if body.prompt is None:
                return _chat_prompt(door, info, body)
            special = body.add_special_tokens is not False
            return requests.encoded(body.prompt, "prompt", door.tokenizer, info, special_tokens=special)

        tokens = await _worked_out(request, ids)
        return _json({"count": len(tokens), "max_model_len": info.max_seq_len, "tokens": tokens})

    @app.post("/detokenize", response_class=Response, tags=["tokens"])
    async def detokenize(body: Detokenize, request: Request) -> Response:
        door.check_model(body.model)
        text = await _worked_out(request, lambda: door.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return _json({"prompt": text})


def _add_operations(app: FastAPI, door: Door) -> None:
    @app.get("/health", tags=["operations"])
    async def health() -> Response:
        """Whether this process answers: for liveness probes."""
        return Response()

    @app.get("/ready", response_class=Response, tags=["operations"])
    async def ready() -> Response:
        """Whether requests would be answered: for readiness probes."""
        door.engine()
        return Response()

    @app.get("/metrics", tags=["operations"])
    async def metrics_page() -> Response:
        """The server's metrics and those of this door, for Prometheus."""
        server = await asyncio.to_thread(metrics.server_page, door.metrics_url)
        return Response(metrics.merged([server, metrics.own_page()]), headers={"content-type": METRICS_TYPE})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return errors.of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path
        match error.status_code:
            case 404:
                return ApiError(404, f"Invalid URL ({method} {path})").response()
            case 405:
                return ApiError(405, f"Not allowed to {method} on {path}.").response(error.headers)
            case _:
                return ApiError(error.status_code, str(error.detail)).response()


async def _worked_out(request: Request, work: Callable[[], T]) -> T:
    """What `work` returns; on a thread if the body is large."""
    if len(await request.body()) < LARGE_BODY:
        return work()
    return await asyncio.to_thread(work)


def _chat_prompt(door: Door, info: EngineInfo, body: Chat | Tokenize) -> list[int]:
    """Token ids of the messages. The template has written what stands before a prompt already."""
    assert body.messages is not None
    tools = body.tools if isinstance(body, Chat) and body.tool_choice != "none" else None
    model = body.model or door.models[0]
    text = chat.render(body.messages, door.tokenizer, model, tools=tools, variables=body.chat_template_kwargs)
    special = isinstance(body, Tokenize) and bool(body.add_special_tokens)
    return requests.encoded(text, "messages", door.tokenizer, info, special_tokens=special)


def _model(door: Door, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": door.created, "owned_by": "roundhouse"}


def _json(body: Any) -> Response:
    return Response(encode(body), media_type="application/json")
