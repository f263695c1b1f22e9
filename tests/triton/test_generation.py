"""From input tensors to engine requests: defaults, names of all generations of the contract, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import EngineInfo, ErrorCode, Feature, Request, Submit, encode
from roundhouse.text.stop_words import encode_word_list
from roundhouse.text.tokenizer import Tokenizer
from roundhouse.triton.fields import Fields, batch_of, deadline_of, timeout_of
from roundhouse.triton.generation import TENSORRT_LLM_NAMES, Generation, check_room, from_text, from_tokens

TINY = Path(__file__).parents[2] / "models/tiny"
TOKENIZER = Tokenizer.load(TINY)
INFO = EngineInfo(
    engine="test",
    version="1",
    model="tiny",
    vocab_size=TOKENIZER.vocab_size,
    max_seq_len=2048,
    max_batch_size=8,
    max_queue=8,
    tokens_per_block=32,
    max_blocks=512,
    lacks={Feature.BEAM_SEARCH: "this engine samples single sequences only", Feature.LORA: "it has no adapters"},
)


def tensor(value: Any) -> np.ndarray:
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], str | bytes):
        encoded = [item.encode() if isinstance(item, str) else item for item in values]
        return np.array(encoded, dtype=np.object_)
    return np.array(values)


def text(info: EngineInfo = INFO, **inputs: Any) -> Generation:
    arrays = {name: tensor(value) for name, value in {"text_input": "copy: a =", "max_tokens": 8, **inputs}.items()}
    return from_text(Fields(arrays), TOKENIZER, info, special_tokens=True, echo=True)


def tokens(*, ensemble: bool = False, **inputs: Any) -> Generation:
    arrays = {"input_ids": [5, 6, 7], "input_lengths": 3, "max_tokens": 8, **inputs}
    labels = {} if ensemble else TENSORRT_LLM_NAMES
    fields = Fields({name: tensor(value) for name, value in arrays.items()}, labels)
    return from_tokens(fields, TOKENIZER, INFO, ensemble=ensemble, echo=True)


def refusal(**inputs: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        text(**inputs)
    return caught.value


class TestDefaults:
    def test_a_prompt_alone_is_answered_greedily_with_its_echo(self) -> None:
        generation = text()
        assert generation.request.sampling.greedy
        assert generation.echo
        assert not generation.stream
        assert generation.request.end_ids == TOKENIZER.end_ids
        assert generation.request.prompt == tuple(TOKENIZER.encode("copy: a =", True))

    @pytest.mark.parametrize("given", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
    def test_any_sampling_setting_turns_sampling_on(self, given: dict[str, float]) -> None:
        assert not text(**given).request.sampling.greedy

    @pytest.mark.parametrize("unset", [{"top_p": 0.0}, {"top_p": -1.0}, {"top_k": 0}, {"top_k": 0, "top_p": 0.0}])
    def test_what_counts_as_unset_turns_no_sampling_on(self, unset: dict[str, float]) -> None:
        assert text(**unset).request.sampling == text().request.sampling

    def test_temperature_zero_is_greedy(self) -> None:
        assert text(temperature=0.0, top_p=0.9).request.sampling.greedy

    def test_a_stream_never_echoes(self) -> None:
        assert not text(stream=True).echo
        assert not text(exclude_input_in_output=True).echo

    def test_top_p_of_zero_or_less_counts_as_unset(self) -> None:
        for top_p in (0.0, -1.0):
            sampled = text(top_p=top_p, temperature=0.7).request.sampling
            assert sampled == text(temperature=0.7).request.sampling


class TestNames:
    @pytest.mark.parametrize(("old", "new"), [("min_length", "min_tokens"), ("random_seed", "seed")])
    def test_older_names_mean_the_same(self, old: str, new: str) -> None:
        assert text(**{old: 4}).request.sampling == text(**{new: 4}).request.sampling
        assert text(**{old: 4}).request.sampling != text().request.sampling

    def test_two_names_with_different_values_are_refused(self) -> None:
        assert refusal(seed=1, random_seed=2).message.startswith("seed=1 and random_seed=2 contradict")
        assert text(seed=3, random_seed=3).request.sampling.seed == 3

    def test_a_direct_request_is_told_its_own_tensor_names(self) -> None:
        with pytest.raises(RequestError, match=r"^runtime_top_p: nan is not allowed"):
            tokens(top_p=float("nan"))
        with pytest.raises(RequestError, match=r"^top_p: nan is not allowed"):
            tokens(ensemble=True, top_p=float("nan"))


class TestWords:
    @pytest.mark.parametrize("none", [{}, {"stop_words": ""}, {"stop_words": [""]}, {"stop_words": []}])
    def test_empty_and_absent_lists_mean_none(self, none: dict[str, Any]) -> None:
        assert text(**none).stop_words == ()

    def test_words_become_token_ids(self) -> None:
        assert text(stop_words=["end", ""]).stop_words == (tuple(TOKENIZER.encode("end", False)),)

    def test_a_word_list_tensor_gives_the_same_words_as_the_text(self) -> None:
        words = ["one", "two three", "🚂"]
        direct = tokens(stop_words=encode_word_list([words], TOKENIZER)[0].tolist())
        assert direct.stop_words == text(stop_words=words).stop_words

    def test_bias_adds_up_by_token(self) -> None:
        (token,) = TOKENIZER.encode("a", False)
        bias = text(embedding_bias_words=["a", "a"], embedding_bias_weights=[1.5, 2.0]).request.sampling.logit_bias
        assert bias == {token: 3.5}

    def test_mismatched_bias_lists_are_refused(self) -> None:
        assert "embedding_bias_weights" in refusal(embedding_bias_words=["a"]).message


class TestEndIds:
    def test_the_eos_id_stands_for_all_end_ids_in_the_ensemble(self) -> None:
        assert tokens(ensemble=True, end_id=TOKENIZER.eos_token_id).request.end_ids == TOKENIZER.end_ids
        assert len(TOKENIZER.end_ids) == 2

    def test_a_direct_request_gets_what_it_says(self) -> None:
        assert tokens().request.end_ids == ()
        assert tokens(end_id=TOKENIZER.eos_token_id).request.end_ids == (TOKENIZER.eos_token_id,)

    @pytest.mark.parametrize("end_id", [1048576, -1])
    def test_an_id_outside_the_vocabulary_never_ends(self, end_id: int) -> None:
        assert text(end_id=end_id).request.end_ids == ()


class TestRefusals:
    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"text_input": []}, "text_input: missing"),
            ({"text_input": ""}, "text_input: is empty"),
            ({"text_input": ["a", "b"]}, "text_input: has 2 values"),
            ({"text_input": b"ab\xff"}, "text_input: not valid UTF-8 (byte 0xff at position 2)"),
            ({"text_input": "a" * 10_000_000}, "text_input: 10000000 characters cannot fit"),
            ({"max_tokens": 0}, "max_tokens: 0 is not allowed"),
            ({"max_tokens": []}, "max_tokens: missing"),
            ({"max_tokens": 5000}, "prompt + max_tokens"),
            ({"temperature": float("inf")}, "temperature: inf is not allowed"),
            ({"temperature": -1.0}, "temperature: -1.0 is not allowed"),
            ({"top_k": -1}, "top_k: -1 is not allowed"),
            ({"top_p": 1.5}, "top_p: 1.5 is not allowed"),
            ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is not allowed"),
            ({"min_tokens": -1}, "min_tokens: -1 is not allowed"),
            ({"length_penalty": float("nan")}, "length_penalty: nan is not allowed"),
            ({"num_return_sequences": 0}, "num_return_sequences: 0 is not allowed"),
            ({"num_return_sequences": 1000}, "num_return_sequences: 1000 is not allowed"),
            ({"stop_words": ["x"] * 2000}, "stop_words: has 2000 words"),
            ({"bad_words": ["x" * 100_000]}, "bad_words: has 100000 characters"),
            ({"embedding_bias_words": ["a"], "embedding_bias_weights": [float("nan")]}, "embedding_bias_weights"),
            ({"embedding_bias_words": ["x" * 100_000]}, "embedding_bias_words: has 100000 characters"),
            ({"guided_decoding_guide_type": "yaml"}, "guided_decoding_guide_type: 'yaml' is not allowed"),
            ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide: missing"),
            ({"guided_decoding_guide": "{}"}, "guided_decoding_guide_type: missing"),
            ({"beam_width": 0}, "beam_width: 0 is not allowed"),
        ],
    )
    def test_bad_values_are_named(self, inputs: dict[str, Any], message: str) -> None:
        error = refusal(**inputs)
        assert error.message.startswith(message)
        assert error.code is ErrorCode.INVALID_ARGUMENT

    @pytest.mark.parametrize(
        "inputs",
        [
            {"beam_width": 2},
            {"return_context_logits": True},
            {"return_generation_logits": True},
            {"decoder_text_input": "x"},
            {"num_draft_tokens": 4},
        ],
    )
    def test_what_the_engine_lacks_is_refused_with_a_reason(self, inputs: dict[str, Any]) -> None:
        error = refusal(**inputs)
        assert error.code is ErrorCode.UNSUPPORTED
        assert error.message.startswith(next(iter(inputs)) + ": ")

    def test_a_bias_that_the_engine_lacks_is_not_tokenised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        info = msgspec.structs.replace(INFO, lacks={Feature.LOGIT_BIAS: "it emits tokens at a rate"})
        assert text(info, embedding_bias_words=[""]).request.sampling.logit_bias == {}
        monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("tokenised"))
        with pytest.raises(RequestError, match=r"^embedding_bias_words: it emits tokens at a rate") as caught:
            text(info, embedding_bias_words=["a"], embedding_bias_weights=[1.0])
        assert caught.value.code is ErrorCode.UNSUPPORTED

    @pytest.mark.parametrize(
        ("prompt", "max_tokens", "way_out"),
        [
            (2040, 10, "ask for at most 8 tokens"),
            (2048, 10, "shorten the prompt to 2038 tokens or less"),
            (2048, 2047, "shorten the prompt to 1 tokens or less"),
            (2048, 2048, "shorten the prompt, and ask for fewer max_tokens"),
        ],
    )
    def test_a_prompt_that_does_not_fit_is_told_what_would(self, prompt: int, max_tokens: int, way_out: str) -> None:
        with pytest.raises(RequestError) as caught:
            tokens(input_ids=[5] * prompt, input_lengths=prompt, max_tokens=max_tokens)
        assert caught.value.message == (
            f"prompt + max_tokens: {prompt} + {max_tokens} tokens exceed max_seq_len 2048; {way_out}"
        )

    @pytest.mark.parametrize(("ensemble", "sent"), [(True, "text_input"), (False, "input_lengths")])
    def test_a_prompt_that_is_too_long_is_named_as_it_was_sent(self, ensemble: bool, sent: str) -> None:
        with pytest.raises(RequestError) as caught:
            tokens(ensemble=ensemble, input_ids=[5] * 2049, input_lengths=2049)
        assert caught.value.message == (
            f"{sent}: the prompt's 2049 tokens do not fit into max_seq_len 2048; shorten the prompt"
        )

    def test_adapters_are_named_by_id_and_sent_only_where_the_engine_takes_them(self) -> None:
        info = msgspec.structs.replace(INFO, lacks={Feature.LORA_WEIGHTS: "adapters are those of the deployment"})
        assert text(info, lora_task_id=7).request.lora_id == 7
        assert text(info).request.lora_id == 0
        for inputs, message in (
            ({"lora_task_id": 0}, "lora_task_id: 0 is not allowed"),
            ({"lora_weights": [[0.5]]}, "lora_weights: adapters are those of the deployment"),
        ):
            with pytest.raises(RequestError) as caught:
                text(info, **inputs)
            assert caught.value.message.startswith(message)

    @pytest.mark.parametrize("length", [0, 4, -1])
    def test_input_lengths_stay_within_the_ids(self, length: int) -> None:
        with pytest.raises(RequestError, match=r"^input_lengths"):
            tokens(input_lengths=length)

    def test_the_embedding_bias_has_the_width_of_the_vocabulary(self) -> None:
        with pytest.raises(RequestError, match=r"^embedding_bias: has 3 values"):
            tokens(embedding_bias=[0.0, 1.0, 2.0])


class TestSequences:
    def test_a_seed_counts_up_and_no_seed_stays_none(self) -> None:
        generation = text(num_return_sequences=3, seed=2**64 - 2, temperature=1.0)
        assert [request.sampling.seed for request in generation.engine_requests()] == [2**64 - 2, 2**64 - 1, 0]
        unseeded = text(num_return_sequences=2, temperature=1.0)
        assert [request.sampling.seed for request in unseeded.engine_requests()] == [None, None]

    def test_more_than_the_engine_can_hold_are_refused_as_the_engine_would(self) -> None:
        room = INFO.max_batch_size + INFO.max_queue
        check_room([text(num_return_sequences=room - 1), None, text()], INFO)
        with pytest.raises(
            RequestError, match=r"^Exceeds maximum queue size of 8 waiting requests: .* 17 seq"
        ) as caught:
            check_room([text(num_return_sequences=room - 1), None, text(), text()], INFO)
        assert caught.value.code is ErrorCode.QUEUE_FULL


class TestDeadlines:
    def test_a_timeout_is_of_microseconds(self) -> None:
        assert deadline_of(5, timeout_of(7, None)) == 7005
        assert deadline_of(5, timeout_of(0, None)) == 0

    def test_the_longest_timeout_is_a_time_that_the_engine_can_be_told(self) -> None:
        deadline = deadline_of(10**15, timeout_of(0, 2**63 - 1))
        assert deadline > 10**18
        assert encode(Submit([Request(id=1, prompt=(5,), max_tokens=1, deadline_ns=deadline)]))


class TestBatch:
    @pytest.mark.parametrize("shape", [(2,), (2, 1)])
    def test_strings_keep_what_numpy_takes_for_padding(self, shape: tuple[int, ...]) -> None:
        """`cache_salt` would be another's."""
        batch = batch_of({"cache_salt": np.array([b"ab\0", b"ab"], dtype=np.object_).reshape(shape)})
        assert [fields.string("cache_salt") for fields in batch] == ["ab\0", "ab"]

    def test_rows_are_split(self) -> None:
        first, second = batch_of({"a": np.array([[1], [2]]), "b": np.array([3, 4])})
        assert (first.integer("a"), first.integer("b")) == (1, 3)
        assert (second.integer("a"), second.integer("b")) == (2, 4)

    def test_uneven_batches_are_refused(self) -> None:
        with pytest.raises(RequestError, match=r"^b: has a batch of 1, other inputs have 2"):
            batch_of({"a": np.array([[1], [2]]), "b": np.array([3])})
