"""The gate between a compiled engine and a deployment: after building, and again when the engine is loaded.

Pure functions. Each mismatch is one line that names the key of the deployment, what the engine has instead, why
(trtllm-build changes flags in silence: tensorrt_llm/builder.py, build()), and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from roundhouse.deployment import Deployment, TensorrtLlmEngine
from roundhouse.trtllm.engine_folder import EngineFolder, SpeculativeMode

Role = Literal["target", "draft"]

QUANT_ALGO = {"fp8": "FP8", "int4_awq": "W4A16_AWQ"}  # of precision.weights; others are not quantised
FP8_CONTEXT_FMHA = ("FP8", "W4A8_AWQ", "NVFP4")  # quant_algo that FP8 context attention exists for
FP8_CAPABILITY = (8, 9)  # the first compute capability with FP8 context attention


class GateError(Exception):
    """An engine is not what its deployment asks for. One line for each mismatch."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a deployment asks of one engine. `dtype` None: any; `quant_algo` None: weights that are not quantised."""

    dtype: str | None
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    tokens_per_block: int
    paged_context_fmha: bool
    fp8_context_fmha: bool
    max_draft_len: int
    tensor_parallel: int
    fusions: bool


def wanted(deployment: Deployment, role: Role = "target") -> Wanted:
    """What the engine of this role must offer. The deployment is one of the `tensorrt_llm` engine, already checked."""
    precision, limits, speculative = deployment.precision, deployment.limits, deployment.speculative
    assert deployment.gpu is not None, "checked by the schema"
    assert limits.max_seq_len is not None, "checked by the schema"
    batch, draft_len = limits.max_batch_size, 0
    if speculative is not None:
        batch = speculative.max_batch_size if role == "draft" else batch
        draft_len = speculative.draft_tokens if role == "target" else 0
    quantised = precision.weights in QUANT_ALGO
    fp8_cache = precision.kv_cache == "fp8"
    return Wanted(
        dtype=None if quantised or precision.weights == "auto" else precision.weights,
        quant_algo=QUANT_ALGO.get(precision.weights),
        kv_cache_quant_algo="FP8" if fp8_cache else None,
        max_batch_size=batch,
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
        tokens_per_block=deployment.kv_cache.tokens_per_block,
        paged_context_fmha=deployment.kv_cache.reuse or deployment.scheduling.chunked_prefill,
        fp8_context_fmha=fp8_cache and precision.weights == "fp8",
        max_draft_len=draft_len,
        tensor_parallel=deployment.gpu.tensor_parallel,
        fusions=isinstance(deployment.engine, TensorrtLlmEngine) and deployment.engine.fusions,
    )


def enforce(engine: EngineFolder, want: Wanted, *, version: str, compute_capability: str | None) -> None:
    """Raises GateError with one line for each mismatch; see `mismatches`."""
    if found := list(mismatches(engine, want, version=version, compute_capability=compute_capability)):
        raise GateError("\n".join(f"{engine.path}: {line}" for line in found))


def mismatches(engine: EngineFolder, want: Wanted, *, version: str, compute_capability: str | None) -> Iterator[str]:
    """One line for each thing in which the engine is not what is wanted.

    `version`: of the installed TensorRT-LLM. `compute_capability`: of the GPUs here, such as 9.0; None: not known, and
    not checked.
    """
    yield from _platform(engine, version, compute_capability)
    yield from _files(engine)
    yield from _precision(engine, want)
    yield from _attention(engine, want, compute_capability)
    yield from _limits(engine, want)


def _platform(engine: EngineFolder, version: str, compute_capability: str | None) -> Iterator[str]:
    again = "build it again on the machine and in the image that serve it"
    if engine.version != version:
        yield f"compiled by TensorRT-LLM {engine.version}, and {version} is installed; {again}"
    built_for = engine.manifest.compute_capability if engine.manifest else None
    if built_for and compute_capability and built_for != compute_capability:
        gpu = engine.manifest.gpu if engine.manifest else ""
        yield f"compiled for compute capability {built_for} ({gpu}), and these GPUs have {compute_capability}; {again}"


def _files(engine: EngineFolder) -> Iterator[str]:
    expected = {f"rank{rank}.engine" for rank in range(engine.world_size)}
    if missing := sorted(expected - set(engine.rank_files)):
        yield f"{', '.join(missing)}: missing; the engine has {engine.world_size} ranks: build it, or copy it, again"
    if surplus := sorted(set(engine.rank_files) - expected):
        yield f"{', '.join(surplus)}: left over from an engine of more than {engine.world_size} ranks; build it again"
    for name, size in engine.rank_files.items():
        built = engine.manifest.files.get(name, size) if engine.manifest else size
        if size != built or size == 0:
            yield f"{name}: has {size:,} bytes, and {built:,} were built; copy the folder again"


def _precision(engine: EngineFolder, want: Wanted) -> Iterator[str]:
    if engine.quant_algo != want.quant_algo:
        yield (
            f"precision.weights: quant_algo is {engine.quant_algo} in the engine, and {want.quant_algo} is wanted; "
            "the checkpoint was quantised otherwise: change the key, or build again"
        )
    if want.dtype is not None and engine.dtype != want.dtype:
        yield f"precision.weights: dtype is {engine.dtype} in the engine, and {want.dtype} is wanted; build again"
    if engine.kv_cache_quant_algo != want.kv_cache_quant_algo:
        yield (
            f"precision.kv_cache: kv_cache_quant_algo is {engine.kv_cache_quant_algo} in the engine, and "
            f"{want.kv_cache_quant_algo} is wanted; it comes from quantize.py --kv_cache_dtype: build again"
        )
    if engine.kv_cache_type != "PAGED":
        yield f"kv_cache_type is {engine.kv_cache_type} in the engine; in-flight batching needs PAGED: build again"
    if not engine.packed_input:
        yield "remove_input_padding is off in the engine; in-flight batching needs packed input: build again"


