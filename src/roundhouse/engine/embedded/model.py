"""Loading a Hugging Face model folder for paged, packed execution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from roundhouse.engine.base import EngineError
from roundhouse.engine.embedded.attention import NO_WINDOW, Array, paged_attention
from roundhouse.engine.embedded.config import EmbeddedConfig

ATTENTION = "roundhouse_paged"


def load(config: EmbeddedConfig) -> Any:
    """The model in inference mode, its attention set to ours. Reads local files only, safetensors only, runs no code.

    Raises EngineError if the folder holds no model that this engine can run.
    """
    folder = Path(config.model)
    if not (folder / "config.json").is_file():
        raise EngineError(f"model.path: {folder} has no config.json; it must be a Hugging Face model folder")
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_dtype(config, folder),
            attn_implementation=ATTENTION,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise EngineError(f"model.path: {folder} cannot be loaded: {error}") from error
    model.train(False)
    _check_layers(model.config.get_text_config())
    return model


def _check_layers(config: PretrainedConfig) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    foreign = kinds - {"full_attention", "sliding_attention"}
    if foreign:
        raise EngineError(
            f"model.path: {config.model_type} has layers of kind {', '.join(sorted(foreign))}; "
            "the embedded engine runs full and sliding attention only"
        )


def _dtype(config: EmbeddedConfig, folder: Path) -> torch.dtype:
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    raw = json.loads((folder / "config.json").read_text())
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    half = (raw.get("dtype") or raw.get("torch_dtype")) == "bfloat16"
    amx = torch.cpu._is_amx_tile_supported()
    # small models are faster in float32: the bfloat16 kernels cost 20 microseconds a call more than they save
    return torch.bfloat16 if half and amx and weights > 100 * 2**20 else torch.float32


class Paged:
    """What the attention function needs besides its tensors: this step's layout and the pool. See `paged_attention`."""

    def __init__(self, model_config: PretrainedConfig, num_blocks: int, block_size: int, tables: Array) -> None:
        heads = model_config.num_attention_heads
        self.kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
        self.layers = model_config.num_hidden_layers
        self.heads = heads
        if self.head_dim % 4 or block_size % 4:
            raise EngineError(f"model.path: head_dim {self.head_dim} is not a multiple of 4")
        shape = (self.layers, num_blocks, self.kv_heads, self.head_dim, block_size)
        self.keys = np.zeros(shape, dtype=np.float32)
        self.values = np.zeros((*shape[:3], block_size, self.head_dim), dtype=np.float32)
        self.tables = tables
        self.kernel = paged_attention(self.head_dim, block_size, heads // self.kv_heads)
        self.calls = 0
        self.set_step(*(np.zeros(shape, dtype=np.int64) for shape in ((0, 3), 0, 0)))

    def set_step(self, items: Array, positions: Array, places: Array) -> None:
        self.items, self.positions, self.places = items, positions, places

    def attend(self, layer: int, q: Array, k: Array, v: Array, scale: float, window: int, cap: float) -> Array:
        out = np.empty_like(q)
        self.kernel(
            q, k, v, self.keys[layer], self.values[layer], self.tables, self.items, self.positions, self.places,
            np.float32(scale), window, np.float32(cap), out,
        )  # fmt: skip
        self.calls += 1
        return out


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Paged,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function for transformers models: query [1, heads, tokens, head_dim]; all sequences are packed."""
    if others.get("s_aux") is not None:
        raise EngineError("model.path: attention sinks are not supported by the embedded engine")
    q, k, v = (_packed(tensor) for tensor in (query, key, value))
    scale = paged.head_dim**-0.5 if scaling is None else scaling
    out = paged.attend(module.layer_idx, q, k, v, scale, sliding_window or NO_WINDOW, softcap or 0.0)
    return torch.from_numpy(out).to(query.dtype).unsqueeze(0), None


def _packed(tensor: torch.Tensor) -> Array:
    """[1, heads, tokens, head_dim] -> float32 [tokens, heads, head_dim], without a copy where that is its layout."""
    array: Array = tensor[0].transpose(0, 1).float().contiguous().numpy()
    return array
