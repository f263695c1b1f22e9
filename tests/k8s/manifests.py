"""What kustomize makes of an overlay, and how to walk over it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from roundhouse import deployment
from roundhouse.deployment import Deployment
from roundhouse.kubernetes import mounts, overlay

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "1" * 64
IMAGE = f"registry.example/roundhouse@{DIGEST}"
OTHERS = {
    "load-test": f"registry.example/locust@{DIGEST}",
    "vllm-comparison": f"registry.example/vllm@{DIGEST}",
    "inference-gateway": f"registry.example/picker@{DIGEST}",
}
AUTOSCALERS = ("autoscaling-hpa", "autoscaling-keda")
# One on CPUs, one compiled for several GPUs with a draft model, one on a GPU engine that is not compiled.
WITH_EACH_ALONE = ("local-cpu", "llama-3-70b-2xh100-speculative", "llama-3-8b-h200-vllm")
Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Combination:
    """A shipped deployment and the components that are chosen for it."""

    deployment: str
    components: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.deployment}+{'+'.join(self.components) or 'nothing'}"

    def load(self) -> Deployment:
        return deployment.load(ROOT / f"deployments/{self.deployment}.yaml")


def combinations() -> list[Combination]:
    """Each shipped deployment with nothing and with all components that go together; some with each alone."""
    chosen = [tuple(c for c in overlay.CHOICES if c not in AUTOSCALERS or c == scaler) for scaler in AUTOSCALERS]
    made = []
    for name in sorted(path.stem for path in (ROOT / "deployments").glob("*.yaml")):
        gpu = Combination(name, ()).load().gpu is not None
        alone = [(component,) for component in overlay.CHOICES] if name in WITH_EACH_ALONE else []
        for components in [(), *alone, *chosen]:
            fitting = tuple(c for c in components if gpu or c != "vllm-comparison")
            if fitting or not components:
                made.append(Combination(name, fitting))
    return made


def downloads(deployment: Deployment) -> tuple[str, ...]:
    """The models that are not in the image, as a Job is to fetch them."""
    inside = mounts.models_on_volume(mounts.mounted(deployment, "1"))
    return tuple(sorted(f"owner/{Path(path).name}" for path in inside))


def render(combination: Combination, target: Path, namespace: str = "roundhouse") -> Path:
    overlay.render(
        combination.load(),
        target,
        image=IMAGE,
        other_images={name: image for name, image in OTHERS.items() if name in combination.components},
        namespace=namespace,
        components=combination.components,
        downloads=downloads(combination.load()) if combination.components else (),
    )
    return target


def build(folder: Path) -> Objects:
    """What `kubectl apply -k` would apply. The jobs that are applied apart are appended."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is missing; the manifests are not checked")
    made: Objects = []
    for part in (folder, folder / "load-test", folder / "model-download"):
        if part.is_dir():
            done = subprocess.run(["kubectl", "kustomize", str(part)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            made += [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]
    unique = {(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]): o for o in made}
    return list(unique.values())


def find(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def of_kind(objects: Objects, *kinds: str) -> Objects:
    return [o for o in objects if o["kind"] in kinds]


@dataclass(frozen=True)
class Pod:
    """A pod as a workload would make it."""

    owner: dict[str, Any]
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def serves(self) -> bool:
        return self.owner["kind"] in ("Deployment", "LeaderWorkerSet")

    @property
    def containers(self) -> list[dict[str, Any]]:
        return list(self.spec["containers"])

    @property
    def all_containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> dict[str, Any]:
        (found,) = [c for c in self.all_containers if c["name"] == name]
        return found

    def port_names(self) -> set[str]:
        return {port["name"] for container in self.containers for port in container.get("ports", [])}

    def port_numbers(self) -> set[int]:
        return {port["containerPort"] for container in self.containers for port in container.get("ports", [])}


def pods(objects: Objects) -> Iterator[Pod]:
    for owner in of_kind(objects, "LeaderWorkerSet"):
        added = {"leaderworkerset.sigs.k8s.io/name": owner["metadata"]["name"]}  # by the controller
        for role in ("leaderTemplate", "workerTemplate"):
            template = owner["spec"]["leaderWorkerTemplate"][role]
            yield Pod(owner, {**template["metadata"]["labels"], **added}, template["spec"])
    for owner in of_kind(objects, "Deployment", "DaemonSet", "Job"):
        template = owner["spec"]["template"]
        yield Pod(owner, template["metadata"].get("labels", {}), template["spec"])


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Of the variables that have a value here."""
    return {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}


def command(container: dict[str, Any]) -> list[str]:
    return [*container.get("command", []), *container.get("args", [])]


def size(quantity: str) -> int:
    """Bytes of a quantity of memory."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    if quantity[-2:] in units:
        return int(quantity[:-2]) * units[quantity[-2:]]
    return int(quantity)
