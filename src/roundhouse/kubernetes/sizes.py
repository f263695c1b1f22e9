"""What a pod asks for: GPUs, cores, memory, shared memory. Figures that nobody measured say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundhouse.deployment import Deployment
from roundhouse.plan import PlanError, Shape

MIB = 2**20
GIB = 2**30
SHM_PER_INSTANCE = 64 * MIB  # of a Python model: 16 MiB to begin with (serve.py), and room to grow
SHM_PER_RANK = GIB  # for the collectives of each further GPU; assumed, not measured
CPU_CORES = 2
CPU_MEMORY = 2 * GIB  # of a pod without GPU, beside model and KV cache; local-cpu took 0.9 GiB (tests/k8s/test_pod.py)
DEFAULT_SEQ_LEN = 8192  # where a deployment does not say: the model's own may be much more
# Of the front door: they took 40 MiB (tests/k8s/test_pod.py), a tokenizer of 128,256 entries takes 171 MB more for
# encoding alone (docs/benchmarks/tokenize.json); long chats and logs are not counted.
OPENAI_WORKER = 512 * MIB
GPU_CORES = 8  # for each GPU: fronts, tokenizers, the engine's host side; assumed, not measured
GPU_MEMORY = 64 * GIB  # for each GPU: an engine is read through the host's memory; assumed, not measured
BUILD_MEMORY = 96 * GIB  # for each GPU: quantising holds a 16-bit checkpoint in the host; assumed, not measured


def shm_bytes(deployment: Deployment) -> int:
    """What /dev/shm must offer: for each instance of a Python model, and for each GPU of the pod beyond the first."""
    fronts = deployment.fronts
    fused = fronts.tensorrt_llm_bls if deployment.serving.ensemble == "fused" else 0  # `ensemble` is one more of them
    instances = fronts.preprocessing + fronts.tensorrt_llm + fronts.tensorrt_llm_bls + fused + 1  # one postprocessing
    return instances * SHM_PER_INSTANCE + max(0, pod_gpus(deployment) - 1) * SHM_PER_RANK


def pod_gpus(deployment: Deployment) -> int:
    """GPUs of one pod."""
    return deployment.gpu.per_node if deployment.gpu is not None else 0


def server(deployment: Deployment, model: Path) -> dict[str, Any]:
    """`resources` of the server's container. `model`: its folder on this machine, where it may be missing."""
    beside = shm_bytes(deployment) + deployment.kv_cache.host_memory_bytes
    if deployment.openai is not None:
        beside += deployment.openai.workers * OPENAI_WORKER
    if deployment.gpu is None:
        return _resources(CPU_CORES, CPU_MEMORY + _model_bytes(deployment, model) + beside, {})
    gpus = pod_gpus(deployment)
    return _resources(GPU_CORES * gpus, GPU_MEMORY * gpus + beside, {"nvidia.com/gpu": gpus})


def build(deployment: Deployment) -> dict[str, Any]:
    """`resources` of the container that compiles the engine: the server's GPUs."""
    gpus = pod_gpus(deployment)
    return _resources(GPU_CORES * gpus, BUILD_MEMORY * gpus + shm_bytes(deployment), {"nvidia.com/gpu": gpus})


def quantity(size: int) -> str:
    """Bytes as Kubernetes writes them, rounded up to whole MiB."""
    return f"{-(-size // MIB)}Mi"


def _resources(cores: int, memory: int, devices: Mapping[str, int]) -> dict[str, Any]:
    """Requests are limits, but for the CPU: throttling would show as gaps between tokens."""
    fixed = {"memory": quantity(memory), **{name: str(count) for name, count in devices.items()}}
    return {"requests": {"cpu": str(cores), **fixed}, "limits": fixed}


def _model_bytes(deployment: Deployment, model: Path) -> int:
    """Host memory of the embedded engine's weights and KV cache, both in float32; 0 if the model is not here."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    try:
        kv_per_token = Shape.read(model).kv_bytes_per_token("float32")
    except PlanError:
        return 2 * weights
    limits = deployment.limits
    tokens = deployment.kv_cache.tokens or limits.max_batch_size * (limits.max_seq_len or DEFAULT_SEQ_LEN)
    return 2 * weights + tokens * kv_per_token
