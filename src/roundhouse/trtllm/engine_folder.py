"""A compiled engine's folder: `config.json` as trtllm-build writes it, `rank<N>.engine`, and our `manifest.json`.

What is in the engine is read from its config.json, never from the command line that built it: trtllm-build changes
flags without failing. Layout: TensorRT-LLM 1.2.1, tensorrt_llm/builder.py, EngineConfig.to_dict and Engine.save.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

CONFIG = "config.json"
MANIFEST = "manifest.json"
LOGS = "logs"


class EngineFolderError(Exception):
    """The folder holds no engine that can be read. One line that names the file and the way out."""


class SpeculativeMode(IntEnum):
    """What the engine was compiled for; config.json holds the number (tensorrt_llm/models/modeling_utils.py)."""

    NONE = 1
    DRAFT_TOKENS_EXTERNAL = 2
    MEDUSA = 4
    LOOKAHEAD_DECODING = 8
    EXPLICIT_DRAFT_TOKENS = 16
    EAGLE = 32


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What `roundhouse build` built the engine from.

    key: hash over checkpoint_hash, tensorrt_llm, compute_capability and commands; equal keys mean equal engines.
    checkpoint_files: size in bytes and mtime in ns of what checkpoint_hash was taken over.
    commands: as they were run, with {model}, {checkpoint} and {engine} in place of the folders of that run.
    files: size in bytes of each file of the engine.
    seconds: of each step. built_at: ISO 8601, UTC. roundhouse: our version.
    """

    key: str
    checkpoint: str
    checkpoint_hash: str
    checkpoint_files: dict[str, tuple[int, int]]
    tensorrt_llm: str
    compute_capability: str
    gpu: str
    commands: list[list[str]]
    files: dict[str, int]
    seconds: dict[str, float]
    built_at: str
    roundhouse: str


@dataclass(frozen=True, kw_only=True)
class EngineFolder:
    """Attributes:
    version: of the TensorRT-LLM that compiled it.
    dtype: of weights that are not quantised, and of activations.
    quant_algo, kv_cache_quant_algo: as in the checkpoint, such as FP8; None: not quantised.
    max_batch_size, max_seq_len, max_num_tokens, max_beam_width: limits in sequences, tokens, tokens of a step, beams.
    tokens_per_block: tokens of a KV block.
    kv_cache_type: PAGED, CONTINUOUS or DISABLED.
    packed_input: remove_input_padding, which in-flight batching needs.
    max_draft_len: draft tokens that it can check in one step.
    world_size, tensor_parallel: ranks in all, and those that share a layer.
    rank_files: bytes of each rank<N>.engine that is there.
    manifest: None if `roundhouse build` did not make this folder.
    """

    path: Path
    version: str
    architecture: str
    dtype: str
    vocab_size: int
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    max_beam_width: int
    tokens_per_block: int
    kv_cache_type: str
    packed_input: bool
    context_fmha: bool
    paged_context_fmha: bool
    fp8_context_fmha: bool
    reduce_fusion: bool
    speculative_mode: SpeculativeMode
    max_draft_len: int
    gather_context_logits: bool
    lora: bool
    world_size: int
    tensor_parallel: int
    rank_files: Mapping[str, int]
    manifest: Manifest | None


def read(path: Path | str) -> EngineFolder:
    """Read an engine folder. Raises EngineFolderError if it is missing, incomplete, or not one of TensorRT-LLM >= 1."""
    path = Path(path)
    config = _json(path / CONFIG)
    try:
        pretrained, build = config["pretrained_config"], config["build_config"]
        plugins, mapping, quantization = build["plugin_config"], pretrained["mapping"], pretrained["quantization"]
        return EngineFolder(
            path=path,
            version=config["version"],
            architecture=pretrained["architecture"],
            dtype=pretrained["dtype"],
            vocab_size=pretrained["vocab_size"],
            quant_algo=quantization["quant_algo"],
            kv_cache_quant_algo=quantization["kv_cache_quant_algo"],
            max_batch_size=build["max_batch_size"],
            max_seq_len=build["max_seq_len"],
            max_num_tokens=build["max_num_tokens"],
            max_beam_width=build["max_beam_width"],
            tokens_per_block=plugins["tokens_per_block"],
            kv_cache_type=str(build["kv_cache_type"]).upper(),
            packed_input=bool(plugins["remove_input_padding"]),
            context_fmha=bool(plugins["context_fmha"]),
            paged_context_fmha=bool(plugins["use_paged_context_fmha"]),
            fp8_context_fmha=bool(plugins["use_fp8_context_fmha"]),
            reduce_fusion=bool(plugins["reduce_fusion"]),
            speculative_mode=SpeculativeMode(build["speculative_decoding_mode"]),
            max_draft_len=build["max_draft_len"],
            gather_context_logits=bool(build["gather_context_logits"]),
            lora=plugins["lora_plugin"] is not None,
            world_size=mapping["world_size"],
            tensor_parallel=mapping["tp_size"],
            rank_files={file.name: file.stat().st_size for file in sorted(path.glob("rank*.engine"))},
            manifest=_manifest(path),
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
        raise EngineFolderError(
            f"{path / CONFIG}: {what}; it is not that of a TensorRT-LLM 1.x engine: build it with roundhouse build"
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    (path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def engine_files(path: Path) -> dict[str, int]:
    """Bytes of each file that trtllm-build wrote; folders with all that is in them, logs and manifest left out."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    return {name: size for name, size in sizes.items() if name != MANIFEST and not name.startswith(f"{LOGS}/")}


def checkpoint_files(path: Path | str) -> dict[str, tuple[int, int]]:
    """What defines a Hugging Face checkpoint: its JSON files and weights, each with size in bytes and mtime in ns.

    Raises EngineFolderError if there is no config.json or there are no weights.
    """
    path = Path(path)
    _json(path / CONFIG)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise EngineFolderError(f"{path}: has no *.safetensors; download the checkpoint, or convert its weights")
    statuses = {file.name: file.stat() for file in (*sorted(path.glob("*.json")), *weights)}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in statuses.items()}


def checkpoint_hash(path: Path | str, names: Iterable[str], read: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 over names and contents; `read` hears of each file's bytes once they are read."""
    digest = hashlib.sha256()
    for name in sorted(names):
        with (Path(path) / name).open("rb") as content:
            digest.update(f"{name}\0".encode() + hashlib.file_digest(content, "sha256").digest())
            read(content.tell())
    return digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise EngineFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EngineFolderError(f"{path}: is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise EngineFolderError(f"{path}: is not a JSON object")
    return parsed


def _manifest(path: Path) -> Manifest | None:
    file = path / MANIFEST
    if not file.exists():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise EngineFolderError(f"{file}: {error}; build the engine again with roundhouse build") from error
