"""What choices send, whatever the engine's steps: joined pieces, events and bodies agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundhouse.engine.protocol import FinishReason, Output, Perf, Request, Sampling
from roundhouse.openai.answer import Choice
from roundhouse.openai.formats import DONE, ChatFormat, CompletionFormat, Format, ToolFormat
from roundhouse.openai.requests import Ask, Prompt
from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "models/tiny")
TEXTS = Detokenizer(TOKENIZER)
ALL_TEXTS = Detokenizer(TOKENIZER, skip_special_tokens=False)
answers = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=20)
cuts = st.lists(st.integers(1, 4), min_size=20, max_size=20)


def choice(stops: tuple[str, ...] = (), index: int = 0, **request: Any) -> Choice:
    return Choice(index, Request(id=0, prompt=(1, 2), max_tokens=50, **request), stops, TEXTS)


def steps(ids: list[int], sizes: list[int]) -> list[Output]:
    """The outputs of an engine that gives `sizes` tokens a step."""
    outputs, at = [], 0
    for size in sizes:
        part = ids[at : at + size]
        at += size
        top = [[(token, -0.5), (7, -1.0)] for token in part]
        outputs.append(Output(id=1, tokens=part, log_probs=[-0.5] * len(part), top_log_probs=top))
        if at >= len(ids):
            break
    last = Output(id=1, tokens=[], finish_reason=FinishReason.LENGTH, perf=Perf(reused_tokens=2))
    return [*outputs, last]


class Asked:
    """An answer without an engine: what formats read of it."""

    def __init__(self, choices: list[Choice], **ask: Any) -> None:
        self.choices = choices
        prompt = Prompt((1, 2), "prompt ")
        self.ask = Ask(tuple(c.request for c in choices), (prompt,) * len(choices), n=len(choices), **ask)


def run(one: Choice, outputs: list[Output]) -> str:
    text = ""
    for output in outputs:
        ended = one.take(output)
        text += one.piece().text
        if ended:
            one.take(Output(id=1, tokens=[9, 9], finish_reason=FinishReason.CANCELLED))
            return text + one.piece().text
    return text


@given(answers, cuts)
def test_joined_pieces_are_the_text(ids: list[int], sizes: list[int]) -> None:
    one = choice()
    assert run(one, steps(ids, sizes)) == TOKENIZER.decode(ids)
    assert one.generated == len(ids)


@given(answers, cuts, st.data())
def test_stop_sequences_cut_alike_however_the_engine_steps(ids: list[int], sizes: list[int], data: Any) -> None:
    text = TOKENIZER.decode(ids)
    at = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[at : at + data.draw(st.integers(1, 3))] or "x"
    one, other = choice((stop,)), choice((stop,))
    assert run(one, steps(ids, sizes)) == run(other, steps(ids, [len(ids)])) == text.partition(stop)[0]
    assert one.generated == other.generated
    assert (one.finish_reason is FinishReason.STOP) == (other.finish_reason is FinishReason.STOP)


def test_a_stop_sequence_before_min_tokens_does_not_end() -> None:
    ids = TOKENIZER.encode("a b a b a b", False)
    assert run(choice(("b",), sampling=Sampling(min_tokens=6)), steps(ids, [1] * 20)).count("b") >= 1


def form(kind: type[Format], **options: Any) -> Format:
    return kind("r1", "tiny", ALL_TEXTS, **{"usage": False, "continuous": False, **options})


def events(data: bytes) -> list[dict[str, Any]]:
    parts = [part for part in data.split(b"\n\n") if part]
    return [json.loads(part.removeprefix(b"data: ")) for part in parts if part != DONE.strip()]


def streamed(kind: type[Format], answer: Any, outputs: list[Output], **options: Any) -> list[dict[str, Any]]:
    style, data = form(kind, **options), b""
    for output in outputs:
        for one in answer.choices:
            one.take(output)
            data += style.events(answer, one)
    data += style.end(answer)
    assert data.endswith(DONE)
    return events(data)


IDS = TOKENIZER.encode('one "two" \n three äöü', False)


@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
def test_completion_events_add_up_to_the_body(log_probs: bool, continuous: bool) -> None:
    answer: Any = Asked([choice(), choice(index=1)], echo=True, log_probs=log_probs)
    chunks = streamed(CompletionFormat, answer, steps(IDS, [2] * 20), usage=True, continuous=continuous)
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == "prompt " + TOKENIZER.decode(IDS)
        assert [c["finish_reason"] for c in mine][-1] == "length"
        if log_probs:
            told = [value for c in mine if c["logprobs"] for value in c["logprobs"]["token_logprobs"]]
            assert told == [-0.5] * len(IDS)
            offsets = [value for c in mine if c["logprobs"] for value in c["logprobs"]["text_offset"]]
            assert offsets == sorted(offsets)
    total = {"prompt_tokens": 2, "completion_tokens": 2 * len(IDS), "total_tokens": 2 + 2 * len(IDS)}
    assert chunks[-1]["choices"] == []
    assert total.items() <= chunks[-1]["usage"].items()
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    told = [chunk["usage"] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["text"] != "prompt "]
    assert all(told) if continuous else not any(told)
    assert all(chunk["id"] == "cmpl-r1" and chunk["object"] == "text_completion" for chunk in chunks)


def test_chat_events_begin_with_the_role() -> None:
    answer: Any = Asked([choice()], log_probs=True)
    chunks = streamed(ChatFormat, answer, steps(IDS, [3] * 20))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == TOKENIZER.decode(IDS)
    told = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == TOKENIZER.decode(IDS)
    assert [entry["top_logprobs"][0]["token"] for entry in told] == [entry["token"] for entry in told]
    assert {entry["top_logprobs"][1]["logprob"] for entry in told} == {-1.0}
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert "usage" not in chunks[-1]


def test_bodies_tell_everything_at_once() -> None:
    answer: Any = Asked([choice()])
    for output in steps(IDS, [3] * 20):
        answer.choices[0].take(output)
    body = json.loads(form(ChatFormat).body(answer))
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == TOKENIZER.decode(IDS)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == len(IDS)


CALL = '{"name": "weather", "arguments": {"city": "Bonn"}}'


def test_a_tool_call_is_sent_whole() -> None:
    ids = TOKENIZER.encode(CALL, False)
    chunks = streamed(ToolFormat, Asked([choice()]), steps(ids, [2] * 100))
    (call,) = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Bonn"})
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    answer: Any = Asked([choice()])
    for output in steps(ids, [100]):
        answer.choices[0].take(output)
    message = json.loads(form(ToolFormat).body(answer))["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"]["name"] == "weather"


def test_a_tool_call_that_was_cut_off_is_text() -> None:
    ids = TOKENIZER.encode(CALL[:-3], False)
    chunks = streamed(ToolFormat, Asked([choice()]), steps(ids, [100]))
    assert chunks[-1]["choices"][0]["delta"]["content"] == CALL[:-3]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@settings(max_examples=20)
@given(st.text(alphabet='a"\\\n\u2028é😀', max_size=20))
def test_quick_events_are_json(text: str) -> None:
    for kind in (CompletionFormat, ChatFormat):
        for usage in (False, True):
            (chunk,) = events(form(kind, usage=usage).quick(3, text))
            whole = chunk["choices"][0]
            assert whole["index"] == 3
            assert (whole["text"] if kind is CompletionFormat else whole["delta"]["content"]) == text
            assert ("usage" in chunk) == usage
