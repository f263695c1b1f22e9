"""The client contract of upstream's `ensemble`, on a real Triton: what existing clients send, and what they get."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
from tritonclient.utils import InferenceServerException

from tests.server import client
from tests.server.client import answer, ask, generate

pytestmark = pytest.mark.server
MODELS = ("ensemble", "tensorrt_llm_bls")
PROMPT = "sort: 14 58 35 13 5 37 1 ="
SORTED = " 1 5 13 14 35 37 58"
STORY = "a happy story in Japanese about a rabbit in the garden:"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


class TestAnswers:
    def test_the_answer_is_right(self, local_cpu: Any, model: str) -> None:
        assert answer(local_cpu, model, PROMPT).strip() == SORTED.strip()

    @pytest.mark.parametrize("prompt", [PROMPT, STORY, "copy: naïve 太阳 🚂🚂 שלום e\u0301 ="])
    def test_streamed_and_whole_answers_are_the_same(self, local_cpu: Any, model: str, prompt: str) -> None:
        streamed = ask(local_cpu, model, text_input=prompt, max_tokens=200, stream=True, exclude_input_in_output=True)
        whole = ask(local_cpu, model, text_input=prompt, max_tokens=200, exclude_input_in_output=True)
        assert len(whole) == 1
        assert "".join(reply.text for reply in streamed) == whole[0].text

    def test_all_models_give_the_same_answer(self, local_cpu: Any) -> None:
        assert answer(local_cpu, "ensemble", STORY, 120) == answer(local_cpu, "tensorrt_llm_bls", STORY, 120)

    def test_the_prompt_comes_first_unless_excluded_or_streamed(self, local_cpu: Any, model: str) -> None:
        echoed = ask(local_cpu, model, text_input=PROMPT, max_tokens=40)[0].text
        assert echoed.startswith(PROMPT)
        assert echoed.removeprefix(PROMPT) == answer(local_cpu, model, PROMPT, 40)
        assert not answer(local_cpu, model, PROMPT, 40, exclude_input_in_output=False).startswith("sort")

    def test_text_output_is_one_dimensional_and_the_last_text_is_final(self, local_cpu: Any, model: str) -> None:
        replies = ask(local_cpu, model, text_input=PROMPT, max_tokens=40, stream=True)
        assert all(reply.tensors["text_output"].shape == (1,) for reply in replies)
        assert replies[-1].final
        assert "text_output" in replies[-1].tensors
        assert all(reply.text for reply in replies[:-1])

    def test_finish_reasons(self, local_cpu: Any, model: str) -> None:
        ended = ask(local_cpu, model, text_input=PROMPT, max_tokens=60, stream=True)[-1]
        cut = ask(local_cpu, model, text_input=PROMPT, max_tokens=3, stream=True)[-1]
        assert ended.tensors["finish_reason"].reshape(-1)[0] == b"stop"
        assert cut.tensors["finish_reason"].reshape(-1)[0] == b"length"


class TestSampling:
    HOT: dict[str, Any] = {"temperature": 2.0, "top_k": 50}  # noqa: RUF012

    def test_equal_seeds_give_equal_answers_and_none_give_different_ones(self, local_cpu: Any, model: str) -> None:
        def sampled(**more: Any) -> str:
            return answer(local_cpu, model, "tell a story about a cat:", 60, **self.HOT, **more)

        assert sampled(seed=7) == sampled(seed=7)
        assert len({sampled() for _ in range(4)}) > 1
        assert sampled(random_seed=7) == sampled(seed=7)

    def test_several_sequences_come_with_their_index(self, local_cpu: Any, model: str) -> None:
        replies = ask(
            local_cpu, model, text_input="tell a story about a cat:", max_tokens=20, num_return_sequences=3, **self.HOT
        )
        assert sorted(reply.tensors["sequence_index"].item() for reply in replies) == [0, 1, 2]

    def test_log_probs_come_on_request(self, local_cpu: Any, model: str) -> None:
        reply = ask(local_cpu, model, text_input=PROMPT, max_tokens=5, return_log_probs=True)[0]
        log_probs = reply.tensors["output_log_probs"]
        assert log_probs.shape[-1] == 5
        assert (log_probs <= 0).all()
        assert reply.tensors["cum_log_probs"].item() == pytest.approx(log_probs.sum(), abs=1e-4)
        assert "output_log_probs" not in ask(local_cpu, model, text_input=PROMPT, max_tokens=5)[0].tensors

    def test_min_tokens_under_both_names(self, local_cpu: Any, model: str) -> None:
        for name in ("min_tokens", "min_length"):
            replies = ask(
                local_cpu, model, text_input=PROMPT, max_tokens=64, return_num_output_tokens=True, **{name: 50}
            )
            assert replies[0].tensors["num_output_tokens"].item() >= 50

    def test_bad_words_and_bias_change_the_answer(self, local_cpu: Any, model: str) -> None:
        plain = answer(local_cpu, model, "copy: apple pear =", 20)
        assert "pear" in plain
        assert "pear" not in answer(local_cpu, model, "copy: apple pear =", 20, bad_words=[" pear"])
        biased = answer(local_cpu, model, "add: 1 + 1 =", 3, embedding_bias_words=["7"], embedding_bias_weights=[100.0])
        assert biased.count("7") == 3


class TestWordsAndEnds:
    @pytest.mark.parametrize("none", [{}, {"stop_words": "", "bad_words": ""}, {"stop_words": [""], "bad_words": [""]}])
    def test_no_words(self, local_cpu: Any, model: str, none: dict[str, Any]) -> None:
        assert answer(local_cpu, model, PROMPT, **none).strip() == SORTED.strip()

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_stop_word_ends_the_answer_and_stays_in_it(self, local_cpu: Any, model: str, stream: bool) -> None:
        text = answer(local_cpu, model, "count from 1 to 90:", 300, stop_words=["12 13", "nothing"], stream=stream)
        assert text.strip() == "1 2 3 4 5 6 7 8 9 10 11 12 13"

    def test_a_stop_word_over_several_tokens(self, local_cpu: Any, model: str) -> None:
        assert answer(local_cpu, model, "count from 1 to 90:", 300, stop_words=["5 6 7"]).strip() == "1 2 3 4 5 6 7"

    def test_an_end_id_outside_the_vocabulary_means_never(self, local_cpu: Any, model: str) -> None:
        reply = ask(local_cpu, model, text_input=PROMPT, max_tokens=60, end_id=1048576, return_num_output_tokens=True)[
            0
        ]
        assert reply.tensors["num_output_tokens"].item() == 60


class TestCounts:
    def test_tokens_are_counted_on_request(self, local_cpu: Any, model: str) -> None:
        replies = ask(
            local_cpu,
            model,
            text_input=PROMPT,
            max_tokens=10,
            stream=True,
            return_num_input_tokens=True,
            return_num_output_tokens=True,
        )
        assert sum(reply.tensors["num_output_tokens"].item() for reply in replies) == 10
        assert len({reply.tensors["num_input_tokens"].item() for reply in replies}) == 1

    @pytest.mark.parametrize("flag", ["return_perf_metrics", "return_kv_cache_reuse_stats"])
    def test_a_repeated_prefix_reuses_blocks_and_a_salt_keeps_it_apart(
        self, local_cpu: Any, model: str, flag: str
    ) -> None:
        prompt = f"copy: {model} {flag} " + " ".join(str(n) for n in range(60)) + " ="

        def reused(**more: Any) -> int:
            reply = ask(local_cpu, model, text_input=prompt, max_tokens=4, **{flag: True}, **more)[-1]
            return int(reply.tensors["kv_cache_reused_blocks"].item())

        assert reused() == 0
        assert reused() > 0
        assert reused(cache_salt="another tenant") == 0
        assert reused(cache_salt="another tenant") > 0
        assert reused(cache_salt="another tenant\0") == 0

    def test_timings_are_in_order(self, local_cpu: Any, model: str) -> None:
        tensors = ask(local_cpu, model, text_input=PROMPT, max_tokens=4, return_perf_metrics=True)[-1].tensors
        names = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
        times = [tensors[name].item() for name in names]
        assert times == sorted(times)
        assert times[0] > 0


class TestBatches:
    def test_a_batch_is_answered_prompt_by_prompt(self, local_cpu: Any, model: str) -> None:
        prompts = ["copy: one =", "copy: two =", "copy: three ="]
        replies = ask(
            local_cpu,
            model,
            text_input=np.array([[p.encode()] for p in prompts], dtype=np.object_),
            max_tokens=np.full((3, 1), 12, dtype=np.int32),
            exclude_input_in_output=np.ones((3, 1), dtype=np.bool_),
        )
        texts = {reply.tensors["batch_index"].item(): reply.text.strip() for reply in replies}
        assert texts == {0: "one", 1: "two", 2: "three"}

    def test_a_bad_prompt_in_a_batch_leaves_its_neighbours_alone(self, local_cpu: Any) -> None:
        inputs = {
            "text_input": np.array([[b"copy: one ="], [b""]], dtype=np.object_),
            "max_tokens": np.full((2, 1), 12, dtype=np.int32),
            "exclude_input_in_output": np.ones((2, 1), dtype=np.bool_),
        }
        with client.opened(local_cpu, "tensorrt_llm_bls", inputs) as stream:
            first, second = stream.queue.get(timeout=30), stream.queue.get(timeout=30)
        assert "prompt 1 of the batch: text_input: is empty" in str(first.error)
        assert second.text.strip() == "one"


class TestTransports:
    def test_generate(self, local_cpu: Any, model: str) -> None:
        reply = generate(
            local_cpu, model, text_input=PROMPT, max_tokens=40, exclude_input_in_output=True, accumulate_tokens=True
        )
        assert reply.status_code == 200
        assert reply.json()["text_output"].strip() == SORTED.strip()

    def test_generate_takes_lists(self, local_cpu: Any, model: str) -> None:
        body = {"text_input": [PROMPT], "max_tokens": [40], "stop_words": ["58"], "exclude_input_in_output": [True]}
        assert generate(local_cpu, model, **body).json()["text_output"].strip() == SORTED.strip()

    def test_generate_stream(self, local_cpu: Any, model: str) -> None:
        response = requests.post(
            f"{local_cpu.http_url}/v2/models/{model}/generate_stream",
            json={"text_input": "count from 1 to 60:", "max_tokens": 400, "stream": True},
            stream=True,
            timeout=client.TIMEOUT,
        )
        lines = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
        assert len(lines) > 3
        text = "".join(json.loads(line)["text_output"] for line in lines)
        assert text.strip() == " ".join(str(number) for number in range(1, 61))

    def test_asyncio(self, local_cpu: Any, model: str) -> None:
        async def run() -> str:
            async with grpcaio.InferenceServerClient(local_cpu.grpc_url) as aio:
                inputs = client.grpc_inputs(
                    local_cpu.grpc_url, model, {"text_input": PROMPT, "max_tokens": 40, "stream": True}
                )
                made = []
                for given in inputs:
                    made.append(given)

                async def requests_() -> Any:
                    yield {"model_name": model, "inputs": made}

                text = ""
                async for result, error in aio.stream_infer(requests_()):
                    assert error is None
                    text += result.as_numpy("text_output")[0].decode()
                    if result.get_response().parameters["triton_final_response"].bool_param:
                        break
                return text

        assert asyncio.run(run()).strip() == SORTED.strip()

    def test_infer_on_a_decoupled_model_says_why_not(self, local_cpu: Any, model: str) -> None:
        with (
            grpcclient.InferenceServerClient(local_cpu.grpc_url) as grpc,
            pytest.raises(InferenceServerException, match="decoupled"),
        ):
            grpc.infer(model, client.grpc_inputs(local_cpu.grpc_url, model, {"text_input": PROMPT, "max_tokens": 4}))


class TestTensorrtLlm:
    """The model `tensorrt_llm`, called directly."""

    def ids(self, local_cpu: Any, **inputs: Any) -> list[client.Reply]:
        given = inputs.pop("input_ids", [0, 9, 10, 11])
        return ask(local_cpu, "tensorrt_llm", input_ids=given, input_lengths=len(given), request_output_len=6, **inputs)

    def test_output_ids_come_first_with_prompt_and_shape(self, local_cpu: Any) -> None:
        (reply,) = self.ids(local_cpu)
        assert next(iter(reply.tensors)) == "output_ids"
        assert reply.tensors["output_ids"].shape == (1, 1, 10)
        assert reply.tensors["output_ids"][0, 0, :4].tolist() == [0, 9, 10, 11]
        assert reply.tensors["sequence_length"].tolist() == [[10]]
        assert "chunk" not in reply.tensors

    def test_streamed_ids_are_the_new_ones(self, local_cpu: Any) -> None:
        whole = self.ids(local_cpu)[0].tensors["output_ids"].reshape(-1).tolist()
        streamed = self.ids(local_cpu, streaming=True)
        assert [i for reply in streamed for i in reply.tensors["output_ids"].reshape(-1).tolist()] == whole[4:]

    def test_stop_for_an_unknown_id_succeeds_without_outputs(self, local_cpu: Any) -> None:
        replies = ask(
            local_cpu,
            "tensorrt_llm",
            request_id="nobody",
            input_ids=[1],
            input_lengths=1,
            request_output_len=0,
            stop=True,
        )
        assert replies == []

    def test_stop_needs_an_id(self, local_cpu: Any) -> None:
        with pytest.raises(InferenceServerException, match="request ID is not provided"):
            ask(local_cpu, "tensorrt_llm", input_ids=[1], input_lengths=1, request_output_len=0, stop=True)

    @pytest.mark.parametrize("model", [*MODELS, "tensorrt_llm"])
    def test_stop_ends_a_request_with_what_it_has(self, local_cpu: Any, model: str) -> None:
        inputs: dict[str, Any] = {"text_input": "count from 1 to 300:", "max_tokens": 1500, "stream": True}
        if model == "tensorrt_llm":
            inputs = {"input_ids": [0, 9], "input_lengths": 2, "request_output_len": 1500, "streaming": True}
        with client.opened(local_cpu, model, inputs, request_id=f"long-{model}") as stream:
            replies = stream.replies()
            next(replies)
            stop = {"input_ids": [1], "input_lengths": 1, "request_output_len": 0, "stop": True}
            ask(local_cpu, "tensorrt_llm", request_id=f"long-{model}", **stop)
            last = list(replies)[-1]
        assert last.error is None
        assert last.final
