"""The responses that carry an answer: all at once, or as server-sent events. Both end with their client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from roundhouse.engine.protocol import Error, ErrorCode, FinishReason
from roundhouse.openai import errors
from roundhouse.openai.answer import Answer
from roundhouse.openai.formats import DONE, Format, event

HEAD_SECONDS = 1.0  # a stream that has got nothing by then has not been refused: its headers go out
BROKEN_OFF = Error(ErrorCode.UNAVAILABLE, "the server broke the answer off; send the request again")
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Reply(Response):
    """An answer as a response. `closed` is told when it is over, however it ended."""

    def __init__(self, answer: Answer, form: Format, *, stream: bool, closed: Callable[[Answer], None]) -> None:
        self.status_code = 200
        self.background = None
        self._answer = answer
        self._form = form
        self._respond: Callable[[Send], Awaitable[None]] = self._stream if stream else self._whole
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        watcher = asyncio.create_task(_watch(receive, answer))
        try:
            await self._respond(send)
        finally:
            watcher.cancel()
            answer.cancel()
            self._closed(answer)

    async def _whole(self, send: Send) -> None:
        answer = self._answer
        await answer.completed()
        if answer.gone:
            return
        self._check()
        body = self._form.body(answer)
        headers = [*JSON, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        answer, form = self._answer, self._form
        changed = await answer.news(HEAD_SECONDS)
        if answer.gone:
            return
        self._check()  # while there is still a status to tell it with
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        while not answer.gone:
            data = b"".join([form.events(answer, choice) for choice in changed])
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if (error := self._error()) is not None:
                data = event(errors.of_engine(error).body) + DONE
                break
            if answer.finished:
                data = form.end(answer)
                break
            changed = await answer.news()
        await send({"type": "http.response.body", "body": data})

    def _check(self) -> None:
        error = self._error()
        if error is not None:
            raise errors.of_engine(error)

    def _error(self) -> Error | None:
        """What went wrong with a choice. Nobody but its client may cancel an answer."""
        answer = self._answer
        if any(choice.finish_reason is FinishReason.CANCELLED for choice in answer.choices):
            return BROKEN_OFF
        return answer.error


async def _watch(receive: Receive, answer: Answer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.leave()
