"""Choosing the next tokens: one row of logits a sequence, all rows in one call.

The order of operations: repetition penalty, then presence and frequency penalty, then logit bias, then what is
forbidden (bad words; end ids before min_tokens); then temperature, top_k, top_p (each on what the one before left).

A log probability is that of the model's own distribution: the log softmax of its logits before all of the above.

The noise of a request comes from its seed and the number of tokens it has generated, and from nothing else: what
shares the batch with it does not matter. A top_k or top_p whose border falls between equal logits keeps them all.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numba
import numpy as np
from numba import prange

from roundhouse.engine.embedded.kernels import JIT, Array, exp_negative, f32, i32
from roundhouse.engine.protocol import Request, Sampling
from roundhouse.engine.scheduler import Sequence

SETTINGS = np.dtype(
    [
        ("temperature", np.float32),  # 0: greedy
        ("top_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("top_k", np.int32),
        ("prompt", np.int32),  # tokens of the history that were given
        ("length", np.int32),  # tokens of the history; 0 if no penalty needs it
        ("plain", np.bool_),  # greedy, nothing else: argmax will do
        ("log_probs", np.bool_),
        ("seed", np.uint64),
        ("drawn", np.uint64),  # tokens generated so far
    ]
)
# where NaN or infinity can occur; fastmath would allow LLVM to assume that they do not
_STRICT: dict[str, Any] = {**JIT, "fastmath": False}
_CHUNK = 256
_FORBIDDEN = f32(-1e30)
_FAINTEST = f32(-80)  # logits this far below the highest have probability 0


class Sampler:
    """Args:
    max_batch_size: slots.
    max_seq_len: longest history that penalties look at.
    vocab_size: columns of the logits.
    """

    def __init__(self, max_batch_size: int, max_seq_len: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._settings = np.zeros(max_batch_size, dtype=SETTINGS)
        self._history = np.zeros((max_batch_size, max_seq_len), dtype=np.int32)
        self._rules: list[_Rules | None] = [None] * max_batch_size

    def choose(self, logits: Array, sequences: list[Sequence]) -> tuple[list[int], list[float] | None]:
        """The next token of each sequence and, if one of them asked, the tokens' log probabilities.

        Args:
            logits: float32 [rows, vocab], a row for each of `sequences`; overwritten.

        Returns:
            Token ids, -1 where no logit of the row is finite; log probabilities, 0 in rows that did not ask.
        """
        for sequence in sequences:
            if not sequence.generated:
                self._start(sequence)
        slots = np.fromiter((sequence.slot for sequence in sequences), dtype=np.int64, count=len(sequences))
        settings = self._settings[slots]
        if settings["plain"].all():
            best = logits.argmax(axis=1)
            finite = np.isfinite(logits[np.arange(len(best)), best])
            return np.where(finite, best, -1).tolist(), None
        tokens, log_probs = _choose(logits, settings, self._history, slots, *self._edits(sequences))
        self._settings["drawn"][slots] += 1
        self._remember(slots, tokens)
        return tokens.tolist(), log_probs.tolist() if settings["log_probs"].any() else None

    def warm_up(self) -> None:
        """Compile the kernel, or load it from numba's cache, before the first request pays for it."""
        request = Request(0, (0,), 1, log_probs=True)
        self.choose(np.zeros((1, self._vocab_size), dtype=np.float32), [Sequence(request, [0], slot=0)])

    def _start(self, sequence: Sequence) -> None:
        sampling, request = sequence.request.sampling, sequence.request
        penalised = _penalised(sampling)
        rules = _Rules(sequence, self._vocab_size)
        self._rules[sequence.slot] = None if rules.empty else rules
        if penalised:
            self._history[sequence.slot, : sequence.prompt_len] = request.prompt
        self._settings[sequence.slot] = (
            0 if sampling.greedy else sampling.temperature,
            sampling.top_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            min(sampling.top_k, 2**31 - 1),
            sequence.prompt_len,
            sequence.prompt_len if penalised else 0,
            sampling.greedy and not penalised and rules.empty and not request.log_probs,
            request.log_probs,
            int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed,
            0,
        )

    def _remember(self, slots: Array, tokens: Array) -> None:
        lengths = self._settings["length"][slots]
        kept = (lengths > 0) & (lengths < self._history.shape[1])
        self._history[slots[kept], lengths[kept]] = np.maximum(tokens[kept], 0)
        self._settings["length"][slots[kept]] += 1

    def _edits(self, sequences: list[Sequence]) -> tuple[Array, Array, Array]:
        """What is added to which logits: row borders int64 [rows + 1], token ids int64 [n], values float32 [n]."""
        borders, ids, values = [0], [], []
        for sequence in sequences:
            rules = self._rules[sequence.slot]
            count = 0
            if rules is not None:
                some_ids, some_values = rules.edits(sequence)
                ids.append(some_ids)
                values.append(some_values)
                count = len(some_ids)
            borders.append(borders[-1] + count)
        return (
            np.array(borders, dtype=np.int64),
            np.concatenate([*ids, np.empty(0, np.int64)]),
            np.concatenate([*values, np.empty(0, np.float32)]),
        )


