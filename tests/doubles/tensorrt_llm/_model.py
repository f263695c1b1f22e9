"""What computes the stand-in's tokens: our embedded engine, with what TensorRT-LLM has and it has not.

Beyond the embedded engine: penalties may count the prompt (TensorRT-LLM counts all of it unless
`prompt_ignore_length` says otherwise), and a guide may forbid tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer

from roundhouse.engine.embedded.config import EmbeddedConfig
from roundhouse.engine.embedded.engine import EmbeddedEngine
from roundhouse.engine.scheduler import Sequence

_FIELD = r'"[^"\\]{0,20}"\s*:\s*("[^"\\]{0,20}"|-?\d{1,6}|true|false|null)\s*'
JSON = rf"\{{\s*({_FIELD},\s*){{0,3}}({_FIELD})?\}}"  # of the flat and short kind


class Vocabulary:
    """The text of each token, as the executor was told by GuidedDecodingConfig."""

    def __init__(self, encoded_vocab: list[str], tokenizer_str: str, stop_token_ids: list[int]) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_str)
        self.size = len(encoded_vocab)
        self.stop = stop_token_ids

    def text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class Guide:
    """Which tokens may follow: those with which the answer can still become a match of the pattern."""

    empty = False

    def __init__(self, pattern: str, vocabulary: Vocabulary, inner: Any) -> None:
        self._pattern = regex.compile(pattern)
        self._vocabulary = vocabulary
        self._inner = inner

    def edits(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        ids, values = self._inner.edits(sequence)
        answer = sequence.tokens[sequence.prompt_len :]
        forbidden = [token for token in range(self._vocabulary.size) if not self._allows(answer, token)]
        return (
            np.concatenate([ids, np.array(forbidden, dtype=np.int64)]),
            np.concatenate([values, np.full(len(forbidden), -np.inf, dtype=np.float32)]),
        )

    def _allows(self, answer: list[int], token: int) -> bool:
        before = self._vocabulary.text(answer)
        if token in self._vocabulary.stop:
            return self._pattern.fullmatch(before) is not None
        text = self._vocabulary.text([*answer, token])
        return len(text) > len(before) and self._pattern.fullmatch(text, partial=True) is not None


class Model(EmbeddedEngine):
    """`guides`, `ignored`: request id -> guide pattern, and prompt tokens that penalties are not to count."""

    def __init__(self, config: EmbeddedConfig, vocabulary: Vocabulary | None) -> None:
        super().__init__(config)
        self.vocabulary = vocabulary
        self.guides: dict[int, str] = {}
        self.ignored: dict[int, int] = {}
        sampler: Any = self._sampler
        start = sampler._start

        def starts(sequence: Sequence) -> None:
            start(sequence)
            number, slot = sequence.request.id, sequence.slot
            if number in self.ignored:
                sampler._settings["prompt"][slot] = min(self.ignored.pop(number), sequence.prompt_len)
            if number in self.guides and vocabulary is not None:
                inner = sampler._rules[slot] or _Nothing()
                sampler._rules[slot] = Guide(self.guides.pop(number), vocabulary, inner)
                sampler._settings["plain"][slot] = False

        sampler._start = starts


class _Nothing:
    def edits(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
