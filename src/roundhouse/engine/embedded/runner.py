"""The runner: one step's batch through the model, as one packed row of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from roundhouse.engine.embedded.attention import Array
from roundhouse.engine.embedded.model import Paged
from roundhouse.engine.scheduler import Batch

TILE = 16  # query tokens of one work item: enough to spread a prompt over the cores


class Runner:
    def __init__(self, model: Any, paged: Paged, block_size: int) -> None:
        self.model = model
        self.paged = paged
        self.block_size = block_size

    @torch.inference_mode()
    def run(self, batch: Batch) -> Array:
        """Logits, float32 [samples, vocab], of the last token of each of `batch.samples()`. Fills the KV pool."""
        tokens, positions, slots, items, last = _layout(batch)
        blocks = self.paged.tables[slots, positions // self.block_size].astype(np.int64)
        self.paged.set_step(items, positions, blocks * self.block_size + positions % self.block_size)
        output = self.model(
            input_ids=torch.from_numpy(tokens)[None],
            position_ids=torch.from_numpy(positions)[None],
            use_cache=False,
            logits_to_keep=torch.from_numpy(last),
            paged=self.paged,
        )
        logits: Array = output.logits[0].float().numpy()
        return logits


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
    as_array = np.array
    return (
        as_array(tokens, dtype=np.int64),
        as_array(positions, dtype=np.int64),
        as_array(slots, dtype=np.int64),
        as_array(items, dtype=np.int64),
        as_array(last, dtype=np.int64),
    )
