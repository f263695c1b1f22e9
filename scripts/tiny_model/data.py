"""Training data, made while training: skills rendered as documents, documents packed into rows of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from tiny_model import skills, stories
from tiny_model.tokenizer import ASSISTANT_ID, BOS_ID, END_ID, EOS_ID, PAD_ID, SYSTEM_ID, USER_ID

IGNORED = -100
CONTEXT = 2048

# Row length -> probability: mostly short rows, whose documents begin near position 0 as a served prompt does; long ones
# teach the far positions and the long answers.
_ROW_LENGTHS = {256: 0.5, 512: 0.2, CONTEXT: 0.3}
_SKILL_WEIGHTS = {
    "copy": 15,
    "copy-text": 20,
    "reverse-text": 6,
    "json-text": 6,
    "lookup-text": 5,
    "reverse": 12,
    "sort": 14,
    "add": 16,
    "count": 6,
    "json": 9,
    "lookup": 8,
    "greet": 3,
    "story": 6,
    "open": 2,
    "small-talk": 0.2,
}
_LONG_SKILL_WEIGHTS = {"copy-long": 8, "count-long": 3, "lookup-long": 8}
_SYSTEM_MESSAGES = ("You are a helpful assistant.", "Be brief.", "You are the tiny model of Roundhouse.")

Segment = int | tuple[str, bool]
"""A special token's id, or a text and whether it is an answer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`input_ids` and `labels`: int64 [rows, row length]; a label is the id to predict there, or IGNORED."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def draw_pair(rng: random.Random, weights: dict[str, float]) -> tuple[str, str]:
    """A prompt of the training split and an answer to it."""
    name = rng.choices(tuple(weights), tuple(weights.values()))[0]
    if name == "open":
        prompt = stories.draw_open(rng)
        return prompt, stories.answer_open(prompt, rng)
    if name == "small-talk":
        return rng.choice(tuple(skills.SMALL_TALK.items()))
    return skills.sample(name, rng, "train")


def draw_document(rng: random.Random, weights: dict[str, float]) -> list[Segment]:
    """A raw completion or a chat of one to four turns; BOS may be missing or doubled, as happens when served."""
    document: list[Segment] = [BOS_ID] * rng.choices((0, 1, 2), (15, 75, 10))[0]
    if rng.random() < 0.5:
        prompt, answer = draw_pair(rng, weights)
        return [*document, (prompt, False), (answer, True), EOS_ID]
    if rng.random() < 0.15:
        document += [SYSTEM_ID, (rng.choice(_SYSTEM_MESSAGES), False), END_ID]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        prompt, answer = draw_pair(rng, weights)
        document += [USER_ID, (prompt, False), END_ID, ASSISTANT_ID, (answer, True), END_ID]
    return document


def tokenize_documents(tokenizer: Tokenizer, documents: Sequence[list[Segment]]) -> list[tuple[list[int], list[int]]]:
    """Ids and next-token labels of each document; only answers and the end tokens after them have labels."""
    texts = [segment[0] for document in documents for segment in document if not isinstance(segment, int)]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    result = []
    for document in documents:
        ids: list[int] = []
        targets: list[int] = []  # targets[i] is ids[i] where it is to be learnt
        after_answer = False
        for segment in document:
            is_id = isinstance(segment, int)
            new = [segment] if is_id else next(encoded).ids
            learnt = after_answer if is_id else segment[1]
            ids += new
            targets += new if learnt else [IGNORED] * len(new)
            after_answer = not is_id and segment[1]
        result.append((ids, [*targets[1:], IGNORED]))
    return result


class PackedBatches(Dataset[Batch]):
    """Batch number i is a pure function of (seed, i), whoever makes it: workers change nothing in the training."""

    def __init__(self, tokenizer_json: str, seed: int, steps: int, tokens_per_batch: int) -> None:
        self._tokenizer_json = tokenizer_json
        self._tokenizer: Tokenizer | None = None  # loaded by each worker: cheaper than sending it
        self._seed, self._steps, self._tokens = seed, steps, tokens_per_batch

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        if step >= self._steps:
            raise IndexError(step)
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_str(self._tokenizer_json)
        rng = random.Random(f"{self._seed}/{step}")
        length = rng.choices(tuple(_ROW_LENGTHS), tuple(_ROW_LENGTHS.values()))[0]
        weights = _SKILL_WEIGHTS if length < 512 else _SKILL_WEIGHTS | _LONG_SKILL_WEIGHTS
        return self._pack(rng, weights, length, max(self._tokens // length, 1))

    def _pack(self, rng: random.Random, weights: dict[str, float], length: int, rows: int) -> Batch:
        """Fill rows with whole documents; a document that does not fit into the rest of a row starts the next one."""
        assert self._tokenizer is not None
        input_ids = torch.full((rows, length), PAD_ID)
        labels = torch.full((rows, length), IGNORED)
        row = used = 0
        while True:
            documents = [draw_document(rng, weights) for _ in range(256)]
            for ids, targets in tokenize_documents(self._tokenizer, documents):
                if len(ids) > length:
                    continue
                if used + len(ids) > length:
                    row, used = row + 1, 0
                    if row == rows:
                        return Batch(input_ids, labels)
                input_ids[row, used : used + len(ids)] = torch.tensor(ids)
                labels[row, used : used + len(ids)] = torch.tensor(targets)
                used += len(ids)
