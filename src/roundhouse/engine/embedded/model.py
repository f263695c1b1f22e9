"""Loading a Hugging Face model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from roundhouse.engine.base import EngineError
from roundhouse.engine.embedded.config import EmbeddedConfig
from roundhouse.engine.embedded.generic import ATTENTION
from roundhouse.engine.embedded.pool import Shape

SMALL = 100 * 2**20  # bytes of weights


def load(config: EmbeddedConfig) -> Any:
    """The model in inference mode, its attention set to ours. Reads local files only, safetensors only, runs no code.

    Raises EngineError if the folder holds no model that this engine can run.
    """
    folder = Path(config.model)
    if not (folder / "config.json").is_file():
        raise EngineError(f"model.path: {folder} has no config.json; it must be a Hugging Face model folder")
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
        if "trust_remote_code" in str(error):  # what transformers asks for where it lacks the model's code itself
            raise EngineError(
                "model.trust_remote_code: the embedded engine runs no code of a model folder; use engine.kind: vllm"
            ) from error
        raise EngineError(f"model.path: {folder} cannot be loaded: {error}") from error
    model.train(False)
    _check_layers(model.config.get_text_config())
    return model


def shape(model: Any) -> Shape:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def steady_length(config: Any) -> int | None:
    """Up to which a position's RoPE is always the same; None is any length.

    Beyond the original length of longrope, transformers takes other frequencies for all tokens of a step, by its
    longest sequence. Those of `dynamic` change only beyond max_position_embeddings, which no sequence exceeds here.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # one, or one for each layer type
    return min(
        (each["original_max_position_embeddings"] for each in kinds if each.get("rope_type") == "longrope"),
        default=None,
    )


def _check_layers(config: Any) -> None:
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
    # a bfloat16 product costs some 20 microseconds more a call than a float32 one; little weights never win that back
    return torch.bfloat16 if half and amx and weights > SMALL else torch.float32
