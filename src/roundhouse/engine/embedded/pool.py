"""The KV pool: keys and values of all blocks, and the attention that reads them."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from dataclasses import dataclass

import numpy as np

from roundhouse.engine.base import EngineError
from roundhouse.engine.embedded.attention import paged_attention, store
from roundhouse.engine.embedded.kernels import Array


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model's attention: layers, query heads, KV heads, numbers per head."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def block_bytes(self, block_size: int, *, half: bool) -> int:
        return self.layers * self.kv_heads * self.head_dim * block_size * 2 * (2 if half else 4)


class Pool:
    """Layout per layer: keys [blocks, kv_heads, head_dim, block_size], values [blocks, kv_heads, block_size, head_dim].

    Args:
        half: store bfloat16 (as uint16) instead of float32.
        tables: int32 [slots, blocks of the longest sequence], kept up to date by the scheduler.

    Attributes:
        keys, values: a list of layers each.
        places: int64 [tokens], block * block_size + offset, where each of the step's keys and values goes.
        attended: calls of `attend` since `begin`; one a layer, if the model's attention is really ours.
    """

    def __init__(self, shape: Shape, num_blocks: int, block_size: int, tables: Array, *, half: bool) -> None:
        if shape.head_dim % 4 or block_size % 4:
            raise EngineError(
                f"kv_cache.tokens_per_block: {block_size} tokens a block and the model's {shape.head_dim} numbers a "
                "head must both be multiples of 4"
            )
        self.shape = shape
        self.attended = 0
        self.block_size = block_size
        dtype = np.uint16 if half else np.float32
        blocks = (shape.layers, num_blocks, shape.kv_heads)
        # empty, not zeros: numpy asks for huge pages for these only
        keys = np.empty((*blocks, shape.head_dim, block_size), dtype=dtype)
        values = np.empty((*blocks, block_size, shape.head_dim), dtype=dtype)
        self.keys, self.values = list(keys), list(values)
        self._populate = threading.Thread(target=_populate, args=(keys, values), name="populate KV pool", daemon=True)
        self._tables = tables
        self._kernel = paged_attention(shape.head_dim, block_size, shape.heads // shape.kv_heads)
        self._items = np.zeros((0, 3), dtype=np.int64)
        self._positions = self.places = np.zeros(0, dtype=np.int64)

    def populate(self) -> None:
        """Start to back the pool with memory, in the background: a first write in the middle of a step costs more."""
        self._populate.start()

    def begin(self, items: Array, positions: Array, slots: Array) -> None:
        """Set the layout of the step that follows.

        Args:
            items: int64 [n, 3]: slot, first token, number of tokens of each run of one sequence's tokens.
            positions, slots: int64 [tokens].
        """
        blocks = self._tables[slots, positions // self.block_size].astype(np.int64)
        self._items, self._positions = items, positions
        self.attended = 0
        self.places = blocks * self.block_size + positions % self.block_size

    def store(self, layer: int, k: Array, v: Array) -> None:
        """Write k and v, float32 [tokens, kv_heads, head_dim], of the step's tokens."""
        store(k, v, self.keys[layer], self.values[layer], self.places)

    def attend(self, layer: int, q: Array, out: Array, *, scale: float, window: int, cap: float) -> None:
        """Attend with q, float32 [tokens, heads, head_dim], into `out`; the keys and values must be stored."""
        self.attended += 1
        self._kernel(
            q,
            self.keys[layer],
            self.values[layer],
            self._tables,
            self._items,
            self._positions,
            np.float32(scale),
            window,
            np.float32(cap),
            out,
        )


def _populate(*arrays: Array) -> None:
    """Have the system back the arrays with memory now. Contents stay as they are.

    Where the system cannot do it (Linux before 5.14), nothing happens.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # this thread only; requests come first
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    populate_write = 23  # MADV_POPULATE_WRITE of linux/mman.h; the module mmap does not name it
    for array in arrays:
        start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        end = array.ctypes.data + array.nbytes
        for part in range(start, end, 2**21):
            madvise(part, min(2**21, end - part) // mmap.PAGESIZE * mmap.PAGESIZE, populate_write)
