"""From a deployment to a kustomize overlay: the deployment file as the pods see it, sizes, image, components."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from roundhouse.deployment import Deployment, DeploymentError, SyntheticEngine, TensorrtLlmEngine, TransformersEngine

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "k8s"
IN_IMAGE = "/opt/roundhouse"  # where the image keeps the repository, and so the shipped models
LOCAL_IMAGE = "roundhouse:local"  # built on the machine of a cluster for trying out
UNKNOWN_DIGEST = "sha256:" + "0" * 64  # a placeholder that no registry has: the pull fails instead of taking `latest`
CHOICES = ("monitoring", "autoscaling-hpa", "autoscaling-keda", "rollout-without-spare-gpu", "inference-gateway")
MIB = 2**20
SHM_PER_INSTANCE = 64 * MIB  # 16 MiB to begin with (serve.py), and room to grow
SHM_TENSOR_PARALLEL = 2**30  # for the collectives of one more GPU; assumed, not measured
CPU_MEMORY = 4 * 2**30  # of a pod without GPU; assumed, not measured
GPU_MEMORY = 64 * 2**30  # of a pod, for each GPU: an engine is read through the host's memory; assumed, not measured
GPU_CORES = 8  # for each GPU: fronts, tokenizers, the engine's host side; assumed, not measured
JOBS = "batch/v1", "Job", "roundhouse-engine-build"


def render(
    deployment: Deployment,
    target: Path,
    *,
    image: str,
    trtllm_version: str,
    namespace: str = "roundhouse",
    components: tuple[str, ...] = (),
    k8s: Path = SHIPPED,
) -> None:
    """Write an overlay over `k8s/base` into the folder `target`, which must not exist.

    `image`: NAME@sha256:DIGEST, or roundhouse:local. `trtllm_version`: of that image; it is part of the engine's
    folder, since an engine runs with no other. Raises DeploymentError, naming the option, for what cannot be rendered.
    """
    _check_choices(components)
    inside = mounted(deployment, trtllm_version)
    text = _yaml(inside.model_dump(exclude_none=True, exclude_defaults=True))
    chosen = [*_implied(deployment), *components]
    files = {"deployment.yaml": text, "server.yaml": _yaml(_server(inside))}
    patches: list[dict[str, Any]] = [{"path": "server.yaml"}]
    if isinstance(inside.engine, TensorrtLlmEngine):
        files["engine-build.yaml"] = _yaml(_engine_build(inside))
        key = hashlib.sha256((text + image).encode()).hexdigest()[:8]  # a Job cannot be changed, only be another one
        rename = [{"op": "replace", "path": "/metadata/name", "value": f"{JOBS[2]}-{key}"}]
        patches += [
            {"path": "engine-build.yaml"},
            {"target": {"kind": "Job", "name": JOBS[2]}, "patch": _yaml(rename)},
        ]
    if "autoscaling-keda" in components:
        query = f'sum(nv_trt_llm_request_metrics{{namespace="{namespace}",request_type="waiting"}})'
        change = [{"op": "replace", "path": "/spec/triggers/0/metadata/query", "value": query}]
        patches.append({"target": {"kind": "ScaledObject", "name": "roundhouse"}, "patch": _yaml(change)})
    target.mkdir(parents=True)
    base = os.path.relpath(k8s.resolve(), target.resolve())
    overlay: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [f"{base}/base"],
        "components": [f"{base}/components/{name}" for name in chosen],
        "configMapGenerator": [{"name": "roundhouse-deployment", "files": ["deployment.yaml"]}],
        "patches": patches,
        "images": [_image(image)],
    }
    files["kustomization.yaml"] = _yaml({key: value for key, value in overlay.items() if value != []})
    for name, content in files.items():
        (target / name).write_text("# Written by `roundhouse render k8s`.\n" + content, encoding="utf-8")


def mounted(deployment: Deployment, trtllm_version: str) -> Deployment:
    """The deployment with the paths that a pod has: models of the image, the volumes /models and /engines."""
    model = deployment.model
    tokenizer = model.tokenizer or model.path
    update: dict[str, Any] = {
        "model": model.model_copy(update={"path": _model_path(model.path), "tokenizer": _model_path(tokenizer)})
    }
    if isinstance(deployment.engine, TensorrtLlmEngine):
        update["engine"] = deployment.engine.model_copy(
            update={"path": engine_path(deployment, model.path, trtllm_version)}
        )
    if (speculative := deployment.speculative) is not None:
        paths = {"draft_model": _model_path(speculative.draft_model)}
        if speculative.draft_engine is not None:
            paths["draft_engine"] = engine_path(deployment, speculative.draft_model, trtllm_version) + "-draft"
        update["speculative"] = speculative.model_copy(update=paths)
    return deployment.model_copy(update=update)


def engine_path(deployment: Deployment, model: str, trtllm_version: str) -> str:
    """The folder of a compiled engine: keyed by all that it is tied to."""
    gpu = deployment.gpu
    if gpu is None:
        raise DeploymentError("gpu: missing; a compiled engine is tied to a GPU product")
    precision = deployment.precision
    limits = deployment.limits.model_dump_json() + repr(deployment.speculative)
    parts = [
        Path(model).name,
        f"{precision.weights}-kv-{precision.kv_cache}",
        f"tp{gpu.tensor_parallel}",
        gpu.product,
        f"trtllm-{trtllm_version}",
        hashlib.sha256(limits.encode()).hexdigest()[:8],  # of the limits: an engine is compiled for them too
    ]
    return "/engines/" + re.sub(r"[^a-z0-9./-]+", "-", "/".join(parts).lower())


def shm_bytes(deployment: Deployment) -> int:
    """What /dev/shm must offer: for each instance of a Python model, and for each GPU beyond the first."""
    fronts = deployment.fronts
    instances = fronts.preprocessing + fronts.tensorrt_llm + fronts.tensorrt_llm_bls + 1  # and one postprocessing
    more_gpus = deployment.gpu.tensor_parallel - 1 if deployment.gpu is not None else 0
    return instances * SHM_PER_INSTANCE + more_gpus * SHM_TENSOR_PARALLEL


def _model_path(path: str) -> str:
    resolved = Path(path)
    if resolved.is_relative_to(ROOT / "models"):
        return f"{IN_IMAGE}/{resolved.relative_to(ROOT)}"
    return f"/models/{resolved.name}"


def _implied(deployment: Deployment) -> list[str]:
    """The components that a deployment needs whatever is chosen."""
    if isinstance(deployment.engine, TransformersEngine | SyntheticEngine):
        return []
    if deployment.gpu is None:
        raise DeploymentError("gpu: missing; say the product and the count, or nodes cannot be chosen")
    build = ["engine-build"] if isinstance(deployment.engine, TensorrtLlmEngine) else []
    several = ["tensor-parallel"] if deployment.gpu.tensor_parallel > 1 else []
    return ["gpu", *build, *several]


def _check_choices(components: tuple[str, ...]) -> None:
    if unknown := sorted(set(components) - set(CHOICES)):
        raise DeploymentError(f"--with {unknown[0]}: not known (known: {', '.join(CHOICES)})")
    if {"autoscaling-hpa", "autoscaling-keda"} <= set(components):
        raise DeploymentError("--with autoscaling-hpa: KEDA makes an HPA of its own and the two would fight; keep one")
    if len(set(components)) < len(components):
        raise DeploymentError(f"--with {', '.join(components)}: names a component twice")


def _image(image: str) -> dict[str, str]:
    """The entry of kustomize's `images`."""
    if image == LOCAL_IMAGE:
        return {"name": "roundhouse", "newTag": "local"}
    if (match := re.fullmatch(r"([^@\s]+)@(sha256:[0-9a-f]{64})", image)) is None:
        raise DeploymentError(f"--image {image}: a tag can change under a running server; say NAME@sha256:DIGEST")
    return {"name": "roundhouse", "newName": match[1], "digest": match[2]}


