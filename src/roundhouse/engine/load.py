"""From a deployment to its engine. The library of an engine is imported only if that engine is asked for."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

from roundhouse.deployment import Deployment, SyntheticEngine, TensorrtLlmEngine, TransformersEngine, VllmEngine
from roundhouse.engine.base import Engine, EngineError

if TYPE_CHECKING:
    from roundhouse.engine.embedded.config import DType


def load_engine(deployment: Deployment) -> Engine:
    """Load the engine of a deployment. Raises EngineError if it cannot be loaded; the message says what to change."""
    match deployment.engine:
        case TransformersEngine() as section:
            return _transformers(deployment, section)
        case SyntheticEngine() as section:
            return _synthetic(deployment, section)
        case VllmEngine() as section:
            return _vllm(deployment, section)
        case TensorrtLlmEngine() as section:
            return _tensorrt_llm(deployment, section)


def _transformers(deployment: Deployment, section: TransformersEngine) -> Engine:
    # libgomp reads it when torch brings it. Its threads look for work 300,000 times before they sleep, 3 ms in which
    # tokens that are made wait for a core: nothing of ours could run.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from roundhouse.engine.embedded import EmbeddedConfig
    from roundhouse.engine.embedded.engine import EmbeddedEngine

    limits, cache = deployment.limits, deployment.kv_cache
    return EmbeddedEngine(
        EmbeddedConfig(
            model=deployment.model.path,
            dtype=cast("DType", deployment.precision.weights),  # the schema allows this engine no others
            kv_dtype=cast("DType", deployment.precision.kv_cache),
            max_batch_size=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
            max_num_tokens=limits.max_num_tokens,
            max_queue=limits.queue,
            chunked_prefill=deployment.scheduling.chunked_prefill,
            tokens_per_block=cache.tokens_per_block,
            kv_tokens=cache.tokens,
            reuse=cache.reuse,
            threads=section.threads,
        )
    )


def _synthetic(deployment: Deployment, section: SyntheticEngine) -> Engine:
    from roundhouse.engine.synthetic import SyntheticConfig, SyntheticEngine
    from roundhouse.text.tokenizer import Tokenizer

    model = deployment.model
    try:
        tokenizer = Tokenizer.load(model.tokenizer or model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise EngineError(f"model.tokenizer: {error}") from error
    settings = section.model_dump(exclude={"kind"})
    limits, cache = deployment.limits, deployment.kv_cache
    return SyntheticEngine(
        SyntheticConfig(
            vocab_size=tokenizer.vocab_size,
            max_batch_size=limits.max_batch_size,
            max_seq_len=limits.max_seq_len or 2048,
            max_queue=limits.queue,
            tokens_per_block=cache.tokens_per_block,
            kv_tokens=cache.tokens,
            reuse=cache.reuse,
            **settings,
        )
    )


def _vllm(deployment: Deployment, section: VllmEngine) -> Engine:
    if section.eager:  # torch reads it when it is imported; vLLM compiles small functions at their first use otherwise
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        from roundhouse.engine.vllm.config import of_deployment
        from roundhouse.engine.vllm.engine import VllmEngine as Vllm
    except ModuleNotFoundError as error:
        raise EngineError(
            f"engine.kind: vllm: {sys.executable} has no module {error.name}; run scripts/setup --vllm and set "
            "ROUNDHOUSE_ENGINE_PYTHON=$PWD/.venv-vllm/bin/python (on GPUs: docs/vllm.md)"
        ) from error

    return Vllm(of_deployment(deployment, section))


def _tensorrt_llm(deployment: Deployment, section: TensorrtLlmEngine) -> Engine:
    try:
        import tensorrt_llm
        import torch
    except ImportError as error:
        raise EngineError(
            f"engine.kind: tensorrt_llm needs TensorRT-LLM in the engine's environment ({error}); start the image of "
            "build/, or set ROUNDHOUSE_ENGINE_PYTHON to a Python that has it"
        ) from error
    from roundhouse.engine.tensorrt_llm.config import of_deployment
    from roundhouse.engine.tensorrt_llm.engine import TensorrtLlmEngine as TensorrtLlm
    from roundhouse.trtllm import gate
    from roundhouse.trtllm.engine_folder import EngineFolder, EngineFolderError, read

    capability = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None

    def checked(path: str, role: gate.Role) -> EngineFolder:
        engine = read(path)
        gate.enforce(
            engine, gate.wanted(deployment, role), version=tensorrt_llm.__version__, compute_capability=capability
        )
        return engine

    try:
        engine = checked(section.path, "target")
        speculative = deployment.speculative
        draft = checked(speculative.draft_engine, "draft") if speculative and speculative.draft_engine else None
    except (EngineFolderError, gate.GateError) as error:
        raise EngineError(str(error)) from error
    return TensorrtLlm(of_deployment(deployment, section, engine, draft))
