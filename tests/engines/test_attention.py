"""The paged attention kernel against plain attention in float64."""

from __future__ import annotations

import numpy as np
import pytest

from roundhouse.engine.embedded.attention import NO_WINDOW, paged_attention, store
from roundhouse.engine.embedded.kernels import exp_negative


class Case:
    """A pool with a sequence of `length` tokens in slot 1, its blocks in random order."""

    def __init__(self, kv_heads: int, group: int, head_dim: int, length: int, *, block_size: int = 16) -> None:
        chance = np.random.default_rng(0)
        self.block_size = block_size
        self.q = chance.normal(size=(length, kv_heads * group, head_dim)).astype(np.float32)
        self.k, self.v = (chance.normal(size=(length, kv_heads, head_dim)).astype(np.float32) for _ in range(2))
        blocks = -(-length // block_size)
        self.keys = np.full((2 * blocks, kv_heads, head_dim, self.block_size), np.nan, dtype=np.float32)
        self.values = np.full((2 * blocks, kv_heads, self.block_size, head_dim), np.nan, dtype=np.float32)
        self.tables = np.zeros((2, blocks), dtype=np.int32)
        self.tables[1] = chance.permutation(2 * blocks)[:blocks]
        self.kernel = paged_attention(head_dim, self.block_size, group)
        self.group = group

    def run(self, start: int, end: int, *, window: int = NO_WINDOW, cap: float = 0.0, tile: int = 16) -> np.ndarray:
        """Tokens `start` to `end` in one call, like one step of the engine."""
        positions = np.arange(start, end)
        items = np.array([(1, t, min(tile, end - start - t)) for t in range(0, end - start, tile)])
        places = (
            self.tables[1, positions // self.block_size].astype(np.int64) * self.block_size
            + positions % self.block_size
        )
        out = np.empty_like(self.q[start:end])
        store(self.k[start:end], self.v[start:end], self.keys, self.values, places)
        scale = np.float32(self.q.shape[2] ** -0.5)
        self.kernel(
            self.q[start:end],
            self.keys,
            self.values,
            self.tables,
            items,
            positions,
            scale,
            window,
            np.float32(cap),
            out,
        )
        return out

    def reference(self, window: int = NO_WINDOW, cap: float = 0.0) -> np.ndarray:
        q = self.q.astype(np.float64)
        k, v = (np.repeat(part.astype(np.float64), self.group, axis=1) for part in (self.k, self.v))
        scores = np.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        if cap:
            scores = cap * np.tanh(scores / cap)
        distance = np.arange(len(q))[:, None] - np.arange(len(q))[None]
        scores[:, (distance < 0) | (distance >= window)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)


SHAPES = [(1, 1, 8), (2, 2, 16), (1, 4, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 16, 17, 75])
def test_prefill(shape: tuple[int, int, int], length: int) -> None:
    case = Case(*shape, length)
    assert np.allclose(case.run(0, length), case.reference(), atol=1e-5)


@pytest.mark.parametrize("settings", [{"window": 1}, {"window": 20}, {"window": 33}, {"cap": 2.0}], ids=str)
def test_window_and_soft_cap(settings: dict[str, float]) -> None:
    case = Case(2, 2, 16, 75)
    assert np.allclose(case.run(0, 75, **settings), case.reference(**settings), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 16, 16), (4, 1, 32, 32)], ids=str)
@pytest.mark.parametrize("tile", [1, 5, 16])
@pytest.mark.parametrize("cuts", [[30], [16, 32], [1, 2, 3, 74], [*range(1, 75)]], ids=["half", "blocks", "odd", "all"])
def test_bit_for_bit_the_same_in_any_chunks(cuts: list[int], tile: int, shape: tuple[int, int, int, int]) -> None:
    whole = Case(*shape[:3], 75, block_size=shape[3]).run(0, 75)
    case = Case(*shape[:3], 75, block_size=shape[3])
    parts = [case.run(start, end, tile=tile) for start, end in zip([0, *cuts], [*cuts, 75], strict=True)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_extreme_scores_stay_finite() -> None:
    case = Case(1, 1, 8, 40)
    case.q *= 1e4
    assert np.isfinite(case.run(0, 40)).all()


def test_exp_is_exact_to_float32() -> None:
    x = np.linspace(-80, 0, 4001).astype(np.float32)
    ours = np.array([exp_negative(value) for value in x])
    assert np.abs(ours / np.exp(x.astype(np.float64)) - 1).max() < 5e-7
