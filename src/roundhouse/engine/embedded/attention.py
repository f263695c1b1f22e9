"""Paged attention on the CPU: numba kernels that read the KV pool in place.

Layout of the pool, per layer: keys [blocks, kv_heads, head_dim, block_size], values [blocks, kv_heads, block_size,
head_dim].
The keys lie transposed, so that both halves of attention are sums of vectors over consecutive memory.

A query's result is summed in an order that depends on its absolute position only: it is the same, bit for bit, alone
and in any batch, in prefill and in decode, with its prefix computed now or long ago.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba import prange

from roundhouse.engine.embedded.kernels import JIT, exp_negative, f32, narrow, widen

LOWEST = f32(-3e38)
NO_WINDOW = 2**62


@numba.njit(parallel=True, **JIT)
def store(k, v, keys, values, places):  # type: ignore[no-untyped-def]
    """Write k and v, float32 [tokens, kv_heads, head_dim], into the pool at `places` (block * block_size + offset)."""
    block_size = values.shape[2]
    for t in prange(k.shape[0]):
        block = places[t] // block_size
        offset = places[t] % block_size
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                keys[block, h, d, offset] = narrow(k[t, h, d], keys[0, 0, 0, 0])
                values[block, h, offset, d] = narrow(v[t, h, d], values[0, 0, 0, 0])


# `shape` is (head_dim, block_size): constants of the kernel that these two become a part of


@numba.njit(forceinline=True, **JIT)  # type: ignore[untyped-decorator]
def _weigh(q: Any, kb: Any, begin: Any, valid: Any, scale: Any, cap: Any, scores: Any, shape: Any) -> Any:
    """The scores of one query with the keys of one block [head_dim, block_size]; returns the highest."""
    head_dim, block_size = shape
    for j in range(block_size):
        scores[j] = f32(0)
    for d in range(0, head_dim, 4):
        q0, q1, q2, q3 = q[d] * scale, q[d + 1] * scale, q[d + 2] * scale, q[d + 3] * scale
        for j in range(block_size):
            scores[j] += (
                q0 * widen(kb[d, j]) + q1 * widen(kb[d + 1, j]) + q2 * widen(kb[d + 2, j]) + q3 * widen(kb[d + 3, j])
            )
    if cap > 0:
        for j in range(block_size):
            scores[j] = cap * np.tanh(scores[j] / cap)
    for j in range(valid, block_size):
        scores[j] = LOWEST
    for j in range(begin):
        scores[j] = LOWEST
    highest = LOWEST
    for j in range(block_size):
        highest = max(highest, scores[j])
    return highest


@numba.njit(forceinline=True, **JIT)  # type: ignore[untyped-decorator]
def _gather(vb: Any, begin: Any, valid: Any, highest: Any, scores: Any, acc: Any, shape: Any) -> Any:
    """Add one block's values [block_size, head_dim] to `acc`, by the softmax of `scores`; returns their sum."""
    head_dim, block_size = shape
    for j in range(block_size):
        scores[j] = exp_negative(scores[j] - highest)
    for j in range(valid, block_size):
        scores[j] = f32(0)
    for j in range(begin):
        scores[j] = f32(0)
    added = f32(0)
    for j in range(block_size):
        added += scores[j]
    last4 = valid // 4 * 4
    for j in range(0, last4, 4):
        p0, p1, p2, p3 = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
        for d in range(head_dim):
            acc[d] += (
                p0 * widen(vb[j, d]) + p1 * widen(vb[j + 1, d]) + p2 * widen(vb[j + 2, d]) + p3 * widen(vb[j + 3, d])
            )
    for j in range(last4, valid):
        p0 = scores[j]
        for d in range(head_dim):
            acc[d] += p0 * widen(vb[j, d])
    return added


@functools.cache
def paged_attention(head_dim: int, block_size: int, group: int) -> Any:
    """The kernel for one shape: head_dim and block_size multiples of 4, `group` query heads share one KV head.

    Its arguments:
        q: float32 [tokens, kv_heads * group, head_dim], rotated.
        keys, values: the pool of this layer, as above; float32, or bfloat16 as uint16.
        tables: int32 [slots, blocks of the longest sequence].
        items: int64 [n, 3]: slot, first token, number of tokens; each item is a run of one sequence's tokens.
        positions: int64 [tokens], of the tokens in their sequences.
        scale: float32; window: attend to this many latest positions; cap: float32, 0 for none (tanh soft cap).
        out: [tokens, kv_heads * group, head_dim], the result; float32, or bfloat16 as uint16.
    """

    @numba.njit(parallel=True, **JIT)
    def kernel(  # type: ignore[no-untyped-def]
        q, keys, values, tables, items, positions, scale, window, cap, out
    ):
        shape = (head_dim, block_size)
        n_items = items.shape[0]
        heads = keys.shape[1]
        # a block's heads lie next to each other: one unit of work takes them all, if there are units enough
        heads_a_unit = heads if n_items >= 8 else 1
        for unit in prange(n_items * (heads // heads_a_unit)):
            slot, first, count = items[unit % n_items]
            first_head = unit // n_items * heads_a_unit
            rows = count * group
            scores = np.empty(block_size, f32)
            acc = np.zeros((heads_a_unit * rows, head_dim), f32)
            top = np.full(heads_a_unit * rows, LOWEST)
            total = np.zeros(heads_a_unit * rows, f32)
            oldest = max(positions[first] - window + 1, 0)
            for b in range(oldest // block_size, positions[first + count - 1] // block_size + 1):
                block = tables[slot, b]
                for i in range(heads_a_unit * rows):
                    h = first_head + i // rows
                    t = first + i % rows // group
                    valid = min(positions[t] - b * block_size + 1, block_size)
                    begin = max(positions[t] - window + 1 - b * block_size, 0)
                    if valid <= begin:
                        continue
                    row = q[t, h * group + i % group]
                    highest = max(_weigh(row, keys[block, h], begin, valid, scale, cap, scores, shape), top[i])
                    fade = np.exp(top[i] - highest)
                    for d in range(head_dim):
                        acc[i, d] *= fade
                    added = _gather(values[block, h], begin, valid, highest, scores, acc[i], shape)
                    total[i] = total[i] * fade + added
                    top[i] = highest
            for i in range(heads_a_unit * rows):
                inverse = f32(1) / total[i]
                t, h = first + i % rows // group, (first_head + i // rows) * group + i % group
                for d in range(head_dim):
                    out[t, h, d] = narrow(acc[i, d] * inverse, out[0, 0, 0])

    return kernel
