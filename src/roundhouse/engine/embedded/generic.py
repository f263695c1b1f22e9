"""Any transformers model with an exchangeable attention function, run as it is: one packed row of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from roundhouse.engine.base import EngineError
from roundhouse.engine.embedded.attention import NO_WINDOW
from roundhouse.engine.embedded.kernels import Array
from roundhouse.engine.embedded.pool import Pool

ATTENTION = "roundhouse_paged"


class GenericModel:
    def __init__(self, model: Any, pool: Pool) -> None:
        self._model = model
        self._pool = pool

    def forward(self, tokens: Array, positions: Array, last: Array) -> Array:
        """Logits, float32 [len(last), vocab], of the rows `last` of `tokens`; `pool.begin` has told the layout."""
        output = self._model(
            input_ids=torch.from_numpy(tokens)[None],
            position_ids=torch.from_numpy(positions)[None],
            use_cache=False,
            logits_to_keep=torch.from_numpy(last),
            pool=self._pool,
        )
        logits: Array = output.logits[0].float().numpy()
        return logits


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pool: Pool | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function for transformers models: query [1, heads, tokens, head_dim]; all sequences are packed."""
    if pool is None:
        raise EngineError("its layers do not pass arguments on to the attention function")
    if others.get("s_aux") is not None:
        raise EngineError("it needs attention sinks, which the embedded engine lacks")
    q, k, v = (_packed(tensor) for tensor in (query, key, value))
    shape = pool.shape
    if q.shape[1:] != (shape.heads, shape.head_dim) or not k.shape[1:] == v.shape[1:] == (
        shape.kv_heads,
        shape.head_dim,
    ):
        raise EngineError(f"its heads {q.shape[1:]}, {k.shape[1:]}, {v.shape[1:]} are not those of its config, {shape}")
    out = np.empty_like(q)
    pool.store(module.layer_idx, k, v)
    pool.attend(
        module.layer_idx,
        q,
        out,
        scale=shape.head_dim**-0.5 if scaling is None else scaling,
        window=sliding_window or NO_WINDOW,
        cap=softcap or 0.0,
    )
    return torch.from_numpy(out).to(query.dtype).unsqueeze(0), None


def _packed(tensor: torch.Tensor) -> Array:
    """[1, heads, tokens, head_dim] -> float32 [tokens, heads, head_dim], without a copy where that is its layout."""
    array: Array = tensor[0].transpose(0, 1).float().contiguous().numpy()
    return array


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
