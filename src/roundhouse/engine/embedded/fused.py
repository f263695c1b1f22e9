"""Llama-like models without transformers' layer code: the same weights, four matrix products and four kernels a layer.

A little model's step is so short that the three dozen small operations of a transformers layer cost more than its
matrix products. Here q, k and v come from one product, gate and up from another, and everything between two products
is one numba kernel.

In float32, and for products over up to about 700 numbers, a token's result does not depend on what else is in the
step, not in one bit: MKL then sums in the same order for any number of rows but one, so one row is computed as two.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import prange

from roundhouse.engine.embedded import kernels
from roundhouse.engine.embedded.attention import NO_WINDOW
from roundhouse.engine.embedded.kernels import ORDERED, Array, f32, narrow, sum_squares, widen
from roundhouse.engine.embedded.pool import Pool

MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # the others change their angles with the length


def fits(config: Any) -> bool:
    """Whether a model of this config computes what this module computes."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in MODEL_TYPES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROPE_TYPES
        and not getattr(config, "mlp_bias", False)
    )


class _Layer:
    """One decoder layer's weights; the matrices lie as [in, out]."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        own_window = config.sliding_window if config.model_type == "mistral" else None
        self.window: int = getattr(attention, "sliding_window", own_window) or NO_WINDOW
        self.scale: float = attention.scaling
        self.qkv = _stack(attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.qkv_bias = _vector(torch.cat(biases)) if biases[0] is not None else np.zeros(0, np.float32)
        self.q_norm, self.k_norm = (
            _vector(norm.weight) if (norm := getattr(attention, name, None)) is not None else np.zeros(0, np.float32)
            for name in ("q_norm", "k_norm")
        )
        self.o = _stack(attention.o_proj)
        self.o_bias = None if attention.o_proj.bias is None else attention.o_proj.bias.detach()
        self.gate_up = _stack(mlp.gate_proj, mlp.up_proj)
        self.down = _stack(mlp.down_proj)
        self.norm = _vector(layer.input_layernorm.weight)
        self.post_norm = _vector(layer.post_attention_layernorm.weight)


class FusedModel:
    """Args:
    model: the loaded transformers model; its weights are moved, so it cannot be used afterwards.
    max_tokens: of one step.
    max_seq_len: positions from 0.
    """

    def __init__(self, model: Any, pool: Pool, max_tokens: int, max_seq_len: int) -> None:
        config = model.config
        self._pool = pool
        self._epsilon = f32(config.rms_norm_eps)
        head = model.get_output_embeddings().weight.detach()
        self._table = _numpy(model.model.embed_tokens.weight.detach())
        self._head = head.t().contiguous()
        self._norm = _vector(model.model.norm.weight)
        self._cos, self._sin = _angles(model.model.rotary_emb, max_seq_len)
        self._layers = [_Layer(layer, config) for layer in model.model.layers]
        self._buffers = _Buffers(max(max_tokens, 2), config.hidden_size, pool, self._layers[0], head.dtype)

    def forward(self, tokens: Array, positions: Array, last: Array) -> Array:
        """Logits, float32 [len(last), vocab], of the rows `last` of `tokens`; `pool.begin` has told the layout."""
        count, pool = len(tokens), self._pool
        b = self._buffers.first(max(count, 2))
        n = self._buffers.first(count)
        large = n.hidden_np.size >= kernels.PARALLEL_FROM
        add_norm = kernels.add_norm_parallel if large else kernels.add_norm
        silu_mul = kernels.silu_mul_parallel if large else kernels.silu_mul
        kernels.embed_norm(tokens, self._table, n.hidden_np, self._layers[0].norm, self._epsilon, n.normed_np)
        following = [*(layer.norm for layer in self._layers[1:]), self._norm]
        for i, (layer, next_norm) in enumerate(zip(self._layers, following, strict=True)):
            torch.mm(b.normed, layer.qkv, out=b.qkv)
            _rotate(
                n.qkv_np, layer.qkv_bias, layer.q_norm, layer.k_norm, self._epsilon, positions, self._cos, self._sin,
                pool.places, n.q, pool.keys[i], pool.values[i],
            )  # fmt: skip
            pool.attend(i, n.q, n.attended_np, scale=layer.scale, window=layer.window, cap=0.0)
            torch.mm(b.attended, layer.o, out=b.delta)
            if layer.o_bias is not None:
                b.delta += layer.o_bias
            add_norm(n.hidden_np, n.delta_np, layer.post_norm, self._epsilon, n.normed_np)
            torch.mm(b.normed, layer.gate_up, out=b.gate_up)
            silu_mul(n.gate_up_np, n.activated_np)
            torch.mm(b.activated, layer.down, out=b.delta)
            add_norm(n.hidden_np, n.delta_np, next_norm, self._epsilon, n.normed_np)
        return self._logits(b.normed, last)

    def _logits(self, normed: torch.Tensor, last: Array) -> Array:
        rows = torch.from_numpy(last if len(last) != 1 else np.repeat(last, 2))
        logits: Array = torch.mm(normed[rows], self._head).float().numpy()
        return logits[: len(last)]


class _Buffers:
    """The activations of one step, as torch tensors [tokens, size] and as the numpy arrays that kernels see."""

    def __init__(self, rows: int, hidden: int, pool: Pool, layer: _Layer, dtype: torch.dtype) -> None:
        shape = pool.shape
        q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = {
            "normed": hidden,
            "qkv": q_size + 2 * kv_size,
            "attended": q_size,
            "delta": hidden,
            "gate_up": layer.gate_up.shape[1],
            "activated": layer.down.shape[0],
        }
        self._tensors = {name: torch.zeros(rows, size, dtype=dtype) for name, size in sizes.items()}
        arrays = {f"{name}_np": _numpy(tensor) for name, tensor in self._tensors.items()}
        arrays["attended_np"] = arrays["attended_np"].reshape(rows, shape.heads, shape.head_dim)
        arrays["hidden_np"] = np.zeros((rows, hidden), dtype=np.float32)
        arrays["q"] = np.zeros((rows, shape.heads, shape.head_dim), dtype=np.float32)
        self._arrays = arrays

    def first(self, rows: int) -> Any:
        """All of them, cut to the first `rows`; named as above."""
        return _Cut({name: part[:rows] for parts in (self._tensors, self._arrays) for name, part in parts.items()})


class _Cut:
    def __init__(self, parts: dict[str, Any]) -> None:
        self.__dict__.update(parts)


@numba.njit(**ORDERED)  # type: ignore[untyped-decorator]
def _normalise_head(row: Any, weight: Any, epsilon: Any) -> None:
    factor = f32(1) / np.sqrt(sum_squares(row) / f32(row.shape[0]) + epsilon)
    for d in range(row.shape[0]):
        row[d] = row[d] * factor * weight[d]


@numba.njit(**ORDERED)  # type: ignore[untyped-decorator]
def _rotate_head(row: Any, cos: Any, sin: Any) -> None:
    half = row.shape[0] // 2
    for d in range(half):
        low, high = row[d], row[half + d]
        row[d] = low * cos[d] - high * sin[d]
        row[half + d] = high * cos[half + d] + low * sin[half + d]


@numba.njit(**ORDERED)  # type: ignore[untyped-decorator]
def _head(qkv: Any, bias: Any, h: Any, row: Any) -> None:
    """Head `h` of one token's qkv, its bias added, into `row`."""
    start = h * row.shape[0]
    for d in range(row.shape[0]):
        row[d] = widen(qkv[start + d])
    if bias.shape[0]:
        for d in range(row.shape[0]):
            row[d] += bias[start + d]


