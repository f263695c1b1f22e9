"""From bodies to what the engine is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

from roundhouse.engine.protocol import EngineInfo, Feature
from roundhouse.openai import chat, errors, requests
from roundhouse.openai.errors import ApiError
from roundhouse.openai.requests import Ask
from roundhouse.openai.schema import Chat, Completion
from roundhouse.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "models/tiny"
INFO = EngineInfo(
    engine="synthetic",
    version="1",
    model="tiny",
    vocab_size=1024,
    max_seq_len=256,
    max_batch_size=8,
    max_queue=8,
    tokens_per_block=32,
    max_blocks=64,
    lacks={Feature.GUIDED_DECODING: "there is nothing to guide"},
)
ABLE = EngineInfo(**{**{name: getattr(INFO, name) for name in INFO.__struct_fields__}, "lacks": {}})
USER = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def completion(tokenizer: Tokenizer, **fields: Any) -> Ask:
    body = Completion.model_validate({"model": "tiny", "prompt": "one two", **fields})
    return requests.completion(body, tokenizer, INFO, 4)


def chatted(tokenizer: Tokenizer, info: EngineInfo = INFO, **fields: Any) -> Ask:
    body = Chat.model_validate({"model": "tiny", "messages": USER, **fields})
    return requests.chat(body, [5, 6, 7], chat.guide(body, info), tokenizer, info)


def refused(status: int, param: str | None, call: Any, *args: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*args, **fields)
    assert (caught.value.status, caught.value.param) == (status, param), caught.value.message
    return caught.value


def test_a_prompt_is_text_or_ids_one_or_several(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two", True)
    assert [r.prompt for r in completion(tokenizer).requests] == [tuple(ids)]
    assert [r.prompt for r in completion(tokenizer, prompt=ids).requests] == [tuple(ids)]
    assert completion(tokenizer, prompt=["one two", "a"]).requests[0].prompt == tuple(ids)
    assert len(completion(tokenizer, prompt=[[1, 2], [3]], n=3).requests) == 6
    refused(400, "prompt", completion, tokenizer, prompt=[])
    refused(400, "prompt", completion, tokenizer, prompt=["a"] * 5)
    refused(400, "prompt", completion, tokenizer, prompt="a" * 100_000)
    refused(400, "prompt", completion, tokenizer, prompt="\ud800")
    refused(400, "prompt", completion, tokenizer, prompt=[5000])


def test_defaults_are_those_of_openai(tokenizer: Tokenizer) -> None:
    request = completion(tokenizer).requests[0]
    assert request.max_tokens == 16
    assert request.sampling.temperature == 1.0
    assert request.end_ids == tokenizer.end_ids
    assert chatted(tokenizer).requests[0].max_tokens == 253  # all that is left


def test_sampling_fields_reach_the_engine(tokenizer: Tokenizer) -> None:
    request = completion(
        tokenizer,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        min_tokens=3,
        seed=-1,
        logit_bias={"3": -100, "4": 0},
        logprobs=0,
        cache_salt="s",
        priority=2,
        ignore_eos=True,
        stop_token_ids=[9],
    ).requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (sampling.min_tokens, sampling.seed, sampling.logit_bias) == (3, 2**64 - 1, {3: -100.0})
    assert (request.max_tokens, request.log_probs, request.cache_salt, request.end_ids) == (7, True, "s", (9,))
    assert request.priority == -2  # lower is sooner here, higher is in the engine
    assert completion(tokenizer, top_p=0).requests[0].sampling.greedy


def test_samples_of_a_seed_differ(tokenizer: Tokenizer) -> None:
    assert [r.sampling.seed for r in completion(tokenizer, n=3, seed=7).requests] == [7, 8, 9]
    assert [r.sampling.seed for r in completion(tokenizer, n=2).requests] == [None, None]


def test_a_special_token_stops_by_its_id(tokenizer: Tokenizer) -> None:
    ask = completion(tokenizer, stop=["<|user|>", "\n"])
    assert ask.stops == ("\n",)
    assert tokenizer.encode("<|user|>", False)[0] in ask.requests[0].end_ids


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 0}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"max_tokens": 300}, "prompt"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    refused(400, param, completion, tokenizer, **fields)


def test_too_long_has_the_code_that_clients_look_for(tokenizer: Tokenizer) -> None:
    assert refused(400, "prompt", completion, tokenizer, max_tokens=300).code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"bogus": 1}, "bogus", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"model": None}, "model", "invalid_value"),
        ({"stream_options": {"bogus": 1}}, "stream_options.bogus", "unknown_parameter"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Completion.model_validate({"model": "tiny", "prompt": "a", **fields})
    error = errors.of_validation(caught.value.errors())
    assert (error.status, error.param, error.code) == (400, param, code)


# --- chats --------------------------------------------------------------------------------------------


def test_messages_are_rendered_by_the_template(tokenizer: Tokenizer) -> None:
    body = Chat.model_validate(
        {
            "model": "tiny",
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
        }
    )
    text = chat.render(body.messages, tokenizer, "tiny")
    assert text == "<|begin_of_text|><|system|>be brief<|end|><|user|>a\nb<|end|><|assistant|>"


def test_a_template_that_refuses_is_422(tokenizer: Tokenizer) -> None:
    body = Chat.model_validate({"model": "tiny", "messages": [{"role": "tool", "content": "x"}]})
    error = refused(422, "messages", chat.render, body.messages, tokenizer, "tiny")
    assert "role tool is unknown" in error.message


def test_a_model_without_template_is_404(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    body = Chat.model_validate({"model": "m", "messages": USER})
    error = refused(404, "model", chat.render, body.messages, Tokenizer.load(tmp_path), "m")
    assert "/v1/completions" in error.message


def test_template_variables_cannot_replace_ours(tokenizer: Tokenizer) -> None:
    body = Chat.model_validate({"model": "tiny", "messages": USER})
    for name in ("chat_template", "tools", "add_generation_prompt"):
        fields = {"variables": {name: ""}}
        refused(400, "chat_template_kwargs", chat.render, body.messages, tokenizer, "tiny", **fields)
    assert chat.render(body.messages, tokenizer, "tiny", variables={"enable_thinking": False})


def test_arguments_of_earlier_calls_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = Chat.model_validate({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})
    plain = chat.plain(body.messages[0])
    assert plain["content"] == ""
    assert plain["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    call["function"] = {"name": "f", "arguments": "{"}
    body = Chat.model_validate({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})
    refused(400, "messages", chat.plain, body.messages[0])


@pytest.mark.parametrize("annotations", [None, []])
def test_an_answer_of_the_sdk_goes_back_as_it_came(annotations: Any) -> None:
    answer = ChatCompletionMessage(role="assistant", content="hello", annotations=annotations)
    body = Chat.model_validate({"model": "m", "messages": [*USER, answer.model_dump()]})
    assert chat.plain(body.messages[1]) == {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("audio", {"id": "a"}, "unsupported_value"),
        ("function_call", {"name": "f", "arguments": "{}"}, "unsupported_value"),
        ("annotations", [{"type": "url_citation"}], "invalid_value"),
    ],
)
def test_what_an_answer_here_never_has_is_refused(field: str, value: Any, code: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Chat.model_validate({"model": "m", "messages": [{"role": "assistant", "content": "hello", field: value}]})
    error = errors.of_validation(caught.value.errors())
    assert (error.status, error.param, error.code) == (400, "messages", code)
    assert f"'messages[0].{field}'" in error.message


def test_guides_need_an_engine_that_can(tokenizer: Tokenizer) -> None:
    refused(400, "response_format", chatted, tokenizer, response_format={"type": "json_object"})
    refused(400, "tools", chatted, tokenizer, tools=[WEATHER], tool_choice="required")
    assert chatted(tokenizer, response_format={"type": "text"}).requests[0].guide is None
    assert chatted(tokenizer, tools=[WEATHER], tool_choice="none").requests[0].guide is None


def test_response_formats_become_guides(tokenizer: Tokenizer) -> None:
    guide = chatted(tokenizer, ABLE, response_format={"type": "json_object"}).requests[0].guide
    assert guide is not None
    assert (guide.kind, guide.text) == ("json", "")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    guide = chatted(tokenizer, ABLE, response_format=form).requests[0].guide
    assert guide is not None
    assert (guide.kind, guide.text) == ("json_schema", '{"type": "integer"}')
    refused(400, "response_format.json_schema", chatted, tokenizer, ABLE, response_format={"type": "json_schema"})


def test_tools_become_guides(tokenizer: Tokenizer) -> None:
    guide = chatted(tokenizer, ABLE, tools=[WEATHER, TIME], tool_choice="required").requests[0].guide
    assert guide is not None
    assert guide.text.count('"const"') == 2
    named = {"type": "function", "function": {"name": "time"}}
    guide = chatted(tokenizer, ABLE, tools=[WEATHER, TIME], tool_choice=named).requests[0].guide
    assert guide is not None
    assert "weather" not in guide.text
    refused(400, "tool_choice", chatted, tokenizer, ABLE, tools=[WEATHER])  # auto
    refused(400, "tool_choice", chatted, tokenizer, ABLE, tools=[WEATHER], tool_choice=named)
    refused(400, "tool_choice", chatted, tokenizer, ABLE, tool_choice="required")


def test_top_logprobs_need_logprobs(tokenizer: Tokenizer) -> None:
    refused(400, "top_logprobs", chatted, tokenizer, top_logprobs=0)
    request = chatted(tokenizer, logprobs=True, top_logprobs=2).requests[0]
    assert (request.log_probs, request.top_log_probs) == (True, 2)
    request = completion(tokenizer, logprobs=3).requests[0]
    assert (request.log_probs, request.top_log_probs) == (True, 3)
