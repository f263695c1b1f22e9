"""Settings of the TensorRT-LLM engine, and the Executor's configuration that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tensorrt_llm
import tensorrt_llm.bindings.executor as trtllm

from roundhouse.deployment import Deployment
from roundhouse.deployment import TensorrtLlmEngine as TensorrtLlmSection
from roundhouse.engine.base import EngineError
from roundhouse.engine.tensorrt_llm.arguments import given
from roundhouse.text.tokenizer import Tokenizer
from roundhouse.trtllm.engine_folder import EngineFolder

ITERATIONS = 1000  # of which statistics are kept until they are fetched, ten times a second
# Ranks in orchestrator mode are processes of this program: the Triton image's, or the package's own.
WORKERS = (
    Path("/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"),
    Path(tensorrt_llm.__file__).parent / "bin/executorWorker",
)


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Attributes:
    engine: the draft model's engine folder.
    draft_tokens: drafted before each check.
    max_batch_size: with more live requests nothing is drafted.
    """

    engine: EngineFolder
    draft_tokens: int
    max_batch_size: int


@dataclass(frozen=True, kw_only=True)
class TensorrtLlmConfig:
    """Attributes:
    engine: the compiled engine; its limits are at least those below.
    tokenizer: of the model; None switches guided decoding and the check of reused blocks off.
    max_batch_size: sequences that generate at the same time.
    max_seq_len: prompt and answer, in tokens; None is the engine's.
    max_num_tokens: tokens of one step, prefill and decode together.
    max_queue: told to the fronts in EngineInfo; the engine process enforces it.
    kv_tokens: size of the KV cache in tokens; None is what memory_fraction leaves.
    reuse: share the KV blocks of equal prefixes.
    partial_reuse: also the first tokens of a block, by copying; None is TensorRT-LLM's default.
    memory_fraction: of the GPU memory that is free after the weights, for the KV cache; None is 0.9.
    host_memory_bytes: evicted blocks are kept there.
    policy: what is admitted: what surely fits to its end, or what fits now (others are paused).
    launch: who starts the ranks of a tensor parallel engine: mpirun (leader), or the Executor (orchestrator).
    drafting: speculative decoding with a draft model.
    """

    engine: EngineFolder
    tokenizer: Tokenizer | None = None
    max_batch_size: int = 64
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    max_queue: int = 512
    chunked_prefill: bool = True
    kv_tokens: int | None = None
    reuse: bool = True
    partial_reuse: bool | None = None
    memory_fraction: float | None = None
    host_memory_bytes: int = 0
    policy: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    launch: Literal["leader", "orchestrator"] = "leader"
    drafting: Drafting | None = None

    @property
    def seq_len(self) -> int:
        return self.max_seq_len or self.engine.max_seq_len


def of_deployment(
    deployment: Deployment, section: TensorrtLlmSection, engine: EngineFolder, draft: EngineFolder | None
) -> TensorrtLlmConfig:
    """The settings that a checked deployment asks for; `engine` and `draft` have passed the gate."""
    model, limits, cache, speculative = (
        deployment.model,
        deployment.limits,
        deployment.kv_cache,
        deployment.speculative,
    )
    try:
        tokenizer = Tokenizer.load(model.tokenizer or model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise EngineError(f"model.tokenizer: {error}") from error
    drafting = None
    if speculative is not None and draft is not None:
        drafting = Drafting(
            engine=draft, draft_tokens=speculative.draft_tokens, max_batch_size=speculative.max_batch_size
        )
    return TensorrtLlmConfig(
        engine=engine,
        tokenizer=tokenizer,
        max_batch_size=limits.max_batch_size,
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
        max_queue=limits.queue,
        chunked_prefill=deployment.scheduling.chunked_prefill,
        kv_tokens=cache.tokens,
        reuse=cache.reuse,
        partial_reuse=cache.partial_reuse,
        memory_fraction=cache.free_memory_fraction,
        host_memory_bytes=cache.host_memory_bytes,
        policy=deployment.scheduling.policy,
        launch=section.launch,
        drafting=drafting,
    )


def target_config(config: TensorrtLlmConfig) -> Any:
    """The ExecutorConfig of the engine that answers."""
    cache = trtllm.KvCacheConfig(
        **given(
            enable_block_reuse=config.reuse,
            enable_partial_reuse=config.partial_reuse,
            max_tokens=config.kv_tokens,
            free_gpu_memory_fraction=config.memory_fraction,
            host_cache_size=config.host_memory_bytes or None,
        )
    )
    return _executor_config(config, config.engine, config.max_batch_size, cache, guided=config.tokenizer is not None)


def draft_config(config: TensorrtLlmConfig, drafting: Drafting) -> Any:
    """The ExecutorConfig of the draft model's engine.

    It is loaded first, with room for just the sequences that it drafts for: what it leaves free is the target's.
    """
    cache = trtllm.KvCacheConfig(enable_block_reuse=True, max_tokens=drafting.max_batch_size * config.seq_len)
    return _executor_config(config, drafting.engine, drafting.max_batch_size, cache, guided=False)


def _executor_config(
    config: TensorrtLlmConfig, engine: EngineFolder, batch_size: int, cache: Any, *, guided: bool
) -> Any:
    policy = trtllm.CapacitySchedulerPolicy
    policies = {"guaranteed_no_evict": policy.GUARANTEED_NO_EVICT, "max_utilization": policy.MAX_UTILIZATION}
    return trtllm.ExecutorConfig(
        **given(
            max_beam_width=1,
            batching_type=trtllm.BatchingType.INFLIGHT,
            scheduler_config=trtllm.SchedulerConfig(
                policies[config.policy], trtllm.ContextChunkingPolicy.FIRST_COME_FIRST_SERVED
            ),
            kv_cache_config=cache,
            enable_chunked_context=config.chunked_prefill,
            max_batch_size=batch_size,
            max_num_tokens=min(config.max_num_tokens, engine.max_num_tokens),
            iter_stats_max_iterations=ITERATIONS,
            parallel_config=_parallel_config(config, engine),
            guided_decoding_config=_guided_decoding_config(config.tokenizer) if guided else None,
        )
    )


def _parallel_config(config: TensorrtLlmConfig, engine: EngineFolder) -> Any:
    if config.launch == "leader":
        return None if engine.world_size == 1 else trtllm.ParallelConfig(trtllm.CommunicationType.MPI)
    worker = next((path for path in WORKERS if path.exists()), None)
    if worker is None:
        places = " or ".join(map(str, WORKERS))
        raise EngineError(f"engine.launch: orchestrator starts ranks with {places}, and neither exists; say leader")
    return trtllm.ParallelConfig(
        communication_mode=trtllm.CommunicationMode.ORCHESTRATOR,
        orchestrator_config=trtllm.OrchestratorConfig(True, str(worker)),
    )


def _guided_decoding_config(tokenizer: Tokenizer | None) -> Any:
    """XGrammar compiles guides against the texts of the vocabulary, in the order of the ids."""
    assert tokenizer is not None, "guided decoding is off without one"
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    texts = [""] * (max(ids.values()) + 1)  # ids may have gaps
    for text, token in ids.items():
        texts[token] = text
    return trtllm.GuidedDecodingConfig(
        backend=trtllm.GuidedDecodingConfig.GuidedDecodingBackend.XGRAMMAR,
        encoded_vocab=texts,
        tokenizer_str=tokenizer.backend.to_str(),
        stop_token_ids=list(tokenizer.end_ids),
    )
