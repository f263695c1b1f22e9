"""What goes over the wire, and what comes back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from roundhouse.bench import wire
from roundhouse.bench.metrics import Trace
from roundhouse.bench.scenario import Request
from roundhouse.bench.wire import ServerError

REQUEST = Request("any", "hello there", 3, 20)


def line(event: object) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n"


def test_requests_say_what_the_scenario_says() -> None:
    body = wire.generate_body(REQUEST)
    assert (body["text_input"], body["max_tokens"], body["stream"]) == ("hello there", 20, True)
    assert wire.generate_body(REQUEST, stream=False)["stream"] is False
    completion = wire.completion_body(REQUEST, "m")
    assert (completion["prompt"], completion["max_tokens"], completion["model"]) == ("hello there", 20, "m")


def test_events() -> None:
    assert wire.event_of(b"\n") is None
    assert wire.event_of(b": a comment\n") is None
    assert wire.event_of(b"data: [DONE]\n") is None
    assert wire.event_of(line({"text_output": "x"})) == {"text_output": "x"}


@pytest.mark.parametrize("error", ["full", {"message": "full", "code": 429}])
def test_errors_are_the_servers(error: object) -> None:
    with pytest.raises(ServerError, match=r"^full$"):
        wire.event_of(line({"error": error}))
    assert str(wire.refusal(400, json.dumps({"error": error}).encode())) == "HTTP 400: full"
    assert str(wire.refusal(502, b"<html>bad gateway</html>")) == "HTTP 502: <html>bad gateway</html>"


def test_completions_count_as_the_server_counts() -> None:
    trace = Trace("any", 3, 0, 0)
    for at, text in enumerate(["", "a", "b", "cd"]):
        wire.note_completed(trace, {"choices": [{"text": text}], "usage": None}, at)
    assert (trace.times, trace.tokens) == ([1, 2, 3], [1, 1, 1])
    wire.note_completed(trace, {"choices": [], "usage": {"completion_tokens": 7}}, 4)
    assert (trace.times, trace.tokens) == ([1, 2, 3], [1, 1, 5])


@pytest.mark.parametrize(
    ("count", "times", "tokens"),
    [(7, [1, 2, 9], [1, 1, 5]), (2, [1, 2], [1, 1])],
    ids=["its last tokens have no text", "its end is no token"],
)
def test_a_completion_lasts_until_its_last_token(count: int, times: list[int], tokens: list[int]) -> None:
    """That may have come with the chunk that says why it ended, and not with the last text."""
    trace = Trace("any", 3, 0, 0)
    for at, text, reason in ((1, "a", None), (2, "b", None), (9, "", "length")):
        wire.note_completed(trace, {"choices": [{"text": text, "finish_reason": reason}]}, at)
    wire.note_completed(trace, {"choices": [], "usage": {"completion_tokens": count}}, 10)
    assert (trace.times, trace.tokens) == (times, tokens)


def test_who_goes_away_after_some_tokens_has_them_counted_on_the_way() -> None:
    assert wire.completion_body(REQUEST, "m")["stream_options"] == {"include_usage": True}
    leaving = wire.completion_body(replace(REQUEST, abort_after=4), "m")
    assert leaving["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    trace = Trace("any", 3, 0, 0)
    for at, so_far in ((1, 1), (2, 4)):
        wire.note_completed(trace, {"choices": [{"text": "x"}], "usage": {"completion_tokens": so_far}}, at)
    assert (trace.times, trace.tokens) == ([1, 2], [1, 3])


def test_generated_responses_count_as_they_say() -> None:
    trace = Trace("any", 3, 0, 0)
    wire.note_generated(trace, {"text_output": "a b", "num_output_tokens": 2}, 1)
    wire.note_generated(trace, {"text_output": "", "num_output_tokens": 0}, 2)
    assert (trace.times, trace.tokens) == ([1], [2])
