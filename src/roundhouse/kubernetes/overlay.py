"""`roundhouse render k8s`: a kustomize overlay over k8s/base for one deployment."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from roundhouse.deployment import Deployment, DeploymentError, Gpu, OpenAi, Slo
from roundhouse.kubernetes import mounts, sizes
from roundhouse.trtllm.commands import TENSORRT_LLM

SHIPPED = mounts.ROOT / "k8s"
LOCAL_IMAGE = "roundhouse:local"  # built on the machine of a cluster for trying out
# What `--with` takes -> the components that it needs besides itself.
CHOICES: dict[str, tuple[str, ...]] = {
    "monitoring": (),
    "autoscaling-hpa": ("monitoring",),  # which records the series that the custom-metrics API gives it
    "autoscaling-keda": (),
    "rollout-without-spare-gpu": (),
    "image-prepull": (),
    "openai": (),
    "inference-gateway": ("openai",),
    "vllm-comparison": (),
    "load-test": (),
}
# Components that run another image -> its name in the manifests, the option that gives it.
OTHER_IMAGES = {
    "load-test": ("roundhouse-load-test", "--load-test-image"),
    "vllm-comparison": ("vllm", "--vllm-image"),
    "inference-gateway": ("endpoint-picker", "--endpoint-picker-image"),
}
ENGINE_BUILD = "batch/v1", "Job", "roundhouse-engine-build"
SERVER = "apps/v1", "Deployment", "roundhouse"
Patch = dict[str, Any]


@dataclass
class Overlay:
    """The files of a folder, with its kustomization.yaml still to be written."""

    namespace: str
    images: list[dict[str, str]]
    resources: list[str]
    components: list[str] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    replacements: list[dict[str, Any]] = field(default_factory=list)
    transformers: list[str] = field(default_factory=list)  # folders of k8s/
    files: dict[str, str] = field(default_factory=dict)

    def resource(self, name: str, content: Any) -> None:
        self.files[name] = _yaml(content)
        self.resources.append(name)

    def patch(self, name: str, content: Any) -> None:
        """A strategic merge patch in a file of its own."""
        self.files[name] = _yaml(content)
        self.patches.append({"path": name})

    def change(self, kind: str, name: str, *operations: dict[str, Any]) -> None:
        """A JSON patch."""
        self.patches.append({"target": {"kind": kind, "name": name}, "patch": _yaml(list(operations))})

    def write(self, folder: Path, k8s: Path) -> None:
        folder.mkdir(parents=True)
        base = os.path.relpath(k8s.resolve(), folder.resolve())
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": self.namespace,
            "resources": [name if name in self.files else f"{base}/{name}" for name in self.resources],
            "components": [f"{base}/components/{name}" for name in self.components],
            "configMapGenerator": [{"name": "roundhouse-deployment", "files": ["deployment.yaml"]}]
            if "deployment.yaml" in self.files
            else [],
            "patches": self.patches,
            "images": self.images,
            "replacements": self.replacements,
            "transformers": [f"{base}/{name}" for name in self.transformers],
        }
        files = {**self.files, "kustomization.yaml": _yaml({k: v for k, v in kustomization.items() if v != []})}
        for name, content in files.items():
            (folder / name).write_text("# Written by `roundhouse render k8s`.\n" + content, encoding="utf-8")


def render(
    deployment: Deployment,
    target: Path,
    *,
    image: str,
    other_images: Mapping[str, str] | None = None,
    trtllm_version: str = TENSORRT_LLM,
    namespace: str = "roundhouse",
    components: tuple[str, ...] = (),
    downloads: tuple[str, ...] = (),
    k8s: Path = SHIPPED,
) -> None:
    """Write an overlay over `k8s/base` into the folder `target`, which must not exist.

    `image`: NAME@sha256:DIGEST, or roundhouse:local. `other_images`: component -> NAME@sha256:DIGEST.
    `trtllm_version`: of the image; it is part of the engine's folder, since an engine runs with no other.
    `downloads`: repositories on Hugging Face, OWNER/NAME, that a Job in `target`/model-download is to fetch.
    Raises DeploymentError, naming the option, for what cannot be rendered, and FileExistsError.
    """
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
        raise DeploymentError(f"--namespace {namespace}: must be lower-case letters, digits and '-', 63 at most")
    chosen = _chosen(components if deployment.openai is None else (*components, "openai"))
    if "openai" in chosen and deployment.openai is None:
        deployment = deployment.model_copy(update={"openai": OpenAi()})
    inside = mounts.mounted(deployment, trtllm_version)
    images = [_image("roundhouse", image, "--image"), *_others(chosen, _with_locust(image, chosen, other_images or {}))]
    text = _yaml(inside.model_dump(exclude_none=True, exclude_defaults=True))
    overlays = {
        target: _server_overlay(inside, Path(deployment.model.path), chosen, Overlay(namespace, images, ["base"]))
    }
    if "autoscaling-keda" in chosen:
        _keda_namespace(overlays[target], k8s)
    if mounts.engine_paths(inside):
        _engine_build(overlays[target], inside, text + image)
    if "load-test" in chosen:
        overlays[target / "load-test"] = _load_test(inside, Overlay(namespace, images, []))
    for overlay in overlays.values():
        overlay.files["deployment.yaml"] = text
    if downloads:
        overlays[target / "model-download"] = _model_download(inside, Overlay(namespace, images[:1], []), downloads)
    for folder, overlay in overlays.items():
        overlay.write(folder, k8s)


def _server_overlay(inside: Deployment, model: Path, chosen: list[str], overlay: Overlay) -> Overlay:
    """The server and what is beside it. `model`: the model's folder on this machine."""
    overlay.components += [*_implied(inside), *(name for name in chosen if name != "load-test")]
    overlay.patch("server.yaml", _server(inside, model))
    if inside.gpu is not None and inside.gpu.nodes > 1:
        _multi_node(overlay, inside.gpu, chosen)
    if inside.openai is not None and (secrets := _secrets(inside.openai)):
        overlay.patch("secrets.yaml", _pod(*SERVER, secrets))
    if "image-prepull" in chosen and inside.gpu is not None:
        overlay.patch("image.yaml", _pod("apps/v1", "DaemonSet", "roundhouse-image", _affinity(inside)))
    if "monitoring" in chosen and inside.slo is not None:
        overlay.resource("slo-rules.yaml", _slo_rules(inside.slo, overlay.namespace))
    if "monitoring" in chosen and inside.openai is not None:
        _monitor_door(overlay, inside.openai)
    if "vllm-comparison" in chosen:
        _vllm(overlay, inside)
    return overlay


