"""Bad input: each case gets a clear error that names the field, its neighbours are unharmed, the server goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests.server import client
from tests.server.client import ask, generate, opened

pytestmark = pytest.mark.server
GOOD = {"text_input": "copy: fine =", "max_tokens": 12}
WORDS = np.array([[b"w%d" % n for n in range(5000)]], dtype=np.object_)

# What is changed in a good request, and what the error must name.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("empty prompt", {"text_input": ""}, "text_input"),
    ("two prompts in one row", {"text_input": ["a", "b"]}, "text_input"),
    ("no prompt in the row", {"text_input": np.empty((1, 0), dtype=np.object_)}, "text_input"),
    ("prompt of 10 MB", {"text_input": "a" * 10_000_000}, "text_input"),
    ("prompt too long", {"text_input": "7 " * 3000}, "max_seq_len"),
    ("prompt and answer too long", {"text_input": "7 " * 900, "max_tokens": 2000}, "max_tokens"),
    ("invalid UTF-8", {"text_input": b"ab\xff\xfe"}, "text_input"),
    ("cut-off UTF-8", {"text_input": "é".encode()[:1]}, "text_input"),
    ("lone surrogate", {"text_input": b"\xed\xa0\x80"}, "text_input"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens"),
    ("max_tokens negative", {"max_tokens": -5}, "max_tokens"),
    ("max_tokens huge", {"max_tokens": 2**31 - 1}, "max_tokens"),
    ("temperature NaN", {"temperature": float("nan")}, "temperature"),
    ("temperature infinite", {"temperature": float("inf")}, "temperature"),
    ("temperature negative", {"temperature": -0.5}, "temperature"),
    ("top_k negative", {"top_k": -3}, "top_k"),
    ("top_p above 1", {"top_p": 1.01}, "top_p"),
    ("top_p NaN", {"top_p": float("nan")}, "top_p"),
    ("repetition_penalty 0", {"repetition_penalty": 0.0}, "repetition_penalty"),
    ("repetition_penalty infinite", {"repetition_penalty": float("inf")}, "repetition_penalty"),
    ("presence_penalty NaN", {"presence_penalty": float("nan")}, "presence_penalty"),
    ("frequency_penalty infinite", {"frequency_penalty": float("-inf")}, "frequency_penalty"),
    ("length_penalty NaN", {"length_penalty": float("nan")}, "length_penalty"),
    ("min_tokens negative", {"min_tokens": -1}, "min_tokens"),
    ("min_length and min_tokens differ", {"min_tokens": 1, "min_length": 2}, "min_length"),
    ("seed and random_seed differ", {"seed": 1, "random_seed": 2}, "random_seed"),
    ("no sequences", {"num_return_sequences": 0}, "num_return_sequences"),
    ("too many sequences", {"num_return_sequences": 100_000}, "num_return_sequences"),
    ("beam search", {"beam_width": 4}, "beam_width"),
    ("beam_width 0", {"beam_width": 0}, "beam_width"),
    ("thousands of stop words", {"stop_words": WORDS}, "stop_words"),
    ("thousands of bad words", {"bad_words": WORDS}, "bad_words"),
    ("a huge stop word", {"stop_words": ["x" * 200_000]}, "stop_words"),
    ("stop word of invalid UTF-8", {"stop_words": [b"\xff"]}, "stop_words"),
    ("bias words without weights", {"embedding_bias_words": ["a"]}, "embedding_bias_weights"),
    ("bias lengths differ", {"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]}, "embedding_bias"),
    (
        "a huge bias word",
        {"embedding_bias_words": ["x" * 200_000], "embedding_bias_weights": [1.0]},
        "embedding_bias_words",
    ),
    ("bias NaN", {"embedding_bias_words": ["a"], "embedding_bias_weights": [float("nan")]}, "embedding_bias_weights"),
    ("unknown guide type", {"guided_decoding_guide_type": "yaml"}, "guided_decoding_guide_type"),
    ("guide without type", {"guided_decoding_guide": "{}"}, "guided_decoding_guide_type"),
    ("guided decoding", {"guided_decoding_guide_type": "json"}, "guided_decoding"),
    ("LoRA", {"lora_task_id": 1}, "lora_task_id"),
    ("context logits", {"return_context_logits": True}, "return_context_logits"),
    ("generation logits", {"return_generation_logits": True}, "return_generation_logits"),
    ("decoder prompt", {"decoder_text_input": "x"}, "decoder_text_input"),
    ("wrong type", {"max_tokens": np.array([[1.5]], dtype=np.float32)}, "max_tokens"),
    ("wrong shape", {"max_tokens": np.array([[1, 2]], dtype=np.int32)}, "max_tokens"),
    ("too many dimensions", {"max_tokens": np.array([[[1]]], dtype=np.int32)}, "max_tokens"),
    ("unknown tensor", {"max_tokenz": "5"}, "max_tokenz"),
    ("missing max_tokens", {"max_tokens": None}, "max_tokens"),
    ("missing prompt", {"text_input": None}, "text_input"),
]
# Errors that Triton itself finds count tensors instead of naming them, when one is missing.
TRITONS_OWN = {"missing max_tokens": "expected number of inputs", "missing prompt": "expected number of inputs"}


def inputs_of(change: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**GOOD, **change}.items() if value is not None}


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
@pytest.mark.parametrize(("name", "change", "named"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_refused_and_its_neighbour_answered(
    local_cpu: Any, model: str, name: str, change: dict[str, Any], named: str
) -> None:
    with opened(local_cpu, model, {**GOOD, "exclude_input_in_output": True}) as neighbour:
        with pytest.raises(InferenceServerException) as caught:
            ask_raw(local_cpu, model, inputs_of(change))
        message = str(caught.value)
        assert named in message or TRITONS_OWN.get(name, named) in message
        assert "Traceback" not in message
        assert [reply.text.strip() for reply in neighbour.replies()] == ["fine"]


def ask_raw(server: Any, model: str, inputs: dict[str, Any]) -> None:
    known = client.datatypes(server.grpc_url, model)
    made = []
    for name, value in inputs.items():
        array = client.tensor(value, known.get(name, "BYTES"))
        datatype = "FP32" if array.dtype == np.float32 else known.get(name, "BYTES")
        made.append(client.grpcclient.InferInput(name, list(array.shape), datatype))
        made[-1].set_data_from_numpy(array)
    with client.grpcclient.InferenceServerClient(server.grpc_url) as grpc:
        replies: client.queue.Queue[Any] = client.queue.Queue()
        grpc.start_stream(lambda result, error: replies.put(error))
        grpc.async_stream_infer(model, made)
        error = replies.get(timeout=30)
        grpc.stop_stream()
    if error is not None:
        raise error


def test_control_characters_are_text(local_cpu: Any) -> None:
    assert ask(local_cpu, "ensemble", text_input="\x00\x01\x7f\u2028", max_tokens=4)


def test_a_batch_over_the_limit_is_refused(local_cpu: Any) -> None:
    inputs = {
        "text_input": np.array([[b"x"]] * 65, dtype=np.object_),
        "max_tokens": np.full((65, 1), 4, dtype=np.int32),
    }
    with pytest.raises(InferenceServerException, match="batch"):
        ask(local_cpu, "tensorrt_llm_bls", **inputs)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"text_input": "x"}, "max_tokens"),
        ({"text_input": "", "max_tokens": 4}, "text_input"),
        ({"text_input": "x", "max_tokens": 4, "temperature": -1}, "temperature"),
    ],
)
@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
def test_http_errors_are_the_clients_fault_and_say_so(
    local_cpu: Any, model: str, body: dict[str, Any], named: str
) -> None:
    reply = generate(local_cpu, model, **body)
    assert reply.status_code == 400
    assert named in reply.json()["error"] or "expected number of inputs" in reply.json()["error"]


def test_a_call_of_postprocessing_that_would_keep_all_others_waiting_is_refused(local_cpu: Any) -> None:
    ids = np.full((1, 1, 2_000_000), 264, dtype=np.int32)
    inputs = {"TOKENS_BATCH": ids, "SEQUENCE_LENGTH": np.array([[ids.size]], dtype=np.int32)}
    with pytest.raises(InferenceServerException, match="TOKENS_BATCH: has 2000000 values"):
        ask(local_cpu, "postprocessing", **inputs)


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
def test_the_longest_timeout_harms_nobody(local_cpu: Any, model: str) -> None:
    with opened(local_cpu, model, {**GOOD, "exclude_input_in_output": True}) as neighbour:
        assert generate(local_cpu, model, **GOOD, timeout=2**63 - 1).status_code == 200
        assert [reply.text.strip() for reply in neighbour.replies()] == ["fine"]


def test_unknown_fields_of_generate_are_ignored(local_cpu: Any) -> None:
    reply = generate(local_cpu, "ensemble", **GOOD, nonsense=1, min_length=2)
    assert reply.status_code == 200