@numba.njit(parallel=True, **ORDERED)
def _rotate(  # type: ignore[no-untyped-def]
    qkv, bias, q_norm, k_norm, epsilon, positions, cos, sin, places, q, keys, values
):
    """Split qkv [tokens, sizes of q, k, v], add the bias, normalise the heads, turn q and k by their positions.

    q goes to `q` [tokens, heads, head_dim], k and v to their places in the pool.
    """
    heads, head_dim = q.shape[1], q.shape[2]
    kv_heads, block_size = values.shape[1], values.shape[2]
    for t in prange(q.shape[0]):
        angle = positions[t]
        block, offset = places[t] // block_size, places[t] % block_size
        for h in range(heads):
            _head(qkv[t], bias, h, q[t, h])
            if q_norm.shape[0]:
                _normalise_head(q[t, h], q_norm, epsilon)
            _rotate_head(q[t, h], cos[angle], sin[angle])
        row = np.empty(head_dim, f32)
        for h in range(kv_heads):
            _head(qkv[t], bias, heads + h, row)
            if k_norm.shape[0]:
                _normalise_head(row, k_norm, epsilon)
            _rotate_head(row, cos[angle], sin[angle])
            for d in range(head_dim):
                keys[block, h, d, offset] = narrow(row[d], keys[0, 0, 0, 0])
            _head(qkv[t], bias, heads + kv_heads + h, row)
            for d in range(head_dim):
                values[block, h, offset, d] = narrow(row[d], values[0, 0, 0, 0])


def _angles(rotary: Any, max_seq_len: int) -> tuple[Array, Array]:
    """cos and sin, float32 [max_seq_len, head_dim], as the model's own module computes them."""
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(max_seq_len)[None])
    return cos[0].contiguous().numpy(), sin[0].contiguous().numpy()


def _stack(*linears: Any) -> torch.Tensor:
    """The weights [out, in] of linear layers with one input, as one matrix [in, sum of out]; frees the originals."""
    matrix = torch.cat([linear.weight.detach() for linear in linears]).t().contiguous()
    for linear in linears:
        linear.weight = None
    return matrix


def _vector(weight: torch.Tensor) -> Array:
    array: Array = weight.detach().float().contiguous().numpy()
    return array


def _numpy(tensor: torch.Tensor) -> Array:
    """The same memory as a numpy array; bfloat16 as uint16."""
    array: Array = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return array