def _chosen(components: tuple[str, ...]) -> list[str]:
    """The components that were asked for and those that they need, in the order of CHOICES."""
    for name in components:
        if name not in CHOICES:
            raise DeploymentError(f"--with {name}: not known (known: {', '.join(CHOICES)})")
    if {"autoscaling-hpa", "autoscaling-keda"} <= set(components):
        raise DeploymentError("--with autoscaling-hpa: KEDA makes an HPA of its own and the two would fight; keep one")
    wanted = {*components, *(needed for name in components for needed in CHOICES[name])}
    return [name for name in CHOICES if name in wanted]


def _implied(inside: Deployment) -> list[str]:
    """The components that a deployment needs whatever is chosen."""
    needs = {
        "models": bool(mounts.models_on_volume(inside)),
        "gpu": inside.gpu is not None,
        "engine-build": bool(mounts.engine_paths(inside)),
        "tensor-parallel": inside.gpu is not None and inside.gpu.tensor_parallel > 1,
        "multi-node": inside.gpu is not None and inside.gpu.nodes > 1,
    }
    return [name for name, needed in needs.items() if needed]


def _image(name: str, image: str, option: str) -> dict[str, str]:
    """The entry of kustomize's `images`."""
    if image == LOCAL_IMAGE:
        return {"name": name, "newTag": "local"}
    if (match := re.fullmatch(r"([^@\s]+)@(sha256:[0-9a-f]{64})", image)) is None:
        raise DeploymentError(f"{option} {image}: a tag can change under a running server; say NAME@sha256:DIGEST")
    return {"name": name, "newName": match[1], "digest": match[2]}


def _with_locust(image: str, chosen: list[str], images: Mapping[str, str]) -> Mapping[str, str]:
    """The image that one builds for trying out has Locust, those for GPUs do not."""
    return {"load-test": image, **images} if image == LOCAL_IMAGE and "load-test" in chosen else images


def _others(chosen: list[str], images: Mapping[str, str]) -> list[dict[str, str]]:
    entries = []
    for component, (name, option) in OTHER_IMAGES.items():
        if component in chosen and component not in images:
            raise DeploymentError(f"{option}: missing; --with {component} runs it; say NAME@sha256:DIGEST")
        if component not in chosen and component in images:
            raise DeploymentError(f"{option}: only --with {component} runs it")
        if component in chosen:
            entries.append(_image(name, images[component], option))
    return entries


