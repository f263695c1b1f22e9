"""From a deployment to the model repository that Triton loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from roundhouse.deployment import Deployment

SHIPPED = Path(__file__).resolve().parents[2] / "model_repository"
PYTHON_MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "tensorrt_llm_bls")
STREAMING_MODELS = ("tensorrt_llm", "tensorrt_llm_bls")


def read(folder: Path) -> Any:
    """The `ModelConfig` message of a model's folder."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def render(deployment: Deployment, deployment_path: Path, target: Path, source: Path = SHIPPED) -> None:
    """Write a model repository for a deployment into the folder `target`, which must not exist.

    `deployment_path`: the file that the models are to read; it is written down as an absolute path.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    configs = {name: read(target / name) for name in (*PYTHON_MODELS, "ensemble")}
    if deployment.serving.ensemble == "fused":
        shutil.rmtree(target / "ensemble")
        shutil.copytree(target / "tensorrt_llm_bls", target / "ensemble")
        configs["ensemble"] = model_config_pb2.ModelConfig()
        configs["ensemble"].CopyFrom(configs["tensorrt_llm_bls"])
        configs["ensemble"].name = "ensemble"
    for config in configs.values():
        configure(config, deployment, deployment_path)
        (target / config.name / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")


def configure(config: Any, deployment: Deployment, deployment_path: Path) -> None:
    """Set a deployment's values in a model's configuration, in place."""
    config.max_batch_size = deployment.limits.request_batch
    if config.platform == "ensemble":
        return
    config.parameters["deployment"].string_value = str(deployment_path.resolve())
    if config.HasField("model_transaction_policy"):
        config.model_transaction_policy.decoupled = deployment.serving.decoupled
    if "exclude_input_in_output" in config.parameters:
        excluded = "true" if deployment.serving.exclude_input_in_output else "false"
        config.parameters["exclude_input_in_output"].string_value = excluded
    front = "tensorrt_llm_bls" if config.name == "ensemble" else config.name
    config.instance_group[0].count = getattr(deployment.fronts, front, 1)
