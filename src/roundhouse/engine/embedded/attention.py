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

from roundhouse.engine.embedded.kernels import JIT, ORDERED, exp_negative, f32, narrow, widen

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


# In what follows `shape` is (head_dim, block_size), both constants of the kernel that these functions become a part of.


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _weigh(q: Any, kb: Any, scale: Any, scores: Any, shape: Any) -> None:
    """scores [block_size] = the products of a query with the keys of a block, [head_dim, block_size]."""
    head_dim, block_size = shape
    for j in range(block_size):
        scores[j] = f32(0)
    for d in range(0, head_dim, 4):
        q0, q1, q2, q3 = q[d] * scale, q[d + 1] * scale, q[d + 2] * scale, q[d + 3] * scale
        for j in range(block_size):
            s = scores[j]
            s += q0 * widen(kb[d, j])
            s += q1 * widen(kb[d + 1, j])
            s += q2 * widen(kb[d + 2, j])
            s += q3 * widen(kb[d + 3, j])
            scores[j] = s


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _weigh4(qa: Any, qb: Any, qc: Any, qd: Any, kb: Any, scale: Any, scores: Any, shape: Any) -> None:
    """The same for four queries at once: each key is loaded once for all. scores [4, block_size]."""
    head_dim, block_size = shape
    for j in range(block_size):
        scores[0, j] = scores[1, j] = scores[2, j] = scores[3, j] = f32(0)
    for d in range(0, head_dim, 2):
        a0, b0, c0, d0 = qa[d] * scale, qb[d] * scale, qc[d] * scale, qd[d] * scale
        a1, b1, c1, d1 = qa[d + 1] * scale, qb[d + 1] * scale, qc[d + 1] * scale, qd[d + 1] * scale
        for j in range(block_size):
            k0, k1 = widen(kb[d, j]), widen(kb[d + 1, j])
            s = scores[0, j]
            s += a0 * k0
            s += a1 * k1
            scores[0, j] = s
            s = scores[1, j]
            s += b0 * k0
            s += b1 * k1
            scores[1, j] = s
            s = scores[2, j]
            s += c0 * k0
            s += c1 * k1
            scores[2, j] = s
            s = scores[3, j]
            s += d0 * k0
            s += d1 * k1
            scores[3, j] = s


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _soften(scores: Any, begin: Any, valid: Any, cap: Any, top: Any, shape: Any) -> Any:
    """scores -> exp(scores - highest), 0 outside of begin to valid; returns the highest (`top` or more) and the sum."""
    block_size = shape[1]
    if cap > 0:
        for j in range(block_size):
            scores[j] = cap * np.tanh(scores[j] / cap)
    for j in range(valid, block_size):
        scores[j] = LOWEST
    for j in range(begin):
        scores[j] = LOWEST
    highest = top
    for j in range(block_size):
        highest = max(highest, scores[j])
    for j in range(block_size):
        scores[j] = exp_negative(scores[j] - highest)
    for j in range(valid, block_size):
        scores[j] = f32(0)
    for j in range(begin):
        scores[j] = f32(0)
    s0 = s1 = s2 = s3 = f32(0)
    for j in range(0, block_size, 4):
        s0 += scores[j]
        s1 += scores[j + 1]
        s2 += scores[j + 2]
        s3 += scores[j + 3]
    return highest, (s0 + s1) + (s2 + s3)


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _gather(p: Any, vb: Any, valid: Any, acc: Any, shape: Any) -> None:
    """acc [head_dim] += p [block_size] @ the values of a block, [block_size, head_dim], of which `valid` are filled."""
    head_dim = shape[0]
    for j in range(0, valid, 4):
        p0, p1, p2, p3 = p[j], p[j + 1], p[j + 2], p[j + 3]
        # weights beyond `valid` are 0; the value there may be anything, NaN too, so a filled one stands in for it
        v0, v1, v2, v3 = vb[j], vb[min(j + 1, valid - 1)], vb[min(j + 2, valid - 1)], vb[min(j + 3, valid - 1)]
        for d in range(head_dim):
            s = acc[d]
            s += p0 * widen(v0[d])
            s += p1 * widen(v1[d])
            s += p2 * widen(v2[d])
            s += p3 * widen(v3[d])
            acc[d] = s


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _gather4(p: Any, vb: Any, valid: Any, acc: Any, shape: Any) -> None:
    """The same for four queries at once: p [4, block_size], acc [4, head_dim]."""
    head_dim = shape[0]
    for j in range(0, valid, 2):
        a0, b0, c0, d0 = p[0, j], p[1, j], p[2, j], p[3, j]
        a1, b1, c1, d1 = p[0, j + 1], p[1, j + 1], p[2, j + 1], p[3, j + 1]
        first, second = vb[j], vb[min(j + 1, valid - 1)]
        for d in range(head_dim):
            v0, v1 = widen(first[d]), widen(second[d])
            s = acc[0, d]
            s += a0 * v0
            s += a1 * v1
            acc[0, d] = s
            s = acc[1, d]
            s += b0 * v0
            s += b1 * v1
            acc[1, d] = s
            s = acc[2, d]
            s += c0 * v0
            s += c1 * v1
            acc[2, d] = s
            s = acc[3, d]
            s += d0 * v0
            s += d1 * v1
            acc[3, d] = s


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

    @numba.njit(parallel=True, **ORDERED)
    def kernel(  # type: ignore[no-untyped-def]
        q, keys, values, tables, items, positions, scale, window, cap, out
    ):
        shape = (head_dim, block_size)
        n_items = items.shape[0]
        # a block's heads lie next to each other: one unit of work takes them all, if there are units enough
        heads = keys.shape[1] if n_items >= 8 else 1
        for unit in prange(n_items * (keys.shape[1] // heads)):
            slot, first, count = items[unit % n_items]
            first_head = unit // n_items * heads
            rows = count * group  # queries with one KV head; taken four at a time
            fours = (rows + 3) // 4
            scores = np.empty((4, block_size), f32)
            acc = np.zeros((heads * fours, 4, head_dim), f32)
            top = np.full((heads * fours, 4), LOWEST)
            total = np.zeros((heads * fours, 4), f32)
            oldest = max(positions[first] - window + 1, 0)
            for b in range(oldest // block_size, positions[first + count - 1] // block_size + 1):
                start = b * block_size
                for i in range(heads * fours):
                    head = first_head + i // fours
                    r0 = i % fours * 4
                    n = min(rows - r0, 4)
                    filled = min(positions[first + (r0 + n - 1) // group] - start + 1, block_size)
                    if filled <= max(positions[first + r0 // group] - window + 1 - start, 0):
                        continue
                    kb, vb = keys[tables[slot, b], head], values[tables[slot, b], head]
                    if n == 4:
                        _weigh4(
                            q[first + r0 // group, head * group + r0 % group],
                            q[first + (r0 + 1) // group, head * group + (r0 + 1) % group],
                            q[first + (r0 + 2) // group, head * group + (r0 + 2) % group],
                            q[first + (r0 + 3) // group, head * group + (r0 + 3) % group],
                            kb,
                            scale,
                            scores,
                            shape,
                        )
                    else:
                        for r in range(n):
                            query = q[first + (r0 + r) // group, head * group + (r0 + r) % group]
                            _weigh(query, kb, scale, scores[r], shape)
                    for r in range(n):
                        position = positions[first + (r0 + r) // group]
                        valid = min(position - start + 1, block_size)
                        begin = max(position - window + 1 - start, 0)
                        if valid <= begin:
                            for j in range(block_size):
                                scores[r, j] = f32(0)
                            continue
                        highest, added = _soften(scores[r], begin, valid, cap, top[i, r], shape)
                        if highest > top[i, r]:
                            fade = np.exp(top[i, r] - highest)
                            for d in range(head_dim):
                                acc[i, r, d] *= fade
                            total[i, r] *= fade
                            top[i, r] = highest
                        total[i, r] += added
                    if n == 4:
                        _gather4(scores, vb, filled, acc[i], shape)
                    else:
                        for r in range(n):
                            _gather(scores[r], vb, filled, acc[i, r], shape)
            for i in range(heads * fours):
                for r in range(min(rows - i % fours * 4, 4)):
                    row = i % fours * 4 + r
                    inverse = f32(1) / total[i, r]
                    t, h = first + row // group, (first_head + i // fours) * group + row % group
                    for d in range(head_dim):
                        out[t, h, d] = narrow(acc[i, r, d] * inverse, out[0, 0, 0])

    return kernel