def _resources(deployment: Deployment) -> dict[str, Any]:
    shm = shm_bytes(deployment)
    host_cache = deployment.kv_cache.host_memory_bytes
    gpu = deployment.gpu
    if gpu is None:
        cores, memory = 2, CPU_MEMORY + shm + host_cache
    else:
        cores, memory = GPU_CORES * gpu.count, GPU_MEMORY * gpu.count + shm + host_cache
    gpus = {"nvidia.com/gpu": str(gpu.count)} if gpu is not None else {}
    size = f"{-(-memory // MIB)}Mi"
    # No limit of CPU: throttling would show as gaps between tokens.
    return {"requests": {"cpu": str(cores), "memory": size, **gpus}, "limits": {"memory": size, **gpus}}


def _affinity(deployment: Deployment) -> dict[str, Any]:
    if deployment.gpu is None:
        return {}
    term = {"key": "nvidia.com/gpu.product", "operator": "In", "values": [deployment.gpu.product]}
    required = {"nodeSelectorTerms": [{"matchExpressions": [term]}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}


def _shm(deployment: Deployment) -> dict[str, Any]:
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_bytes(deployment) // MIB}Mi"}}


def _server(deployment: Deployment) -> dict[str, Any]:
    """The patch of the server's Deployment."""
    pod: dict[str, Any] = {
        **_affinity(deployment),
        "containers": [{"name": "server", "resources": _resources(deployment)}],
        "volumes": [_shm(deployment)],
    }
    if isinstance(deployment.engine, TensorrtLlmEngine):
        engine = {"name": "ENGINE", "value": deployment.engine.path}
        pod["initContainers"] = [{"name": "wait-for-engine", "env": [engine]}]
    return _patch("apps/v1", "Deployment", "roundhouse", pod)


def _engine_build(deployment: Deployment) -> dict[str, Any]:
    """The patch of the Job that compiles the engine: the server's GPUs."""
    assert isinstance(deployment.engine, TensorrtLlmEngine)
    engine = {"name": "ENGINE", "value": deployment.engine.path}
    build = {"name": "build", "env": [engine], "resources": _resources(deployment)}
    return _patch(*JOBS, {**_affinity(deployment), "containers": [build], "volumes": [_shm(deployment)]})


def _patch(api: str, kind: str, name: str, pod: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": {"template": {"spec": pod}}}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, width=120)
