"""Engine folders of the documented layout, and deployments of the tensorrt_llm engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from roundhouse import deployment as deployments
from roundhouse.trtllm import engine_folder

DEPLOYMENT: dict[str, Any] = {
    "model": {"path": "model"},
    "engine": {"kind": "tensorrt_llm", "path": "engine"},
    "precision": {"weights": "fp8", "kv_cache": "fp8"},
    "limits": {"max_batch_size": 16, "max_seq_len": 1024, "max_num_tokens": 2048},
    "gpu": {"product": "NVIDIA-H200"},
}
SPECULATIVE: dict[str, Any] = {
    "method": "draft_target",
    "draft_model": "draft",
    "draft_engine": "draft-engine",
    "draft_tokens": 5,
    "max_batch_size": 4,
}


def deployment(base: Path = Path(), **changes: Any) -> deployments.Deployment:
    """DEPLOYMENT with sections changed; `None` removes one."""
    raw = {**DEPLOYMENT}
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return deployments.parse(raw, source="test", base=base)


def engine_config(**changes: Any) -> dict[str, Any]:
    """config.json of an engine that DEPLOYMENT asks for. A change replaces the value wherever its key is."""
    config: dict[str, Any] = {
        "version": "1.2.1",
        "pretrained_config": {
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "vocab_size": 1024,
            "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        },
        "build_config": {
            "max_batch_size": 16,
            "max_seq_len": 1024,
            "max_num_tokens": 2048,
            "max_beam_width": 1,
            "kv_cache_type": "PAGED",
            "speculative_decoding_mode": 1,
            "max_draft_len": 0,
            "gather_context_logits": False,
            "plugin_config": {
                "tokens_per_block": 32,
                "remove_input_padding": True,
                "context_fmha": True,
                "use_paged_context_fmha": True,
                "use_fp8_context_fmha": True,
                "reduce_fusion": False,
                "lora_plugin": None,
            },
        },
    }
    for key, value in changes.items():
        _replace(config, key, value)
    return config


def write_engine(folder: Path, *, ranks: int = 1, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(engine_config(**changes)))
    for rank in range(ranks):
        (folder / f"rank{rank}.engine").write_bytes(b"engine")
    return folder


def manifest(folder: Path, **changes: Any) -> engine_folder.Manifest:
    fields: dict[str, Any] = {
        "key": "k",
        "checkpoint": "model",
        "checkpoint_hash": "h",
        "checkpoint_files": {},
        "tensorrt_llm": "1.2.1",
        "compute_capability": "9.0",
        "gpu": "NVIDIA H200",
        "commands": [],
        "files": engine_folder.engine_files(folder),
        "seconds": {},
        "built_at": "2026-01-01T00:00:00+00:00",
        "roundhouse": "0.1.0",
    }
    return engine_folder.Manifest(**{**fields, **changes})


def _replace(config: dict[str, Any], key: str, value: Any) -> None:
    if key in config:
        config[key] = value
        return
    for section in config.values():
        if isinstance(section, dict):
            _replace(section, key, value)
