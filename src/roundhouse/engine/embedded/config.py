"""Settings of the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """Attributes:
    model: a Hugging Face model folder with a causal language model in safetensors.
    dtype: of weights and activations; auto is bfloat16 where that is faster and the checkpoint loses nothing by it.
    kv_dtype: of the KV pool; auto is float32 unless the activations are bfloat16.
    max_batch_size: sequences that generate at the same time.
    max_seq_len: prompt and answer, in tokens; None is the model's own.
    max_num_tokens: tokens of one step, prefill and decode together; at least max_batch_size.
    max_queue: told to the fronts in EngineInfo; the engine process enforces it.
    chunked_prefill: split prompts over steps.
    tokens_per_block: tokens of a KV block.
    kv_tokens: size of the KV pool in tokens; None is max_batch_size sequences of max_seq_len, but at most a quarter
        of the machine's memory.
    reuse: share the KV blocks of equal prefixes.
    threads: CPU threads; None is all cores.
    fused: False keeps Llama-like models off the fused path, for comparison.
    """

    model: Path | str
    dtype: DType = "auto"
    kv_dtype: DType = "auto"
    max_batch_size: int = 64
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    max_queue: int = 512
    chunked_prefill: bool = True
    tokens_per_block: int = 32
    kv_tokens: int | None = None
    reuse: bool = True
    threads: int | None = None
    fused: bool = True
