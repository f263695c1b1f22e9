"""A deployment as its pods see it: models of the image, or on the volumes /models and /engines."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from roundhouse.deployment import Deployment, DeploymentError, OpenAi, TensorrtLlmEngine, VllmEngine
from roundhouse.trtllm.engine_folder import MANIFEST

ROOT = Path(__file__).resolve().parents[3]
IN_IMAGE = "/opt/roundhouse"  # where the image keeps the repository, and so the shipped models
MODELS = "/models"
ENGINES = "/engines"
API_KEYS = "/api-keys"
TLS = "/tls"


def mounted(deployment: Deployment, trtllm_version: str) -> Deployment:
    """The deployment with the paths that a pod has. Raises DeploymentError if two folders would be one in the pod."""
    model, speculative = deployment.model, deployment.speculative
    paths = {"path": model.path, "tokenizer": model.tokenizer or model.path}
    if speculative is not None:
        paths["draft_model"] = speculative.draft_model
    inside = {key: model_path(path) for key, path in paths.items()}
    _check_distinct({*paths.values(), *_adapters(deployment)})
    update: dict[str, Any] = {
        "model": model.model_copy(update={key: inside[key] for key in ("path", "tokenizer")}),
    }
    if isinstance(deployment.engine, TensorrtLlmEngine):
        compiled = {"path": engine_path(deployment, model.path, trtllm_version)}
        if Path(deployment.engine.calibration).is_absolute():  # a folder: it lies beside the models
            compiled["calibration"] = model_path(deployment.engine.calibration)
        update["engine"] = deployment.engine.model_copy(update=compiled)
    if isinstance(deployment.engine, VllmEngine):
        adapters = {id: model_path(folder) for id, folder in deployment.engine.lora.items()}
        update["engine"] = deployment.engine.model_copy(update={"lora": adapters})
    if speculative is not None:
        drafts = {"draft_model": inside["draft_model"]}
        if speculative.draft_engine is not None:
            drafts["draft_engine"] = engine_path(deployment, speculative.draft_model, trtllm_version) + "-draft"
        update["speculative"] = speculative.model_copy(update=drafts)
    if deployment.openai is not None:
        update["openai"] = _with_secrets(deployment.openai)
    return deployment.model_copy(update=update)


def _with_secrets(section: OpenAi) -> OpenAi:
    """The files of the OpenAI front door come from Secrets."""
    update = {}
    if section.api_key_file is not None:
        update["api_key_file"] = f"{API_KEYS}/keys"
    if section.tls_certificate is not None:
        update |= {"tls_certificate": f"{TLS}/tls.crt", "tls_key": f"{TLS}/tls.key"}
    return section.model_copy(update=update)


def model_path(path: str) -> str:
    """Where a pod finds a model folder: in the image if it is one that we ship, else on the volume."""
    resolved = Path(path)
    if resolved.is_relative_to(ROOT / "models"):
        return f"{IN_IMAGE}/{resolved.relative_to(ROOT)}"
    return f"{MODELS}/{resolved.name}"


def models_on_volume(inside: Deployment) -> set[str]:
    """The model folders that a deployment with a pod's paths reads from the volume."""
    paths = {inside.model.path, inside.model.tokenizer or inside.model.path, *_adapters(inside)}
    if inside.speculative is not None:
        paths.add(inside.speculative.draft_model)
    return {path for path in paths if path.startswith(f"{MODELS}/")}


def _adapters(deployment: Deployment) -> list[str]:
    """The folders of its LoRA adapters."""
    return list(deployment.engine.lora.values()) if isinstance(deployment.engine, VllmEngine) else []


def engine_path(deployment: Deployment, model: str, trtllm_version: str) -> str:
    """The folder of a compiled engine: keyed by all that it is tied to.

    Model, precision, tensor parallel, GPU product, TensorRT-LLM version; and a hash of the limits and of drafting,
    which an engine is compiled for too. Raises DeploymentError if the deployment names no GPU.
    """
    gpu = deployment.gpu
    if gpu is None:
        raise DeploymentError("gpu: missing; a compiled engine is tied to a GPU product")
    precision, drafting = deployment.precision, deployment.speculative
    limits = deployment.limits
    shape = [limits.max_batch_size, limits.max_seq_len, limits.max_num_tokens, deployment.kv_cache.tokens_per_block]
    if drafting is not None:
        shape += [drafting.draft_tokens, drafting.max_batch_size]
    parts = [
        Path(model).name,
        f"{precision.weights}-kv-{precision.kv_cache}",
        f"tp{gpu.tensor_parallel}",
        gpu.product,
        f"trtllm-{trtllm_version}",
        hashlib.sha256(repr(shape).encode()).hexdigest()[:8],
    ]
    return f"{ENGINES}/" + re.sub(r"[^a-z0-9./-]+", "-", "/".join(parts).lower())


def manifests(inside: Deployment) -> list[str]:
    """The files that `roundhouse build` writes last, one in each engine's folder."""
    return [f"{engine}/{MANIFEST}" for engine in engine_paths(inside)]


def engine_paths(inside: Deployment) -> list[str]:
    """The compiled engines that a deployment with a pod's paths loads."""
    if not isinstance(inside.engine, TensorrtLlmEngine):
        return []
    draft = inside.speculative.draft_engine if inside.speculative is not None else None
    return [inside.engine.path, *([draft] if draft is not None else [])]


def _check_distinct(folders: set[str]) -> None:
    by_name: dict[str, str] = {}
    for folder in folders:
        other = by_name.setdefault(model_path(folder), folder)
        if other != folder:
            raise DeploymentError(
                f"model: {folder} and {other} would both be {model_path(folder)} in the pod; rename one of them"
            )