def top_log_probs(logits: Array, sequences: list[Sequence]) -> dict[int, list[tuple[int, float]]]:
    """The likeliest tokens in the place of those that are chosen next, with their log probabilities.

    Args:
        logits: float32 [rows, vocab], a row for each of `sequences`, before `choose` has overwritten them.

    Returns:
        For each row whose request asks: token ids and values, likeliest first.
    """
    top = {}
    for index, sequence in enumerate(sequences):
        count = min(sequence.request.top_log_probs, logits.shape[1])
        if count:
            row = logits[index].astype(np.float64)
            row -= row.max()
            row -= math.log(np.exp(row).sum())
            ids = np.argpartition(-row, count - 1)[:count]
            ids = ids[np.argsort(-row[ids], kind="stable")]
            top[index] = list(zip(ids.tolist(), row[ids].tolist(), strict=True))
    return top


def _penalised(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


class _Rules:
    """What one request adds to its logits: its bias, and minus infinity for what is forbidden at its next token."""

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        request, sampling = sequence.request, sequence.request.sampling
        banned = [word[0] for word in sampling.bad_words if len(word) == 1]
        self._ids = np.array([*sampling.logit_bias, *banned], dtype=np.int64)
        self._values = np.array([*sampling.logit_bias.values(), *[-math.inf] * len(banned)], dtype=np.float32)
        self._phrases = [word for word in sampling.bad_words if len(word) > 1]
        self._min_tokens = sampling.min_tokens
        self._ends = [token for token in request.end_ids if 0 <= token < vocab_size] if sampling.min_tokens else []
        self.empty = not (len(self._ids) or self._phrases or self._ends)

    def edits(self, sequence: Sequence) -> tuple[Array, Array]:
        # a phrase may begin in the prompt, as in transformers and TensorRT-LLM
        tokens = sequence.tokens
        now = [phrase[-1] for phrase in self._phrases if tuple(tokens[-(len(phrase) - 1) :]) == phrase[:-1]]
        if sequence.generated < self._min_tokens:
            now += self._ends
        if not now:
            return self._ids, self._values
        return (
            np.concatenate([self._ids, np.array(now, dtype=np.int64)]),
            np.concatenate([self._values, np.full(len(now), -math.inf, dtype=np.float32)]),
        )


@numba.njit(inline="always", **JIT)  # type: ignore[untyped-decorator]
def _mix(z: Any) -> Any:
    """The finaliser of splitmix64: every bit of the result depends on every bit of `z`."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(inline="always", **JIT)  # type: ignore[untyped-decorator]
def _uniform(seed: Any, drawn: Any) -> Any:
    """A float64 in [0, 1), a pure function of both."""
    z = _mix(_mix(seed + np.uint64(0x9E3779B97F4A7C15)) + drawn * np.uint64(0x9E3779B97F4A7C15))
    return np.float64(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(**_STRICT)  # type: ignore[untyped-decorator]
def _penalise(row: Any, history: Any, setting: Any) -> None:
    counts = np.zeros(row.shape[0], i32)
    for i in range(setting["prompt"], setting["length"]):
        counts[history[i]] += i32(1)
    for i in range(setting["length"]):
        token = history[i]
        count = counts[token]
        if count < 0:  # seen: penalised already
            continue
        counts[token] = i32(-1)
        value = row[token]
        value = value / setting["repetition"] if value > 0 else value * setting["repetition"]
        value -= setting["frequency"] * f32(count)
        if count > 0:
            value -= setting["presence"]
        row[token] = value


@numba.njit(**JIT)  # type: ignore[untyped-decorator]
def _border(row: Any, weights: Any, wanted: Any, lowest: Any) -> Any:
    """The highest value at which those of `row` (all <= 0) from it upwards weigh `wanted`, or `lowest`.

    Bisects over the bits of a float, whose order is that of the floats: exact after 31 rounds, and nothing is sorted.
    """
    low, high = i32(0), f32(-lowest).view(i32)
    while low < high:
        middle = i32((low + high) >> 1)
        border = -middle.view(f32)
        weight = f32(0)
        for i in range(row.shape[0]):
            weight += weights[i] if row[i] >= border else f32(0)
        if weight >= wanted:
            high = middle
        else:
            low = i32(middle + 1)
    return -i32(high).view(f32)


@numba.njit(**JIT)  # type: ignore[untyped-decorator]
def _probabilities(row: Any, border: Any, out: Any) -> Any:
    """exp(row) where row >= border, 0 elsewhere, into `out`; returns the sum of `out` in float64."""
    mass: Any = 0.0
    for start in range(0, row.shape[0], _CHUNK):
        part = f32(0)
        for i in range(start, min(start + _CHUNK, row.shape[0])):
            out[i] = exp_negative(row[i]) if row[i] >= border else f32(0)
            part += out[i]
        mass += part
    return mass


@numba.njit(**JIT)  # type: ignore[untyped-decorator]
def _draw(row: Any, setting: Any) -> Any:
    """A token from the softmax of `row`, whose highest value is 0, cut down by top_k and top_p."""
    weights: Any = np.ones(row.shape[0], f32)
    border = _FAINTEST
    if 0 < setting["top_k"] < row.shape[0]:
        border = _border(row, weights, f32(setting["top_k"]), border)
    mass = _probabilities(row, border, weights)
    if setting["top_p"] < 1:
        border = _border(row, weights, f32(setting["top_p"] * mass), border)
        mass = _probabilities(row, border, weights)
    target = _uniform(setting["seed"], setting["drawn"]) * mass
    reached: Any = 0.0
    chosen = -1
    for token in range(row.shape[0]):
        if weights[token] > 0:
            chosen = token
            reached += weights[token]
            if reached > target:
                break
    return chosen


@numba.njit(**JIT)  # type: ignore[untyped-decorator]
def _log_norm(row: Any, highest: Any) -> Any:
    """log(sum(exp(row)))."""
    shifted = np.empty(row.shape[0], f32)
    for i in range(row.shape[0]):
        shifted[i] = row[i] - highest
    return np.log(_probabilities(shifted, _FAINTEST, shifted)) + highest


@numba.njit(parallel=True, **_STRICT)
def _choose(  # type: ignore[no-untyped-def]
    logits, settings, history, slots, borders, ids, values
):
    rows = logits.shape[0]
    tokens = np.empty(rows, np.int64)
    log_probs = np.zeros(rows)
    for i in prange(rows):
        row = logits[i]
        setting = settings[i]
        log_norm = 0.0
        raw = row
        if setting["log_probs"]:
            raw = row.copy()
            log_norm = _log_norm(row, row.max())
        if setting["length"] > 0:
            _penalise(row, history[slots[i]], setting)
        for j in range(borders[i], borders[i + 1]):
            row[ids[j]] += values[j]
        best = row.argmax()
        chosen = best
        if not np.isfinite(row[best]):
            chosen = -1
        elif setting["temperature"] > 0:
            highest = row[best]
            for j in range(row.shape[0]):
                row[j] = max((row[j] - highest) / setting["temperature"], _FORBIDDEN)
            chosen = _draw(row, setting)
        tokens[i] = chosen
        if setting["log_probs"] and chosen >= 0:
            log_probs[i] = raw[chosen] - log_norm
    return tokens, log_probs
