"""vLLM behind a real Triton, on a CPU: with prefix caching and an FP8 KV cache, with n-grams, with a draft model.

Needs the environment that scripts/setup --vllm makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
import yaml
from tritonclient.utils import InferenceServerException

from tests.engines.vllm_engines import needs_fp8_kv
from tests.server import client
from tests.server.client import answer, ask, generate, opened, until
from tests.server.conftest import ROOT, TINY, VLLM_PYTHON, Server, needs_vllm, write_deployment

pytestmark = [pytest.mark.server, needs_vllm]
MODELS = ("ensemble", "tensorrt_llm_bls")
PROMPT = "copy: one two three ="
VARIANTS: dict[str, dict[str, Any]] = {
    "fp8-kv": {"precision": {"kv_cache": "fp8"}},
    "ngram": {"engine": {"ngram": {"draft_tokens": 4, "match_tokens": 3}}},
    "draft-model": {
        "speculative": {
            "method": "draft_target",
            "draft_model": f"{TINY}-draft",
            "draft_tokens": 4,
            "max_batch_size": 2,
        }
    },
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=needs_fp8_kv) if name == "fp8-kv" else name for name in VARIANTS],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    deployment = yaml.safe_load((ROOT / "deployments/local-cpu-vllm.yaml").read_text())
    del deployment["model"]
    for section, keys in VARIANTS[request.param].items():
        deployment[section] = {**deployment.get(section, {}), **keys}
    deployment["limits"] |= {"max_batch_size": 8, "queue": 8}
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUNDHOUSE_ENGINE_PYTHON", str(VLLM_PYTHON))
        with Server(write_deployment(folder, deployment), folder / "server.log") as started:
            yield started


@pytest.mark.parametrize("model", MODELS)
def test_streamed_or_not_the_answer_is_that_of_the_model(server: Server, model: str) -> None:
    assert answer(server, model, PROMPT).strip() == "one two three"
    assert answer(server, model, PROMPT, stream=False).strip() == "one two three"
    body = {"text_input": PROMPT, "max_tokens": 30, "exclude_input_in_output": True}
    assert generate(server, model, **body).json()["text_output"].strip() == "one two three"


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_of_many_steps_comes_in_many_pieces(server: Server, model: str) -> None:
    # Steps that end while a piece is on its way share the next one, so a short answer may be one piece.
    body = {"text_input": "count from 1 to 60:", "max_tokens": 400, "exclude_input_in_output": True, "stream": True}
    reply = requests.post(f"{server.http_url}/v2/models/{model}/generate_stream", json=body, timeout=client.TIMEOUT)
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in reply.text.splitlines() if line]
    assert len(pieces) > 1
    assert "".join(pieces).strip() == " ".join(str(number) for number in range(1, 61))


@pytest.mark.parametrize("model", MODELS)
def test_outputs_that_a_request_can_ask_for(server: Server, model: str) -> None:
    inputs = {"text_input": "sort: 14 58 35 =", "max_tokens": 40, "exclude_input_in_output": True}
    asked = dict.fromkeys(("return_log_probs", "return_num_output_tokens", "return_perf_metrics"), True)
    (reply,) = ask(server, model, **inputs, **asked)
    assert reply.text.strip() == "14 35 58"
    count = int(reply.tensors["num_output_tokens"].item())
    log_probs = reply.tensors["output_log_probs"].reshape(-1)[:count]
    assert np.all(log_probs <= 0)
    assert float(reply.tensors["cum_log_probs"].reshape(-1)[0]) == pytest.approx(float(log_probs.sum()), abs=1e-3)


def test_drafts_are_told_to_whoever_asks_and_to_prometheus(server: Server, request: pytest.FixtureRequest) -> None:
    def counted() -> list[int]:
        counters = client.metrics(server)
        names = ("roundhouse_draft_tokens_total", "roundhouse_accepted_draft_tokens_total")
        return [int(sum(counters[key] for key in counters if key.startswith(name))) for name in names]

    before = counted()
    words = "one two three four five six seven eight"
    inputs = {"text_input": f"copy: {words} =", "max_tokens": 60, "exclude_input_in_output": True}
    last = ask(server, "ensemble", **inputs, return_perf_metrics=True)[-1].tensors
    told = [int(last[name].item()) for name in ("total_draft_tokens", "total_accepted_draft_tokens")]
    if request.node.callspec.params["server"] == "fp8-kv":
        assert told == [0, 0]
    else:
        assert 0 < told[1] <= told[0]
        assert float(last["acceptance_rate"].item()) == pytest.approx(told[1] / told[0])
    # More than that, if those of an answer before were not on the page yet.
    until(lambda: all(now - then >= own for now, then, own in zip(counted(), before, told, strict=True)), 5, "the page")


def test_equal_prefixes_share_blocks_within_one_salt(server: Server) -> None:
    def reused(salt: str) -> int:
        inputs = {"text_input": f"copy: {'seven ' * 60}=", "max_tokens": 2, "return_perf_metrics": True}
        return int(ask(server, "ensemble", **inputs, cache_salt=salt)[-1].tensors["kv_cache_reused_blocks"].item())

    assert [reused("a"), reused("b")] == [0, 0]
    assert reused("a") > 0


def test_stop_words_seeds_and_several_sequences(server: Server) -> None:
    assert "three" not in answer(server, "ensemble", PROMPT, stop_words=["two"])
    story = {"text_input": "story:", "max_tokens": 24, "temperature": 4.0, "exclude_input_in_output": True}
    once, again, other = (ask(server, "ensemble", **story, seed=seed)[-1].text for seed in (5, 5, 6))
    assert once == again != other
    replies = ask(server, "tensorrt_llm_bls", **story, num_return_sequences=3, seed=1)
    texts = [text for reply in replies for text in reply.tensors["text_output"].reshape(-1)]
    assert len(set(texts)) == len(texts) == 3


def test_guided_decoding(server: Server) -> None:
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "[ab]{4}"}
    assert set(answer(server, "ensemble", PROMPT, 8, **guide)) <= set("ab")
    with pytest.raises(InferenceServerException, match="guide"):
        answer(server, "ensemble", PROMPT, 8, guided_decoding_guide_type="regex", guided_decoding_guide="[")


@pytest.mark.parametrize("model", MODELS)
def test_a_client_that_goes_away_frees_its_blocks(server: Server, model: str) -> None:
    def cancelled() -> float:
        counters = client.metrics(server)
        return sum(value for name, value in counters.items() if name.startswith("roundhouse_cancelled_total"))

    before = cancelled()
    with opened(server, model, {"text_input": PROMPT, "max_tokens": 1500, "stream": True, "end_id": 1048576}) as stream:
        next(stream.replies())
        until(lambda: client.gauge(server, "active") == 1, 5, "one active")
    until(lambda: client.gauge(server, "active") == 0, client.TIMEOUT, "nothing active")
    until(lambda: cancelled() == before + 1, 5, "one cancelled, not answered to its end")


def test_bad_requests_name_their_field(server: Server) -> None:
    for inputs, message in (
        ({"max_tokens": 5000}, "max_seq_len"),
        ({"max_tokens": 4, "top_p": 2.0}, "top_p"),
        ({"max_tokens": 4, "lora_task_id": 1}, "engine.lora"),
        ({"max_tokens": 4, "beam_width": 2}, "beam_width"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            ask(server, "ensemble", text_input=PROMPT, **inputs)
    assert answer(server, "ensemble", PROMPT).strip() == "one two three"
