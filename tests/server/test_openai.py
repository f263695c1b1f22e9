"""The OpenAI-compatible front door, through the clients that people use."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from langchain_openai import ChatOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.server import client
from tests.server.client import gauge, until
from tests.server.conftest import VLLM_PYTHON, Server, Start, needs_vllm, write_deployment
from tests.server.door import KEY, Door, opened

pytestmark = pytest.mark.server
SORT = "sort: 14 58 35 ="


@pytest.fixture(scope="module")
def door(local_cpu: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """In front of the little model."""
    with opened(local_cpu, tmp_path_factory.mktemp("openai") / "log") as door:
        yield door


@pytest.fixture(scope="module")
def slow(synthetic: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """In front of streams of 200 tokens a second."""
    with opened(synthetic, tmp_path_factory.mktemp("openai") / "log") as door:
        yield door


# --- what is answered ---------------------------------------------------------------------------------


def test_the_sdk_completes(door: Door) -> None:
    sdk = door.sdk
    (name,) = [model.id for model in sdk.models.list()]
    assert name == sdk.models.retrieve(name).id == "tiny"
    whole = sdk.completions.create(model=name, prompt=SORT, max_tokens=40, temperature=0)
    assert whole.choices[0].text.strip() == "14 35 58"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        sdk.completions.create(
            model=name, prompt=SORT, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_sdk_chats(door: Door) -> None:
    messages: Any = [{"role": "user", "content": SORT}]
    whole = door.sdk.chat.completions.create(model="tiny", messages=messages, temperature=0, logprobs=True)
    text = whole.choices[0].message.content
    assert text is not None
    assert "14 35 58" in text
    told = whole.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert all(entry.logprob <= 0 for entry in told.content)
    assert b"".join(bytes(entry.bytes or ()) for entry in told.content).decode().startswith(text)
    with door.sdk.chat.completions.create(model="tiny", messages=messages, temperature=0, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text


def test_the_asynchronous_sdk_streams_side_by_side(door: Door) -> None:
    async def one(sdk: openai.AsyncOpenAI, number: int) -> str:
        stream = await sdk.completions.create(
            model="tiny", prompt=f"copy: {number} {number} =", max_tokens=30, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key=KEY) as sdk:
            return await asyncio.gather(*(one(sdk, number) for number in range(10, 26)))

    assert [text.strip() for text in asyncio.run(all_of_them())] == [f"{n} {n}" for n in range(10, 26)]


def test_langchain_chats(door: Door) -> None:
    chat = ChatOpenAI(model="tiny", base_url=f"{door.url}/v1", api_key=KEY, temperature=0, stream_usage=True)
    answer = chat.invoke(SORT)
    assert "14 35 58" in str(answer.content)
    assert answer.usage_metadata is not None
    pieces = list(chat.stream([("system", "be brief"), ("human", SORT)]))
    assert len(pieces) > 1
    with pytest.raises(openai.BadRequestError, match="not supported with this model"):
        chat.bind(response_format={"type": "json_object"}).invoke(SORT)


def test_curl_streams(door: Door) -> None:
    body = json.dumps({"model": "tiny", "prompt": SORT, "max_tokens": 40, "temperature": 0, "stream": True})
    command = ["curl", "-sN", f"{door.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}"]
    command += ["-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text.strip() == "14 35 58"


def test_batches_samples_echo_and_stop(door: Door) -> None:
    body = {"model": "tiny", "prompt": [SORT, "copy: one two three ="], "n": 2, "echo": True, "temperature": 0}
    reply = door.post("/v1/completions", {**body, "max_tokens": 40, "stop": ["35", "three"]}).json()
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts[0] == texts[1]
    assert [text.replace("= ", "=").strip() for text in texts[::2]] == [f"{SORT}14", "copy: one two three =one two"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert all(choice["finish_reason"] == "stop" for choice in reply["choices"])


def test_seeds_and_bias_reach_the_engine(door: Door) -> None:
    def text(**fields: Any) -> str:
        body = {"model": "tiny", "prompt": "a story:", "max_tokens": 12, **fields}
        return str(door.post("/v1/completions", body).json()["choices"][0]["text"])

    assert text(seed=5) == text(seed=5)
    assert len({text(seed=seed) for seed in range(4)}) > 1
    (token,) = door.post("/tokenize", {"prompt": "z", "add_special_tokens": False}).json()["tokens"]
    assert text(logit_bias={str(token): 100}, ignore_eos=True) == "z" * 12


def test_tokens_there_and_back(door: Door) -> None:
    tokens = door.post("/tokenize", {"prompt": "hello wörld"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert door.post("/detokenize", {"tokens": tokens["tokens"]}).json()["prompt"].endswith("hello wörld")
    chat = door.post("/tokenize", {"messages": [{"role": "user", "content": "hello"}]}).json()["tokens"]
    assert door.post("/detokenize", {"tokens": chat}).json()["prompt"].endswith("<|user|>hello<|end|><|assistant|>")


# --- what is refused ----------------------------------------------------------------------------------


def test_the_sdk_gets_its_own_errors(door: Door) -> None:
    chat = door.sdk.chat.completions
    hello: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError) as missing:
        chat.create(model="gpt-5", messages=hello)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        chat.create(model="tiny", messages=hello, extra_body={"bogus": 1})
    assert (bad.value.code, bad.value.param) == ("unknown_parameter", "bogus")
    with pytest.raises(openai.BadRequestError) as long:
        chat.create(model="tiny", messages=hello, max_completion_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.UnprocessableEntityError, match="role tool is unknown"):
        chat.create(model="tiny", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{door.url}/v1", api_key="sk-wrong").models.list()


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b'"x"', 400), (b"\xff", 400), (b"[" * 100_000, 400), (b"{}", 400), (b"", 400)],
)
def test_nonsense_is_refused(door: Door, body: bytes, status: int) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    reply = requests.post(f"{door.url}/v1/completions", data=body, headers=headers, timeout=10)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_other_paths_and_methods(door: Door) -> None:
    assert door.get("/v1/nothing").status_code == 404
    assert door.get("/v1/completions").status_code == 405
    assert "Invalid URL" in door.get("/v1/nothing").json()["error"]["message"]
    assert requests.get(f"{door.url}/v1/models", timeout=10).status_code == 401  # no key
    assert requests.get(f"{door.url}/health", timeout=10).status_code == 200


# --- what it costs to go away, and what is full -------------------------------------------------------


def idle(server: Server) -> bool:
    return gauge(server, "active") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(slow: Door, synthetic: Server, stream: bool) -> None:
    until(lambda: idle(synthetic), 10, "idle")
    body = {"model": "tiny", "prompt": "a b", "max_tokens": 8000, "ignore_eos": True, "stream": stream, "n": 3}
    done = threading.Event()

    def abandoned() -> None:
        with suppress(requests.RequestException):
            reply = requests.post(
                f"{slow.url}/v1/completions",
                json=body,
                headers={"Authorization": f"Bearer {KEY}"},
                stream=stream,
                timeout=1,
            )
            lines = reply.iter_lines()  # kept: its end would end the connection
            next(lines)
            done.wait(5)
            reply.close()

    thread = threading.Thread(target=abandoned)
    thread.start()
    until(lambda: gauge(synthetic, "active") == 3, 5, "three active sequences")
    done.set()
    thread.join()
    assert until(lambda: idle(synthetic), 1.3, "cancelled") < 1.3  # gauges are 0.3 s old


def test_a_full_queue_is_429(slow: Door, synthetic: Server) -> None:
    until(lambda: idle(synthetic), 10, "idle")
    body = {"model": "tiny", "prompt": "a b", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with requests.post(
        f"{slow.url}/v1/completions", json={**body, "n": 80}, headers=headers, stream=True, timeout=30
    ) as full:
        assert full.status_code == 200
        with pytest.raises(openai.RateLimitError) as caught:
            slow.sdk.completions.create(model="tiny", prompt="a", max_tokens=5)
        assert caught.value.response.headers["retry-after"] == "1"
        assert slow.post("/v1/completions", body).status_code == 429
    until(lambda: idle(synthetic), 5, "idle")


# --- operations ---------------------------------------------------------------------------------------


def test_ids_and_traces_come_back_and_are_logged_without_prompts(door: Door) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"X-Request-Id": "id-17", "traceparent": f"00-{trace}-b7ad6b7169203331-01", "tracestate": "a=b"}
    body = {"model": "tiny", "prompt": "secret words", "max_tokens": 3}
    reply = door.post("/v1/completions", body, headers=headers)
    assert reply.headers["x-request-id"] == "id-17"
    assert reply.headers["traceparent"] == headers["traceparent"]
    assert reply.headers["tracestate"] == "a=b"
    assert reply.json()["id"] == "cmpl-id-17"
    until(lambda: "id=id-17" in door.log.read_text(), 2, "a line in the log")
    (line,) = [line for line in door.log.read_text().splitlines() if "id=id-17" in line]
    assert f"trace={trace}" in line
    assert "POST /v1/completions 200" in line
    assert "completion_tokens=3" in line
    assert "secret" not in door.log.read_text()
    assert (
        len(door.post("/tokenize", {"prompt": "a"}, headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"]) == 32
    )


def page(door: Door) -> dict[str, float]:
    """The metrics, by name and labels."""
    text = door.get("/metrics").text
    list(text_string_to_metric_families(text))  # it parses
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == len({line.rpartition(" ")[0] for line in lines})
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_one_page_has_the_metrics_of_the_server_and_of_all_workers(door: Door, local_cpu: Server) -> None:
    name = 'roundhouse_generated_tokens_total{model="openai",version="1"}'
    before = page(door)
    for _ in range(6):  # new connections: they reach both workers
        door.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 5, "ignore_eos": True})
    after = page(door)
    assert after[name] - before[name] == 30
    assert set(client.metrics(local_cpu)) <= set(after)
    counted = 'roundhouse_openai_responses_total{path="/v1/completions",status="200"}'
    assert after[counted] - before.get(counted, 0) == 6


def test_refused_prompts_are_counted_once(door: Door) -> None:
    name = 'roundhouse_rejected_total{model="openai",version="1"}'
    before = page(door)[name]
    body = {"model": "tiny", "prompt": "a"}
    bad = [{**body, "temperature": 9}, {**body, "model": "x"}, {**body, "max_tokens": 9999}, {**body, "stop": 1}, []]
    statuses = [door.post("/v1/completions", wrong).status_code for wrong in bad]
    statuses.append(door.post("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "tool"}]}).status_code)
    assert statuses == [400, 404, 400, 400, 400, 422]
    assert [door.post("/tokenize", {"tokens": 1}).status_code, door.get("/v1/nothing").status_code] == [400, 404]
    until(lambda: page(door)[name] - before == len(statuses), 2, "all are counted")


def test_what_the_command_lacks_is_told(local_cpu: Server, tmp_path: Path) -> None:
    def told(deployment: Path, *options: str) -> str:
        command = [sys.executable, "-m", "roundhouse.cli", "openai", str(deployment), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        return done.stderr

    other = write_deployment(tmp_path, {"engine": {"kind": "synthetic"}})
    assert "no server runs" in told(other)
    port = local_cpu.http_url.rpartition(":")[2]
    assert "Address already in use" in told(local_cpu.deployment, "--grpc-url", local_cpu.grpc_url, "--port", port)


# --- an engine with guided decoding -------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Kiel"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {**CITY, "additionalProperties": False}}}


@needs_vllm
def test_json_and_tools_with_an_engine_that_can(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDHOUSE_ENGINE_PYTHON", str(VLLM_PYTHON))
    server = start(
        {
            "engine": {"kind": "vllm", "eager": True},
            "scheduling": {"policy": "max_utilization"},
            "limits": {"max_batch_size": 8, "max_seq_len": 1024},
            "kv_cache": {"tokens": 16384},
        },
        "--openai",
    )
    sdk = openai.OpenAI(base_url=f"{server.openai_url}/v1", api_key="none", max_retries=0)
    until(Door(server.openai_url, server.log).ready, 30, "the door is open")
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": SORT}], "max_tokens": 100, "temperature": 0}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": WEATHER["function"]["parameters"]}}
    text = sdk.chat.completions.create(**ask, response_format=form).choices[0].message.content
    assert text in (
        '{"city": "Bonn"}',
        '{"city": "Kiel"}',
    )  # no blanks but these: a model could go on with them for ever
    choice = sdk.chat.completions.create(**ask, tools=[WEATHER], tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] in ("Bonn", "Kiel")
    stream = sdk.chat.completions.create(**ask, tools=[WEATHER], tool_choice="required", stream=True)
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["weather"]
    top = sdk.chat.completions.create(**ask, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert all(entry.top_logprobs[0].token == entry.token for entry in top.content)
