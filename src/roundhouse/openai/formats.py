"""What answers look like: events of a stream, and whole bodies. One class for each of the two endpoints.

An event that only carries text is put together from bytes that were made once for the answer; this is the hot path.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import msgspec

from roundhouse.openai import chat
from roundhouse.openai.answer import Answer, Choice, Piece
from roundhouse.text.detokenize import Detokenizer

encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
LOWEST_LOG_PROB = -9999.0  # OpenAI's, for what JSON has no number for


def event(body: Any) -> bytes:
    return b"data: %b\n\n" % encode(body)


def finite(log_prob: float) -> float:
    return max(log_prob, LOWEST_LOG_PROB)


def usage(answer: Answer) -> dict[str, Any]:
    """Tokens so far. What was cached is known of sequences that have ended."""
    prompt, generated = answer.ask.prompt_tokens, sum(choice.generated for choice in answer.choices)
    first = answer.choices[:: answer.ask.n]
    cached = sum(choice.perf.reused_tokens for choice in first if choice.perf is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Format(ABC):
    """`usage`: a last event tells the usage, and others have a null in its place; `continuous`: they tell it too."""

    kind = ""  # of a whole answer
    chunk_kind = ""
    prefix = ""

    def __init__(self, request_id: str, model: str, tokens: Detokenizer, *, usage: bool, continuous: bool) -> None:
        """`tokens`: makes the texts of single tokens, special ones too."""
        self._head = {"id": self.prefix + request_id, "created": int(time.time()), "model": model}
        self._tokens = tokens
        self._usage = usage
        self._continuous = continuous
        before, after = encode({**self._head, "object": self.chunk_kind, "choices": []}).rsplit(b"[]", 1)
        self._before = b"data: " + before + b'[{"index":'
        self._after = b"]" + (b',"usage":null' if usage else b"") + after + b"\n\n"

    @abstractmethod
    def quick(self, index: int, text: str) -> bytes:
        """An event that carries text and nothing else."""

    @abstractmethod
    def chunk(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        """A choice in an event."""

    @abstractmethod
    def whole(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        """A choice in a body."""

    def begin(self, answer: Answer, choice: Choice) -> bytes:
        """What comes before the first piece of a choice."""
        return b""

    def events(self, answer: Answer, choice: Choice) -> bytes:
        """All that a choice can send now; nothing if it has no whole character."""
        piece = choice.piece()
        begin = b"" if choice.started else self.begin(answer, choice)
        choice.started = True
        if not (piece.text or piece.log_probs or choice.last):
            return begin
        if not (choice.last or piece.log_probs or self._continuous):
            return begin + self.quick(choice.index, piece.text)
        return begin + self._event(
            [self.chunk(answer, choice, piece, self.finish_reason(choice))], usage(answer) if self._continuous else None
        )

    def end(self, answer: Answer) -> bytes:
        """What comes after the last piece."""
        return (self._event([], usage(answer)) if self._usage else b"") + DONE

    def body(self, answer: Answer) -> bytes:
        """The whole answer."""
        choices = [self.whole(answer, choice, choice.piece(), self.finish_reason(choice)) for choice in answer.choices]
        return encode({**self._head, "object": self.kind, "choices": choices, "usage": usage(answer)})

    def token_text(self, token: int) -> str:
        return self._tokens.token_bytes(token).decode(errors="replace")

    def finish_reason(self, choice: Choice) -> str | None:
        return choice.finish_reason.value if choice.finish_reason is not None else None

    def _event(self, choices: list[dict[str, Any]], counted: dict[str, Any] | None) -> bytes:
        told = {"usage": counted} if self._usage or self._continuous else {}
        return event({**self._head, "object": self.chunk_kind, "choices": choices, **told})


class CompletionFormat(Format):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._offsets: Counter[int] = Counter()  # of the next token in a choice's text

    def quick(self, index: int, text: str) -> bytes:
        return b'%b%d,"text":%b,"logprobs":null,"finish_reason":null}%b' % (
            self._before, index, encode(text), self._after,
        )  # fmt: skip

    def begin(self, answer: Answer, choice: Choice) -> bytes:
        return self.quick(choice.index, answer.ask.prompts[choice.index].text) if answer.ask.echo else b""

    def chunk(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        log_probs = self._log_probs(choice.index, piece) if answer.ask.log_probs else None
        return {"index": choice.index, "text": piece.text, "logprobs": log_probs, "finish_reason": finish_reason}

    def whole(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        if answer.ask.echo:
            piece.text = answer.ask.prompts[choice.index].text + piece.text
        return self.chunk(answer, choice, piece, finish_reason)

    def _log_probs(self, index: int, piece: Piece) -> dict[str, Any]:
        texts = [self.token_text(token) for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        tops = [{self.token_text(token): finite(value) for token, value in top} for top in piece.top_log_probs]
        for top, text, value in zip(tops, texts, piece.log_probs, strict=False):
            top[text] = finite(value)  # the chosen one is always there, as with OpenAI
        return {
            "tokens": texts,
            "token_logprobs": [finite(value) for value in piece.log_probs],
            "top_logprobs": tops or None,
            "text_offset": offsets,
        }


class ChatFormat(Format):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl-"

    def quick(self, index: int, text: str) -> bytes:
        return b'%b%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}%b' % (
            self._before, index, encode(text), self._after,
        )  # fmt: skip

    def begin(self, answer: Answer, choice: Choice) -> bytes:
        return b'%b%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}%b' % (
            self._before, choice.index, self._after,
        )  # fmt: skip

    def chunk(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return self._choice(answer, choice, piece, finish_reason, delta=delta)

    def whole(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(answer, choice, piece, finish_reason, message=message)

    def _choice(
        self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None, **content: dict[str, Any]
    ) -> dict[str, Any]:
        log_probs = {"content": self._log_probs(piece), "refusal": None} if answer.ask.log_probs else None
        return {"index": choice.index, **content, "logprobs": log_probs, "finish_reason": finish_reason}

    def _log_probs(self, piece: Piece) -> list[dict[str, Any]]:
        tops = piece.top_log_probs or [[] for _ in piece.tokens]
        return [
            {**self._log_prob(token, value), "top_logprobs": [self._log_prob(*one) for one in top]}
            for token, value, top in zip(piece.tokens, piece.log_probs, tops, strict=True)
        ]

    def _log_prob(self, token: int, value: float) -> dict[str, Any]:
        raw = self._tokens.token_bytes(token)
        return {"token": self.token_text(token), "logprob": finite(value), "bytes": list(raw)}


class ToolFormat(ChatFormat):
    """Answers that call a tool. A call is sent whole, when it is complete."""

    def events(self, answer: Answer, choice: Choice) -> bytes:
        return super().events(answer, choice) if choice.last else b""

    def chunk(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        call = self._call(piece)
        if call is None:
            return super().chunk(answer, choice, piece, finish_reason)
        delta = {"tool_calls": [{"index": 0, **call}]}
        return self._choice(answer, choice, piece, "tool_calls", delta=delta)

    def whole(self, answer: Answer, choice: Choice, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        call = self._call(piece)
        if call is None:
            return super().whole(answer, choice, piece, finish_reason)
        message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
        return self._choice(answer, choice, piece, "tool_calls", message=message)

    def _call(self, piece: Piece) -> dict[str, Any] | None:
        call = chat.called(piece.text)
        if call is None:
            return None  # cut off: its text is all there is
        name, arguments = call
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
