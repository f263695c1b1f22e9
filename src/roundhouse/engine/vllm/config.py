"""Settings of the vLLM engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from roundhouse.deployment import Deployment
from roundhouse.deployment import VllmEngine as VllmSection
from roundhouse.engine.base import EngineError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be
DTYPES = {"fp8": "bfloat16", "int4_awq": "auto"}  # of activations, where precision.weights is not one itself
CPU_KV_BYTES = 4 * 2**30  # on a CPU, unless the deployment says memory_fraction or kv_cache.tokens


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """Attributes:
    model: a Hugging Face model folder.
    tokenizer: folder of its tokenizer; None switches guided decoding off, the only thing here that needs one.
    dtype: of weights and activations; auto is the checkpoint's.
    quantization: how vLLM quantises the weights while it loads them; None leaves them as they are.
    int4_awq: the checkpoint has to be one that was quantised so; vLLM sees to the rest.
    kv_dtype: of the KV cache; auto is that of the activations.
    max_batch_size: sequences that generate at the same time.
    max_seq_len: prompt and answer, in tokens; None is the model's own.
    max_num_tokens: tokens of one step, prefill and decode together.
    max_queue: told to the fronts in EngineInfo; the engine process enforces it.
    tokens_per_block: tokens of a KV block.
    kv_tokens: size of the KV cache in tokens; None is what memory_fraction leaves after the weights.
    reuse: share the KV blocks of equal prefixes (prefix caching).
    memory_fraction: of the GPU's whole memory, for weights, activations and KV cache; None is vLLM's default.
    tensor_parallel: GPUs that share the model.
    eager: no compilation and no CUDA graphs: loads fast, runs slow.
    load_format: dummy draws random weights, for benchmarks.
    speculative: vLLM's speculative_config; None is no speculation.
    lora: LoRA adapters, id -> folder.
    """

    model: Path | str
    tokenizer: Path | str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    int4_awq: bool = False
    kv_dtype: str = "auto"
    max_batch_size: int = 64
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    max_queue: int = 512
    chunked_prefill: bool = True
    tokens_per_block: int = 16
    kv_tokens: int | None = None
    reuse: bool = True
    memory_fraction: float | None = None
    tensor_parallel: int = 1
    eager: bool = False
    load_format: Literal["auto", "dummy"] = "auto"
    speculative: dict[str, Any] | None = None
    lora: dict[int, str] = field(default_factory=dict)


def engine_arguments(config: VllmConfig) -> dict[str, Any]:
    """The keyword arguments of vLLM's EngineArgs. Raises EngineError if the limits contradict each other."""
    if config.max_num_tokens < config.max_batch_size:
        raise EngineError(
            f"limits.max_num_tokens: {config.max_num_tokens} is less than limits.max_batch_size "
            f"({config.max_batch_size}); each running sequence needs one token a step"
        )
    arguments: dict[str, Any] = {
        "model": str(config.model),
        "tokenizer": str(config.tokenizer or config.model),
        "skip_tokenizer_init": config.tokenizer is None,
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_dtype,
        "max_num_seqs": config.max_batch_size,
        "max_num_batched_tokens": config.max_num_tokens,
        "enable_chunked_prefill": config.chunked_prefill,
        "enable_prefix_caching": config.reuse,
        "block_size": config.tokens_per_block,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "enforce_eager": config.eager,
        "load_format": config.load_format,
        "scheduling_policy": "priority",
        "speculative_config": config.speculative,
        "generation_config": "vllm",  # a request says all that it wants; the model folder adds nothing
        # JSON without free blanks: a small model that may write blanks writes nothing else
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if config.lora:
        # On a CPU vLLM computes sequences that have no adapter with the last slot: one more than are used stays empty.
        slots = len(config.lora) + (0 if torch.cuda.is_available() else 1)
        arguments |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": _lora_rank(config.lora)}
    if config.max_seq_len is not None:
        arguments["max_model_len"] = config.max_seq_len
    if config.memory_fraction is not None:
        arguments["gpu_memory_utilization"] = config.memory_fraction
    elif not torch.cuda.is_available():  # the default share, 0.92, is meant for a GPU that nobody else uses
        arguments["kv_cache_memory_bytes"] = CPU_KV_BYTES
    if config.kv_tokens is not None:  # vLLM keeps one block for itself
        arguments["num_gpu_blocks_override"] = config.kv_tokens // config.tokens_per_block + 1
    return arguments


def _lora_rank(adapters: dict[int, str]) -> int:
    """The smallest rank that vLLM reserves room for and all adapters fit into. Raises EngineError."""
    ranks = {}
    for id, folder in adapters.items():
        try:
            ranks[id] = int(json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"])
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(f"engine.lora.{id}: {folder}/adapter_config.json has no rank: {error}") from error
        if ranks[id] > LORA_RANKS[-1]:
            raise EngineError(f"engine.lora.{id}: rank {ranks[id]} is more than vLLM's {LORA_RANKS[-1]}")
    return next(rank for rank in LORA_RANKS if rank >= max(ranks.values()))


def of_deployment(deployment: Deployment, section: VllmSection) -> VllmConfig:
    """The settings that a checked deployment asks for."""
    weights, kv_cache = deployment.precision.weights, deployment.precision.kv_cache
    return VllmConfig(
        model=deployment.model.path,
        tokenizer=deployment.model.tokenizer,
        trust_remote_code=deployment.model.trust_remote_code,
        dtype=DTYPES.get(weights, weights),
        quantization="fp8" if weights == "fp8" else None,
        int4_awq=weights == "int4_awq",
        kv_dtype=section.fp8_kv_format if kv_cache == "fp8" else "auto",
        max_batch_size=deployment.limits.max_batch_size,
        max_seq_len=deployment.limits.max_seq_len,
        max_num_tokens=deployment.limits.max_num_tokens,
        max_queue=deployment.limits.queue,
        chunked_prefill=deployment.scheduling.chunked_prefill,
        tokens_per_block=deployment.kv_cache.tokens_per_block,
        kv_tokens=deployment.kv_cache.tokens,
        reuse=deployment.kv_cache.reuse,
        memory_fraction=section.memory_fraction,
        tensor_parallel=deployment.gpu.tensor_parallel if deployment.gpu else 1,
        eager=section.eager,
        load_format=section.load_format,
        speculative=_speculative(deployment, section),
        lora=section.lora,
    )


def _speculative(deployment: Deployment, section: VllmSection) -> dict[str, Any] | None:
    if section.ngram is not None:
        return {
            "method": "ngram",
            "num_speculative_tokens": section.ngram.draft_tokens,
            "prompt_lookup_min": section.ngram.match_tokens,
            "prompt_lookup_max": section.ngram.match_tokens,
        }
    if (wanted := deployment.speculative) is not None:
        limit, running = wanted.max_batch_size, deployment.limits.max_batch_size
        result = {
            "method": "draft_model" if wanted.method == "draft_target" else wanted.method,
            "model": wanted.draft_model,
            "num_speculative_tokens": wanted.draft_tokens,
        }
        if limit < running:  # inclusive ranges of running sequences, and what is drafted for each
            schedule = [(1, limit, wanted.draft_tokens), (limit + 1, running, 0)]
            result["num_speculative_tokens_per_batch_size"] = schedule
        return result
    return None
