"""What every request passes: its id, the API key, the size limit, the access log, and the trace that it belongs to.

What goes wrong in an endpoint by a bug is answered here, too: Starlette's handler for it is further out, where neither
the log nor the metrics would learn of its answer.

Plain ASGI, since Starlette's BaseHTTPMiddleware would copy each event of a stream.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roundhouse.bugs import described
from roundhouse.openai.errors import CLIENT_CLOSED, ApiError

if TYPE_CHECKING:
    from roundhouse.openai.app import Door

API_KEY = "ROUNDHOUSE_API_KEY"  # environment
OPEN_PATHS = ("/health", "/ready", "/metrics", "/openapi.json")  # for probes and scrapers: no key needed
PROMPT_PATHS = ("/v1/completions", "/v1/chat/completions")
REFUSED = (400, 404, 413, 422)  # what the door itself says of a prompt that it does not take
BUG = "The server had an error while processing your request; its log says more."
REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context
log = logging.getLogger("roundhouse.openai.access")


def api_keys(file: str | None) -> list[bytes]:
    """Digests of the keys that are let in: lines of the file, or the environment's. None: everybody is.

    Raises OSError, or ValueError if the file has no key in it.
    """
    lines = Path(file).read_text(encoding="utf-8").split() if file is not None else []
    if file is not None and not lines:
        raise ValueError(f"{file}: has no API key in it; write one on each line")
    keys = lines or [key for key in [os.environ.get(API_KEY, "")] if key]
    return [_digest(key.encode()) for key in keys]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    def __init__(self, app: ASGIApp, door: Door) -> None:
        section = door.deployment.openai_section
        self._app = app
        self._door = door
        self._keys = api_keys(section.api_key_file)
        self._max_body = section.max_body_bytes
        self._access_log = section.access_log
        self._log_bodies = section.log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(scope)
        self._door.open += 1
        try:
            await self._pass(visit, receive, visit.sender(send))
        finally:
            self._door.open -= 1
            self._tell(visit)

    async def _pass(self, visit: Visit, receive: Receive, send: Send) -> None:
        scope = visit.scope
        try:
            self._check_key(visit)
            body = await self._body(visit, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client went away before it had sent everything
        if self._log_bodies and body:
            log.info("%s id=%s body=%s", scope["path"], visit.request_id, body.decode(errors="replace"))
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        try:
            await self._app(scope, replay, send)
        except Exception as error:
            if visit.status != CLIENT_CLOSED:
                raise  # an answer has begun: all that is left is to break it off
            log.error("%s id=%s unexpected error: %s", visit.route, visit.request_id, described(error))
            await ApiError(500, BUG, code="internal_error").response()(scope, receive, send)

    def _check_key(self, visit: Visit) -> None:
        if not self._keys or visit.scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = visit.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode())
        same = [hmac.compare_digest(given, known) for known in self._keys]  # all of them: the time tells nothing
        if scheme.lower() != "bearer" or not any(same):
            what = "Incorrect API key provided." if key else "You didn't provide an API key."
            message = f"{what} Send it in the header Authorization: Bearer YOUR_KEY."
            raise ApiError(401, message, code="invalid_api_key")

    async def _body(self, visit: Visit, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone. Raises ApiError if it is too large."""
        length = visit.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        message = f"The body is larger than {self._max_body} bytes; send less, or raise openai.max_body_bytes."
        return ApiError(413, message, code="request_too_large")

    def _tell(self, visit: Visit) -> None:
        scope, metrics = visit.scope, self._door.metrics
        metrics.responded(visit.route, visit.status)
        if visit.status in REFUSED and scope["path"] in PROMPT_PATHS and "tokens" not in scope["state"]:
            metrics.rejected()  # an answer has tokens, if only 0: what the engine refuses is counted as it closes
        if not self._access_log or (visit.route in OPEN_PATHS and visit.status == 200):
            return
        prompt, generated = scope["state"].get("tokens", (0, 0))
        milliseconds = 1e3 * (time.monotonic() - visit.started)
        log.info(
            "%s %s %d %.1f ms prompt_tokens=%d completion_tokens=%d id=%s trace=%s client=%s",
            *(scope["method"], visit.route, visit.status, milliseconds, prompt, generated),
            *(visit.request_id, visit.trace_id or "-", _address(scope.get("client"))),
        )


class Visit:
    """One request on its way through: what the log will say of it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.started = time.monotonic()
        self.status = CLIENT_CLOSED  # unless something is sent
        given = self.headers.get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.request_id
        self._trace_parent = self.headers.get("traceparent", "")
        trace = TRACE_PARENT.fullmatch(self._trace_parent)
        self.trace_id = trace[1] if trace else ""

    @property
    def route(self) -> str:
        """The path of an endpoint: no label or log line is a client's invention."""
        route = self.scope.get("route")
        return getattr(route, "path", "unknown")

    def sender(self, send: Send) -> Send:
        """`send`, with the headers that lead back to this request."""
        added = [(b"x-request-id", self.request_id.encode())]
        if self.trace_id:
            added.append((b"traceparent", self._trace_parent.encode()))
            if state := self.headers.get("tracestate"):
                added.append((b"tracestate", state.encode("latin-1")))

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        return sending


def _address(client: Sequence[object] | None) -> str:
    return str(client[0]) if client else "-"
