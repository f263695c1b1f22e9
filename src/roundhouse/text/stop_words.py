"""Stop words, bad words and biased words: their tensors, and where a stop word ends an answer.

A word list is INT32 `[2, L]`: row 0 the token ids of all words, flat, zero padded; row 1 the END offset of each word in
row 0, padded with -1. Words of 2 and 3 tokens: `[[a, b, c, d, e], [2, 5, -1, -1, -1]]`.

An answer ends with the first token after which its ids end with the ids of a stop word, or its text contains the text
of one that it did not contain before. The second rule makes stop words independent of how the model happens to cut its
text into tokens; the first covers words with special tokens, which have no text: what the decoder makes of the rest of
such a word would be another word. The stop word stays in the answer, what follows the token that completes it is
dropped. Tokens are looked at one by one: the chunks in which they come do not matter.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt

from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.tokenizer import Tokenizer

_CACHED_WORD_LENGTH = 64  # characters; bounds the memory that clients can fill through the cache
_REPLACEMENT = "\ufffd"


def encode_word_list(words: Sequence[Sequence[str]], tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Word lists of a batch of B requests as INT32 `[B, 2, L]`, L the longest flat list, at least 1.

    Empty strings, and words without any token, are skipped. A batch that gives no string at all has shape `[B, 2, 0]`.
    """
    if not any(words):
        return np.empty((len(words), 2, 0), dtype=np.int32)
    rows = [[ids for word in row if (ids := word_ids(word, tokenizer))] for row in words]
    length = max(1, *(sum(map(len, row)) for row in rows))
    tensor = np.zeros((len(rows), 2, length), dtype=np.int32)
    tensor[:, 1] = -1
    for (flat, ends), row in zip(tensor, rows, strict=True):
        end = 0
        for number, ids in enumerate(row):
            flat[end : end + len(ids)] = ids
            end += len(ids)
            ends[number] = end
    return tensor


def decode_word_list(array: npt.NDArray[np.int32], name: str) -> list[list[int]]:
    """Token ids of each word of an INT32 `[2, L]` word list; `[]` for L = 0 and for offsets that are all -1.

    Raises:
        ValueError: not such a list; the message begins with `name`, the tensor's name.
    """
    if array.ndim != 2 or array.shape[0] != 2:
        raise ValueError(f"{name} has shape {list(array.shape)}, expected [2, L]: token ids over their end offsets")
    ids, ends = array.tolist()
    while ends and ends[-1] == -1:
        ends.pop()
    words = []
    start = 0
    for number, end in enumerate(ends):
        if not start < end <= len(ids):
            raise ValueError(
                f"{name}: end offset {number} is {end}, expected more than {start} and at most {len(ids)}; "
                "offsets rise strictly, and -1 only pads the end of their row"
            )
        word = ids[start:end]
        if min(word) < 0:
            raise ValueError(f"{name}: word {number} holds the token id {min(word)}, expected ids from 0 on")
        words.append(word)
        start = end
    return words


def embedding_bias(
    words: Sequence[str], weights: Sequence[float], tokenizer: Tokenizer, vocab_size: int
) -> npt.NDArray[np.float32]:
    """Logit bias FP32 `[vocab_size]` that adds each word's weight to every token id of the word; `[0]` without words.

    `vocab_size`: width of the model's logits. Empty words are skipped.

    Raises:
        ValueError: not one weight for each word, or a word with an id that the model does not have.
    """
    if len(words) != len(weights):
        raise ValueError(
            f"embedding_bias_words has {len(words)} entries and embedding_bias_weights has {len(weights)}: "
            "give one weight for each word"
        )
    encoded = [(word, word_ids(word, tokenizer), weight) for word, weight in zip(words, weights, strict=True) if word]
    if not encoded:
        return np.empty(0, dtype=np.float32)
    bias = np.zeros(vocab_size, dtype=np.float32)
    for word, ids, weight in encoded:
        if max(ids, default=0) >= vocab_size:
            raise ValueError(
                f"embedding_bias_words: {word!r} holds the token id {max(ids)}, "
                f"but the ids of the model end at {vocab_size - 1}"
            )
        for token_id in ids:
            bias[token_id] += weight
    return bias


