"""Requests of a scenario as the protocols spell them, and what their responses say. No client library here."""

from __future__ import annotations

import json
import os
from typing import Any

from roundhouse.bench.metrics import Trace
from roundhouse.bench.scenario import NEVER_ENDS, Request


class ServerError(Exception):
    """The server refused or broke off a request. The message is the server's."""


def fields(request: Request, *, stream: bool = True) -> dict[str, tuple[str, Any]]:
    """The tensors of the contract, each `[1, 1]`: name -> (datatype, value)."""
    return {
        "text_input": ("BYTES", request.prompt),
        "max_tokens": ("INT32", request.answer_tokens),
        "stream": ("BOOL", stream),
        "end_id": ("INT32", NEVER_ENDS),
        "exclude_input_in_output": ("BOOL", True),
        "return_num_output_tokens": ("BOOL", True),
    }


def generate_body(request: Request, *, stream: bool = True) -> dict[str, Any]:
    """For Triton's `generate` and `generate_stream`."""
    return {name: value for name, (_, value) in fields(request, stream=stream).items()}


def completion_body(request: Request, model: str) -> dict[str, Any]:
    """For an OpenAI-style `/v1/completions`. `ignore_eos` is vLLM's; without it, answers end when the model says.

    So is `continuous_usage_stats`, the count in every chunk: who goes away after some tokens has to know them by then.
    """
    counted = {} if request.abort_after is None else {"continuous_usage_stats": True}
    return {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.answer_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, **counted},
    }


def completion_headers() -> dict[str, str]:
    """With the key of OPENAI_API_KEY, where OpenAI's own clients look for it, too."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def event_of(line: bytes) -> dict[str, Any] | None:
    """The JSON of a line of a server-sent event stream; None for other lines. Raises ServerError for an error in it."""
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if not data or data == b"[DONE]":
        return None
    event = json.loads(data)
    if "error" in event:
        raise ServerError(error_text(event))
    return dict(event)


def error_text(body: Any) -> str:
    """The message of an error body: Triton's `{"error": text}` or OpenAI's `{"error": {"message": text}}`."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def refusal(status: int, body: bytes) -> ServerError:
    """The error of a response that is not 200."""
    text = body.decode(errors="replace").strip()
    try:
        text = error_text(json.loads(text))
    except ValueError:
        text = text[:300]
    return ServerError(f"HTTP {status}: {text}")


def note_generated(trace: Trace, event: dict[str, Any], at: float) -> None:
    """Add an event of `generate_stream`, or the answer of `generate`."""
    tokens = int(event.get("num_output_tokens", 1))
    if tokens:
        trace.note(at, tokens)


def note_completed(trace: Trace, event: dict[str, Any], at: float) -> None:
    """Add an event of `/v1/completions`.

    A chunk with text, and the one that says why the answer ended (its tokens may have no text), counts as one token
    until the server's own count is known; the last one then takes the rest, and is left out if there is none.
    """
    if any(choice.get("text") or choice.get("finish_reason") for choice in event.get("choices", ())):
        trace.note(at, 1)
    usage = event.get("usage")
    if usage and trace.tokens:
        trace.tokens[-1] += int(usage["completion_tokens"]) - sum(trace.tokens)
        if trace.tokens[-1] == 0:
            trace.times.pop()
            trace.tokens.pop()