def _attention(engine: EngineFolder, want: Wanted, compute_capability: str | None) -> Iterator[str]:
    if want.paged_context_fmha and not engine.paged_context_fmha:
        reason = why_no_paged_context_fmha(engine, compute_capability)
        yield (
            f"kv_cache.reuse, scheduling.chunked_prefill: use_paged_context_fmha is off in the engine, since {reason}; "
            "or set both keys to false"
        )
    if want.fp8_context_fmha and not engine.fp8_context_fmha:
        reason = why_no_fp8_context_fmha(engine, compute_capability)
        yield f"precision: use_fp8_context_fmha is off in the engine, since {reason}"
    if want.fusions and not engine.reduce_fusion:
        yield (
            "engine.fusions: reduce_fusion is off in the engine; trtllm-build turns it off for one rank, and for "
            f"architectures other than Llama, Gemma 2 and Medusa (this is {engine.architecture}): set the key to false"
        )


def why_no_fp8_context_fmha(engine: EngineFolder, compute_capability: str | None) -> str:
    """Which rule of trtllm-build turned FP8 context attention off, and the way out."""
    capability = _built_for(engine, compute_capability)
    if not engine.context_fmha:
        return "context_fmha is off, which turns it off: build with --context_fmha enable"
    if engine.quant_algo not in FP8_CONTEXT_FMHA:
        return (
            f"trtllm-build turns it off for quant_algo {engine.quant_algo} (it needs one of "
            f"{', '.join(FP8_CONTEXT_FMHA)}): choose precision.weights: fp8"
        )
    if capability is not None and capability < FP8_CAPABILITY:
        return (
            f"trtllm-build turns it off below compute capability {_dotted(FP8_CAPABILITY)} (this is "
            f"{_dotted(capability)}): choose an Ada or Hopper GPU"
        )
    if engine.paged_context_fmha and engine.kv_cache_quant_algo != "FP8":
        return (
            "trtllm-build turns it off when paged context attention is on without an FP8 KV cache: "
            "choose precision.kv_cache: fp8"
        )
    return "the command line did not ask for it: build with --use_fp8_context_fmha enable"


def why_no_paged_context_fmha(engine: EngineFolder, compute_capability: str | None) -> str:
    """Which rule of trtllm-build turned paged context attention off, and the way out."""
    capability = _built_for(engine, compute_capability)
    if not engine.context_fmha:
        return "context_fmha is off, which turns it off: build with --context_fmha enable"
    if engine.kv_cache_quant_algo == "INT8":
        return "trtllm-build turns it off with an INT8 KV cache: choose precision.kv_cache: fp8"
    too_old = capability is not None and capability < FP8_CAPABILITY
    if engine.kv_cache_quant_algo == "FP8" and (engine.quant_algo not in FP8_CONTEXT_FMHA or too_old):
        return (
            "trtllm-build turns it off with an FP8 KV cache wherever FP8 context attention is off, and "
            f"{why_no_fp8_context_fmha(engine, compute_capability)}"
        )
    return "the command line did not ask for it: build with --use_paged_context_fmha enable"


def _limits(engine: EngineFolder, want: Wanted) -> Iterator[str]:
    """The engine may offer more than is wanted."""
    at_least = {
        "limits.max_batch_size": (engine.max_batch_size, want.max_batch_size),
        "limits.max_seq_len": (engine.max_seq_len, want.max_seq_len),
        # trtllm-build cuts it down to what a full batch of full sequences can hold
        "limits.max_num_tokens": (
            engine.max_num_tokens,
            min(want.max_num_tokens, want.max_batch_size * want.max_seq_len),
        ),
    }
    for key, (has, needs) in at_least.items():
        if has < needs:
            yield f"{key}: the engine was compiled for {has:,}, and {needs:,} is wanted; lower the key, or build again"
    if engine.tokens_per_block != want.tokens_per_block:
        yield (
            f"kv_cache.tokens_per_block: the engine was compiled for {engine.tokens_per_block}, and "
            f"{want.tokens_per_block} is wanted; change the key, or build again"
        )
    if engine.tensor_parallel != want.tensor_parallel or engine.world_size != want.tensor_parallel:
        yield (
            f"gpu.tensor_parallel: the engine was compiled for {engine.world_size} ranks, {engine.tensor_parallel} of "
            f"them tensor parallel, and {want.tensor_parallel} is wanted; change the key, or build again"
        )
    if not want.max_draft_len:
        return
    if engine.speculative_mode is not SpeculativeMode.DRAFT_TOKENS_EXTERNAL:
        yield (
            f"speculative: the engine was compiled for {engine.speculative_mode.name}, and DRAFT_TOKENS_EXTERNAL is "
            "wanted; remove the section, or build again"
        )
    elif engine.max_draft_len < want.max_draft_len:
        yield (
            f"speculative.draft_tokens: the engine was compiled for {engine.max_draft_len}, and {want.max_draft_len} "
            "is wanted; lower the key, or build again"
        )


def _built_for(engine: EngineFolder, compute_capability: str | None) -> tuple[int, ...] | None:
    """The compute capability that the rules of trtllm-build saw."""
    text = engine.manifest.compute_capability if engine.manifest else compute_capability
    return tuple(int(part) for part in text.split(".")) if text else None


def _dotted(capability: tuple[int, ...]) -> str:
    return ".".join(map(str, capability))