def word_ids(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of `word`, without special tokens around it. Short words are cached: requests repeat the same few."""
    return _cached_word_ids(word, tokenizer) if len(word) <= _CACHED_WORD_LENGTH else _word_ids(word, tokenizer)


def _word_ids(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(word, add_special_tokens=False))


_cached_word_ids = lru_cache(maxsize=4096)(_word_ids)


class StopMatcher:
    """Looks for stop words in one stream: give it every chunk in order, until it finds one."""

    def __init__(self, words: Sequence[Sequence[int]], detokenizer: Detokenizer, min_tokens: int = 0) -> None:
        """`words`: token ids of each stop word, as `decode_word_list` gives them; none of them empty.

        `min_tokens`: a word that is complete before the answer has this many tokens does not end it.
        """
        self._detokenizer = detokenizer
        self._min_tokens = min_tokens
        self._words = [list(word) for word in words]
        texts = [detokenizer.text(word) for word in words if not any(map(detokenizer.skips, word))]
        # A U+FFFD stands for part of a character: such a word is a matter of ids alone.
        self._texts = [text for text in texts if text and _REPLACEMENT not in text]
        self._longest_word = max(map(len, self._words), default=0)
        self._longest_text = max(map(len, self._texts), default=0)
        self._start()

    def another(self) -> Self:
        """For one more answer with the same words: they are not decoded again."""
        matcher = copy.copy(self)
        matcher._start()
        return matcher

    def _start(self) -> None:
        self._count = 0
        self._ids: list[int] = []  # the last ids
        self._window: list[int] = []  # the detokenizer's
        self._settled = ""  # the end of the settled text
        self._unsettled = ""  # the text behind it, if the answer had ended where it last had a whole character

    def find(self, new: Sequence[int]) -> int | None:
        """Index within `new` of the token that ends the answer (`new[: index + 1]` belongs to it), or None."""
        for index, token_id in enumerate(new):
            self._count += 1
            ids_match = self._ids_complete_a_word(token_id)
            text_matches = self._text_completes_a_word(token_id)
            if (ids_match or text_matches) and self._count >= self._min_tokens:
                return index
        return None

    def _ids_complete_a_word(self, token_id: int) -> bool:
        ids = self._ids
        ids.append(token_id)
        if len(ids) > self._longest_word:
            del ids[0]
        return any(word[-1] == token_id and ids[-len(word) :] == word for word in self._words)

    def _text_completes_a_word(self, token_id: int) -> bool:
        if not self._texts:
            return False
        new = (token_id,)
        added = self._detokenizer.chunk_text(self._window, new, final=False)
        # As if the answer ended here: a character or a run of byte tokens that is complete must not wait for the next.
        behind = self._detokenizer.chunk_text(self._window, new, final=True)
        self._window = self._detokenizer.next_window(self._window, new)
        text = self._settled + behind
        # What was there after an earlier token was looked at then: a word that this token completes ends behind it.
        seen = len(self._settled) + _common_prefix(self._unsettled, behind)
        unsettled = behind[len(added) :]
        if added or not unsettled.endswith(_REPLACEMENT):
            self._unsettled = unsettled
        self._settled = (self._settled + added)[-self._longest_text :]
        if self._detokenizer.incremental and len(self._window) > 8 * self._longest_text + 64:
            self._shorten_window()
        return any(text.find(word, max(0, seen - len(word) + 1)) >= 0 for word in self._texts)

    def _shorten_window(self) -> None:
        """Forget the start of a long run of byte tokens: no word reaches back there, and each look decodes the run."""
        shortest = 4 * (self._longest_text + 1)  # a character has at most 4 bytes
        for size in range(shortest, shortest + 4):
            run = self._window[-size:]
            if self._detokenizer.window(run) == run:  # it begins with a character, not inside one
                text = self._detokenizer.text(run)
                if not text.endswith(_REPLACEMENT):
                    self._window, self._settled, self._unsettled = run, "", text
                return


def _common_prefix(left: str, right: str) -> int:
    """Number of characters that both begin with."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
