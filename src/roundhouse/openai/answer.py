"""An answer on its way: what its choices have gained from the engine, and have not sent yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from roundhouse.engine.protocol import Error, FinishReason, Output, Perf, Request
from roundhouse.openai.engine import AsyncEngine
from roundhouse.openai.requests import Ask
from roundhouse.openai.stop_text import StopText
from roundhouse.text.detokenize import Detokenizer


@dataclass(slots=True)
class Piece:
    """What a choice sends at once.

    `log_probs` and `top_log_probs` are as in `Output`, an entry for each of `tokens`, or empty if not asked for.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    top_log_probs: list[list[tuple[int, float]]]


class Choice:
    """One sequence: `take` adds what the engine gave, `piece` gives away what has gathered."""

    def __init__(self, index: int, request: Request, stops: Sequence[str], detokenizer: Detokenizer) -> None:
        self.index = index
        self.request = request
        self.generated = 0
        self.started = False  # something of it was sent
        self.finish_reason: FinishReason | None = None
        self.error: Error | None = None
        self.perf: Perf | None = None
        self._detokenizer = detokenizer
        self._window: list[int] = []
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._top_log_probs: list[list[tuple[int, float]]] = []
        self._stop_text = StopText(stops) if stops else None
        self._stopped = False  # a stop sequence ended it; what the engine still sends is dropped
        self._text = ""  # in which stop sequences have been looked for

    @property
    def last(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def take(self, output: Output) -> bool:
        """Add what the sequence gained. Returns whether the engine is to be told that the answer has ended."""
        tokens, end = output.tokens, None
        if self._stopped:
            tokens = []
        elif self._stop_text is not None:
            end = self._stop(self._stop_text, tokens)
            if end is not None:
                tokens, self._stopped = tokens[: end + 1], True
        self._tokens += tokens
        self.generated += len(tokens)
        if output.log_probs is not None:
            self._log_probs += output.log_probs[: len(tokens)]
        if output.top_log_probs is not None:
            self._top_log_probs += output.top_log_probs[: len(tokens)]
        if output.last:
            self.error, self.perf = output.error, output.perf
            self.finish_reason = FinishReason.STOP if self._stopped and output.error is None else output.finish_reason
        return end is not None and not output.last

    def piece(self) -> Piece:
        """All that has gathered."""
        tokens, self._tokens = self._tokens, []
        log_probs, self._log_probs = self._log_probs, []
        top, self._top_log_probs = self._top_log_probs, []
        if self._stop_text is None:
            text = self._detokenizer.chunk_text(self._window, tokens, self.last)
            self._window = self._detokenizer.next_window(self._window, tokens)
            return Piece(text, tokens, log_probs, top)
        if self.last and not self._stopped:
            text, self._stopped = self._stop_text.feed(self._detokenizer.chunk_text(self._window, (), True))
            self._text += text + self._stop_text.rest()
        text, self._text = self._text, ""
        return Piece(text, tokens, log_probs, top)

    def _stop(self, stop_text: StopText, tokens: Sequence[int]) -> int | None:
        """Index of the token that completes a stop sequence; the texts up to it are kept for `piece`."""
        minimum = self.request.sampling.min_tokens
        for index, token in enumerate(tokens):
            new = (token,)
            text, stopped = self._detokenizer.chunk_text(self._window, new, False), False
            self._window = self._detokenizer.next_window(self._window, new)
            if self.generated + index + 1 >= minimum:
                text, stopped = stop_text.feed(text)
            self._text += text
            if stopped:
                return index
        return None


class Answer:
    """All choices of one HTTP request; the engine works on them from the start."""

    def __init__(self, ask: Ask, engine: AsyncEngine, detokenizer: Detokenizer) -> None:
        self.ask = ask
        self.arrival_ns = time.monotonic_ns()
        self.first_token_ns = 0
        self.gone = False  # the client has gone away
        self.choices = [Choice(i, request, ask.stops, detokenizer) for i, request in enumerate(ask.requests)]
        self._engine = engine
        self._news = asyncio.Event()
        self._changed: dict[int, Choice] = {}  # by index
        requests = [msgspec.structs.replace(request, arrival_ns=self.arrival_ns) for request in ask.requests]
        self._live = dict(zip(engine.submit(requests, self._take), self.choices, strict=True))

    @property
    def finished(self) -> bool:
        return not self._live

    @property
    def error(self) -> Error | None:
        """The first error of a choice."""
        return next((choice.error for choice in self.choices if choice.error is not None), None)

    async def news(self, timeout: float | None = None) -> list[Choice]:
        """Choices that have gained something since the last call; none if the client went away, or after `timeout`."""
        if not self._changed and not self.gone:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout)
        self._news.clear()
        changed, self._changed = list(self._changed.values()), {}
        return [] if self.gone else changed

    async def completed(self) -> None:
        """Returns once nothing more comes, or the client went away."""
        while not self.finished and not self.gone:
            await self.news()

    def leave(self) -> None:
        """The client went away."""
        self.gone = True
        self._news.set()

    def cancel(self) -> None:
        """End what is still running."""
        self._engine.cancel(list(self._live))

    def _take(self, output: Output) -> None:
        choice = self._live[output.id]
        if choice.take(output):
            self._engine.cancel([output.id])
        if output.last:
            del self._live[output.id]
        if output.tokens and not self.first_token_ns:
            self.first_token_ns = time.monotonic_ns()
        self._changed[choice.index] = choice
        self._news.set()
