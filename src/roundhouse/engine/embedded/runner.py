"""The runner: one step's batch through the model, as one packed row of tokens."""

from __future__ import annotations

from typing import Protocol

import numba
import numpy as np
import torch

from roundhouse.engine.embedded.kernels import Array
from roundhouse.engine.embedded.pool import Pool
from roundhouse.engine.scheduler import Batch

TILE = 16  # query tokens of one work item: enough to spread a prompt over the cores
ALONE = 16_000_000  # weights times tokens of a step, up to which one thread is as fast as two: it waits for no other


class Model(Protocol):
    def forward(self, tokens: Array, positions: Array, last: Array) -> Array: ...


class Runner:
    def __init__(self, model: Model, pool: Pool, *, weights: int, threads: int) -> None:
        """`weights`: numbers in the model. `threads`: for steps that have work for so many."""
        self._model = model
        self._pool = pool
        self._weights = weights
        self._threads = threads
        self._use(threads)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Array:
        """Logits, float32 [samples, vocab], of the last token of each of `batch.samples()`. Fills the KV pool."""
        tokens, positions, slots, items, last = _layout(batch)
        self._use(1 if self._weights * len(tokens) <= ALONE else self._threads)
        self._pool.begin(_spread(items), positions, slots)
        return self._model.forward(tokens, positions, last)

    def _use(self, threads: int) -> None:
        """Compute with so many from now on. What a small step leaves alone is a core for Triton and the clients."""
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]

    @torch.inference_mode()
    def warm_up(self, max_tokens: int) -> None:
        """Compile the kernels, or load them from numba's cache, before the first request pays for it.

        Computes tokens 0 at position 0 in block 0; whoever gets that block writes over it before reading.
        """
        for count in (1, max_tokens):
            zeros = np.zeros(count, dtype=np.int64)
            items = np.array([(0, row, 1) for row in range(count)], dtype=np.int64)
            self._pool.begin(items, zeros, zeros)
            self._model.forward(zeros, zeros, zeros[:1])


def _spread(items: Array) -> Array:
    """Deal the items out to the threads, each of which takes a run of them: the later in a prompt, the more work."""
    threads = numba.get_num_threads()
    return np.concatenate([items[thread::threads] for thread in range(threads)])


def _layout(batch: Batch) -> tuple[Array, Array, Array, Array, Array]:
    """Of all tokens of the step: ids, positions, slots [tokens]; attention items [n, 3]; rows to sample from."""
    tokens = [sequence.tokens[-1] for sequence in batch.decodes]
    positions = [sequence.computed for sequence in batch.decodes]
    slots = [sequence.slot for sequence in batch.decodes]
    items = [(slot, row, 1) for row, slot in enumerate(slots)]
    last = list(range(len(slots)))
    for sequence, count in batch.prefills:
        start, end, row = sequence.computed, sequence.computed + count, len(tokens)
        tokens += sequence.tokens[start:end]
        positions += range(start, end)
        slots += [sequence.slot] * count
        items += [(sequence.slot, row + tile, min(TILE, count - tile)) for tile in range(0, count, TILE)]
        if end == len(sequence.tokens):
            last.append(len(tokens) - 1)
    parts = (tokens, positions, slots, items, last)
    ids, places, rows, runs, ends = (np.array(part, dtype=np.int64) for part in parts)
    return ids, places, rows, runs, ends