def _server(inside: Deployment, model: Path) -> dict[str, Any]:
    """The patch of the server's Deployment."""
    pod: dict[str, Any] = {
        **_affinity(inside),
        "containers": [{"name": "server", "resources": sizes.server(inside, model)}],
        "volumes": [_shm(inside)],
    }
    if manifests := " ".join(mounts.manifests(inside)):
        pod["initContainers"] = [{"name": "wait-for-engine", "env": [{"name": "MANIFESTS", "value": manifests}]}]
    return _pod(*SERVER, pod)


def _engine_build(overlay: Overlay, inside: Deployment, inputs: str) -> None:
    """The Job that compiles the engine, on the server's GPUs. It is named by its inputs: a Job cannot be changed."""
    build = {"name": "build", "resources": sizes.build(inside)}
    pod = {**_affinity(inside), "containers": [build], "volumes": [_shm(inside)]}
    overlay.patch("engine-build.yaml", _pod(*ENGINE_BUILD, pod))
    name = f"{ENGINE_BUILD[2]}-{hashlib.sha256(inputs.encode()).hexdigest()[:8]}"
    overlay.change("Job", ENGINE_BUILD[2], {"op": "replace", "path": "/metadata/name", "value": name})


def _multi_node(overlay: Overlay, gpu: Gpu, chosen: list[str]) -> None:
    """A LeaderWorkerSet whose pods are copies of the Deployment's, which then goes (k8s/components/multi-node)."""
    if refused := [name for name in chosen if name.startswith(("autoscaling", "rollout"))]:
        raise DeploymentError(
            f"--with {refused[0]}: not for gpu.nodes > 1; it acts on a Deployment, and this is a group"
        )
    slots = {"name": "hosts", "env": [{"name": "GPUS", "value": str(gpu.per_node)}]}
    overlay.patch("hosts.yaml", _pod(*SERVER, {"initContainers": [slots]}))
    size = {"op": "replace", "path": "/spec/leaderWorkerTemplate/size", "value": gpu.nodes}
    overlay.change("LeaderWorkerSet", "roundhouse-group", size)
    paths = [f"spec.leaderWorkerTemplate.{role}Template" for role in ("leader", "worker")]
    source = {"kind": "Deployment", "name": "roundhouse", "fieldPath": "spec.template"}
    targets = [{"select": {"kind": "LeaderWorkerSet"}, "fieldPaths": paths}]
    overlay.replacements.append({"source": source, "targets": targets})
    overlay.transformers.append("components/multi-node/transformers")


def _secrets(section: OpenAi) -> dict[str, Any]:
    """The Secrets that the front door reads, in its pod; over TLS its probe speaks HTTPS."""
    container: dict[str, Any] = {"name": "server", "volumeMounts": []}
    volumes = []
    for name, folder, wanted in (
        ("api-keys", mounts.API_KEYS, section.api_key_file),
        ("tls", mounts.TLS, section.tls_key),
    ):
        if wanted is not None:
            container["volumeMounts"].append({"name": name, "mountPath": folder, "readOnly": True})
            volumes.append({"name": name, "secret": {"secretName": f"roundhouse-{name}"}})
    if section.tls_key is not None:
        container["readinessProbe"] = {"httpGet": {"scheme": "HTTPS"}}
    return {"containers": [container], "volumes": volumes} if volumes else {}


def _monitor_door(overlay: Overlay, section: OpenAi) -> None:
    """Scrape the OpenAI door instead of Triton: its page has all of Triton's, and what its own clients got."""
    path = "/spec/podMetricsEndpoints/0"
    operations: list[Patch] = [{"op": "replace", "path": f"{path}/port", "value": "openai"}]
    if section.tls_key is not None:  # its certificate is for the clients' name of the server, not for pods
        operations.append({"op": "add", "path": f"{path}/scheme", "value": "https"})
        operations.append({"op": "add", "path": f"{path}/tlsConfig", "value": {"insecureSkipVerify": True}})
    overlay.change("PodMonitor", "roundhouse", *operations)


def _slo_rules(slo: Slo, namespace: str) -> dict[str, Any]:
    """Alerts for the deployment's service level objectives."""
    page = 'docs/operations.md, "An objective is missed"'
    objectives = {
        "RoundhouseTimeToFirstToken": ("roundhouse:time_to_first_token_seconds:p95", slo.ttft_ms),
        "RoundhouseInterTokenLatency": ("roundhouse:inter_token_latency_seconds:p95", slo.itl_ms),
    }
    rules = [
        {
            "alert": alert,
            "expr": f'{series}{{namespace="{namespace}"}} > {limit / 1e3:g}',
            "for": "10m",
            "labels": {"severity": "warning"},
            "annotations": {
                "summary": f"The 95th percentile has been over {limit:g} ms for 10 minutes",
                "runbook": page,
            },
        }
        for alert, (series, limit) in objectives.items()
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "roundhouse-slo"},
        "spec": {"groups": [{"name": "roundhouse.slo", "rules": rules}]},
    }


