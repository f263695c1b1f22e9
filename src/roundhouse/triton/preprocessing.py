"""The model `preprocessing`: prompts and words to token ids. The first step of the ensemble."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from roundhouse.bugs import described
from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import Error, ErrorCode
from roundhouse.text.stop_words import encode_word_list
from roundhouse.triton import backend
from roundhouse.triton.fields import Array, Fields, batch_of
from roundhouse.triton.generation import biased_words, prompt_text, words_of
from roundhouse.triton.model import Settings

# Field name -> tensor name of this model; messages use the ensemble's names, which are the field names.
_FIELDS = {
    "QUERY": "text_input",
    "REQUEST_OUTPUT_LEN": "max_tokens",
    "DECODER_QUERY": "decoder_text_input",
    "BAD_WORDS_DICT": "bad_words",
    "STOP_WORDS_DICT": "stop_words",
    "EMBEDDING_BIAS_WORDS": "embedding_bias_words",
    "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
    "END_ID": "end_id",
    "PAD_ID": "pad_id",
}


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        settings = Settings(args)
        self._special_tokens = settings.flag("add_special_tokens")
        self._tokenizer = settings.tokenizer(encodes=True)
        config = _model_config(Path(settings.deployment.model.path))
        self._max_seq_len: int | None = settings.deployment.limits.max_seq_len or config.get("max_position_embeddings")
        self._vocab_size: int = config.get("vocab_size") or self._tokenizer.vocab_size

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            tensors = {_FIELDS.get(name, name): array for name, array in backend.inputs(request).items()}
            return backend.response(self._outputs(batch_of(tensors), tensors["max_tokens"]))
        except RequestError as error:
            return backend.refusal(error.as_error())
        except Exception as error:
            backend.log_warning(f"unexpected error with a request: {described(error)}")
            return backend.refusal(Error(ErrorCode.INTERNAL, f"unexpected error: {error}"))

    def _outputs(self, batch: list[Fields], max_tokens: Array) -> dict[str, Array]:
        """Every output: words and bias `[B, ...]`, INPUT_ID `[B, L]` padded to the longest, the rest `[B, 1]`."""
        if any(fields.string("decoder_text_input") for fields in batch):
            raise RequestError(
                ErrorCode.UNSUPPORTED, "decoder_text_input: the model is decoder-only: put the text into text_input"
            )
        texts = [prompt_text(fields, "text_input", self._tokenizer, self._max_seq_len) for fields in batch]
        prompts = [self._tokenizer.encode(text, self._special_tokens) for text in texts]
        end_ids = [self._end_id(fields) for fields in batch]
        pad_ids = [self._pad_id(fields) for fields in batch]
        return {
            "INPUT_ID": _padded(prompts, pad_ids),
            "REQUEST_INPUT_LEN": np.array([[len(prompt)] for prompt in prompts], dtype=np.int32),
            "DECODER_INPUT_ID": np.array([[pad] for pad in pad_ids], dtype=np.int32),
            "REQUEST_DECODER_INPUT_LEN": np.ones((len(batch), 1), dtype=np.int32),
            "BAD_WORDS_IDS": self._words(batch, "bad_words"),
            "STOP_WORDS_IDS": self._words(batch, "stop_words"),
            "EMBEDDING_BIAS": self._bias(batch),
            "REQUEST_OUTPUT_LEN": max_tokens,
            "OUT_END_ID": np.array([[end] for end in end_ids], dtype=np.int32),
            "OUT_PAD_ID": np.array([[pad] for pad in pad_ids], dtype=np.int32),
            "ACKNOWLEDGE": np.ones((len(batch), 1), dtype=np.bool_),
        }

    def _end_id(self, fields: Fields) -> int:
        end_id = fields.integer("end_id")
        if end_id is not None:
            return end_id
        return -1 if self._tokenizer.eos_token_id is None else self._tokenizer.eos_token_id

    def _pad_id(self, fields: Fields) -> int:
        pad_id = fields.integer("pad_id")
        return self._tokenizer.pad_token_id if pad_id is None else pad_id

    def _words(self, batch: list[Fields], name: str) -> Array:
        for fields in batch:
            words_of(fields, name, self._tokenizer)  # the limits
        return encode_word_list([fields.strings(name) for fields in batch], self._tokenizer)

    def _bias(self, batch: list[Fields]) -> Array:
        """FP32 `[B, vocab]`, or `[B, 0]` if no prompt of the batch has any."""
        rows = [biased_words(fields, self._tokenizer, self._vocab_size) for fields in batch]
        width = max(row.size for row in rows)
        bias = np.zeros((len(rows), width), dtype=np.float32)
        for number, row in enumerate(rows):
            bias[number, : row.size] = row
        return bias


def _padded(prompts: list[list[int]], pad_ids: list[int]) -> Array:
    padded = np.empty((len(prompts), max(map(len, prompts))), dtype=np.int32)
    for row, prompt, pad in zip(padded, prompts, pad_ids, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) :] = pad
    return padded


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}
