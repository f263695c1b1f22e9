"""Paged attention on the CPU: numba kernels that read the KV pool in place.

Layout of the pool, per layer: keys [blocks, kv_heads, head_dim, block_size], values [blocks, kv_heads, block_size,
head_dim]. The keys lie transposed, so that both halves of attention are sums of vectors over consecutive memory.

A query's result is summed in an order that depends on its absolute position only: it is the same, bit for bit, alone
and in any batch, in prefill and in decode, with its prefix computed now or long ago.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

Array = NDArray[Any]
f32 = np.float32
i32 = np.int32
LOWEST = f32(-3e38)
NO_WINDOW = 2**62

# exp(x) = 2**k * e**r with k = round(x / ln 2); ln 2 in two parts keeps r exact; e**r by its series
_LOG2E, _LN2_HIGH, _LN2_LOW = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)
_C6, _C5, _C4, _C3, _C2, _ONE = f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(0.5), f32(1)

JIT: dict[str, Any] = {"fastmath": True, "error_model": "numpy", "boundscheck": False, "nogil": True, "cache": True}


@numba.njit(inline="always", **JIT)  # type: ignore[untyped-decorator]
def exp_negative(x: Any) -> Any:
    """exp(x) for x <= 0 in float32, relative error under 5e-7; a form that LLVM turns into vector code."""
    x = max(x, f32(-87.0))
    k = i32(x * _LOG2E - f32(0.5))
    z = f32(k)
    r = x - z * _LN2_HIGH - z * _LN2_LOW
    p = _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _ONE
    p = p * r + _ONE
    return p * i32(i32(k + i32(127)) << i32(23)).view(f32)


@functools.cache
def paged_attention(head_dim: int, block_size: int, group: int) -> Any:
    """The kernel for one shape: head_dim and block_size multiples of 4, `group` query heads share one KV head.

    Its arguments:
        q: float32 [tokens, kv_heads * group, head_dim].
        k, v: float32 [tokens, kv_heads, head_dim], of the same tokens; written into the pool first.
        keys, values: the pool of this layer, as above.
        tables: int32 [slots, blocks of the longest sequence].
        items: int64 [n, 3]: slot, first token, number of tokens; each item is a run of one sequence's tokens.
        positions: int64 [tokens], of the tokens in their sequences.
        places: int64 [tokens], block * block_size + offset, where each token's key and value go.
        scale: float32; window: attend to this many latest positions; cap: float32, 0 for none (tanh soft cap).
        out: float32 [tokens, kv_heads * group, head_dim], the result.
    """

    @numba.njit(parallel=True, **JIT)
    def kernel(  # type: ignore[no-untyped-def]
        q, k, v, keys, values, tables, items, positions, places, scale, window, cap, out
    ):
        n_items = items.shape[0]
        heads = keys.shape[1]
        for t in range(k.shape[0]):
            block = places[t] // block_size
            offset = places[t] % block_size
            for h in range(heads):
                for d in range(head_dim):
                    keys[block, h, d, offset] = k[t, h, d]
                    values[block, h, offset, d] = v[t, h, d]
        for work in prange(n_items * heads):
            h = work // n_items
            slot, first, count = items[work % n_items]
            rows = count * group
            scores = np.empty(block_size, f32)
            acc = np.zeros((rows, head_dim), f32)
            top = np.full(rows, LOWEST)
            total = np.zeros(rows, f32)
            oldest = max(positions[first] - window + 1, 0)
            for b in range(oldest // block_size, positions[first + count - 1] // block_size + 1):
                kb = keys[tables[slot, b], h]
                vb = values[tables[slot, b], h]
                for r in range(rows):
                    t = first + r // group
                    qr = q[t, h * group + r % group]
                    valid = min(positions[t] - b * block_size + 1, block_size)
                    begin = max(positions[t] - window + 1 - b * block_size, 0)
                    if valid <= begin:
                        continue
                    for j in range(block_size):
                        scores[j] = f32(0)
                    for d in range(0, head_dim, 4):
                        q0, q1, q2, q3 = qr[d] * scale, qr[d + 1] * scale, qr[d + 2] * scale, qr[d + 3] * scale
                        for j in range(block_size):
                            scores[j] += q0 * kb[d, j] + q1 * kb[d + 1, j] + q2 * kb[d + 2, j] + q3 * kb[d + 3, j]
                    if cap > 0:
                        for j in range(block_size):
                            scores[j] = cap * np.tanh(scores[j] / cap)
                    for j in range(valid, block_size):
                        scores[j] = LOWEST
                    for j in range(begin):
                        scores[j] = LOWEST
                    highest = top[r]
                    for j in range(block_size):
                        highest = max(highest, scores[j])
                    for j in range(block_size):
                        scores[j] = exp_negative(scores[j] - highest)
                    for j in range(valid, block_size):
                        scores[j] = f32(0)
                    for j in range(begin):
                        scores[j] = f32(0)
                    added = f32(0)
                    for j in range(block_size):
                        added += scores[j]
                    fade = np.exp(top[r] - highest)
                    top[r] = highest
                    total[r] = total[r] * fade + added
                    a = acc[r]
                    for d in range(head_dim):
                        a[d] *= fade
                    last4 = valid // 4 * 4
                    for j in range(0, last4, 4):
                        p0, p1, p2, p3 = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
                        for d in range(head_dim):
                            a[d] += p0 * vb[j, d] + p1 * vb[j + 1, d] + p2 * vb[j + 2, d] + p3 * vb[j + 3, d]
                    for j in range(last4, valid):
                        p0 = scores[j]
                        for d in range(head_dim):
                            a[d] += p0 * vb[j, d]
            for r in range(rows):
                inverse = f32(1) / total[r]
                for d in range(head_dim):
                    out[first + r // group, h * group + r % group, d] = acc[r, d] * inverse

    return kernel