def _keda_namespace(overlay: Overlay, k8s: Path) -> None:
    """Kustomize does not look into queries."""
    component = yaml.safe_load((k8s / "components/autoscaling-keda/scaled-object.yaml").read_text(encoding="utf-8"))
    operations = []
    for index, trigger in enumerate(component["spec"]["triggers"]):
        query = trigger["metadata"]["query"].replace('namespace="roundhouse"', f'namespace="{overlay.namespace}"')
        operations.append({"op": "replace", "path": f"/spec/triggers/{index}/metadata/query", "value": query})
    overlay.change("ScaledObject", "roundhouse", *operations)


def _vllm(overlay: Overlay, inside: Deployment) -> None:
    """What differs between models in the arguments of the comparison server."""
    if inside.gpu is None or not mounts.models_on_volume(inside):
        raise DeploymentError("--with vllm-comparison: for deployments with `gpu` and a model outside of the image")
    arguments = [f"--tensor-parallel-size={inside.gpu.tensor_parallel}"]
    if inside.limits.max_seq_len is not None:
        arguments.append(f"--max-model-len={inside.limits.max_seq_len}")
    if (drafting := inside.speculative) is not None:
        settings = {
            "method": "draft_model",
            "model": drafting.draft_model,
            "num_speculative_tokens": drafting.draft_tokens,
        }
        arguments.append(f"--speculative-config={json.dumps(settings)}")
    container = {
        "name": "vllm",
        "env": [{"name": "MODEL", "value": inside.model.path}],
        "resources": sizes.server(inside, Path(inside.model.path)),
    }
    overlay.patch("vllm.yaml", _pod("apps/v1", "Deployment", "vllm", {**_affinity(inside), "containers": [container]}))
    path = "/spec/template/spec/containers/0/args/-"
    overlay.change("Deployment", "vllm", *({"op": "add", "path": path, "value": value} for value in arguments))


def _model_download(inside: Deployment, overlay: Overlay, repositories: tuple[str, ...]) -> Overlay:
    """A kustomization of its own, for checkpoints must be there before the rest makes sense."""
    wanted = mounts.models_on_volume(inside)
    for repository in repositories:
        if mounts.model_path(repository) not in wanted:
            names = ", ".join(sorted(Path(path).name for path in wanted)) or "none"
            raise DeploymentError(f"--download {repository}: the deployment reads no such model (it reads: {names})")
    overlay.resources += ["base/namespace", "components/models/volume"]
    overlay.components.append("model-download")
    variable = {"name": "REPOSITORIES", "value": " ".join(repositories)}
    pod = {"containers": [{"name": "download", "env": [variable]}]}
    overlay.patch("download.yaml", _pod("batch/v1", "Job", "roundhouse-model-download", pod))
    return overlay


def _load_test(inside: Deployment, overlay: Overlay) -> Overlay:
    """A kustomization of its own: it runs when it is applied, not whenever the server is."""
    overlay.components.append("load-test")
    if mounts.models_on_volume(inside):
        claim = {"name": "models", "persistentVolumeClaim": {"claimName": "roundhouse-models", "readOnly": True}}
        pod = {"containers": [_models("locust")], "volumes": [claim]}
        overlay.patch("models.yaml", _pod("batch/v1", "Job", "roundhouse-load-test", pod))
    return overlay


def _models(container: str) -> dict[str, Any]:
    """A container that also sees the volume with the models."""
    return {"name": container, "volumeMounts": [{"name": "models", "mountPath": mounts.MODELS, "readOnly": True}]}


def _affinity(inside: Deployment) -> dict[str, Any]:
    if inside.gpu is None:
        return {}
    term = {"key": "nvidia.com/gpu.product", "operator": "In", "values": [inside.gpu.product]}
    required = {"nodeSelectorTerms": [{"matchExpressions": [term]}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}


def _shm(inside: Deployment) -> dict[str, Any]:
    size = sizes.quantity(sizes.shm_bytes(inside))
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}


def _pod(api: str, kind: str, name: str, pod: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": {"template": {"spec": pod}}}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, width=120)
