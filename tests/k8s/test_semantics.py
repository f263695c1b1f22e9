"""Every shipped combination obeys the rules, and each rule finds what it is for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s import semantics
from tests.k8s.manifests import Combination, Objects, combinations, find


@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_the_shipped_combinations_hold_together(combination: Combination, everything: dict[Any, Objects]) -> None:
    assert semantics.problems(everything[combination]) == []


def server(objects: Objects) -> Any:
    return find(objects, "Deployment", "roundhouse")["spec"]


def pod(objects: Objects) -> Any:
    return server(objects)["template"]["spec"]


def container(objects: Objects) -> Any:
    (found,) = [c for c in pod(objects)["containers"] if c["name"] == "server"]
    return found


def without(objects: Objects, kind: str, name: str) -> None:
    objects.remove(find(objects, kind, name))


def set_argument(objects: Objects, prefix: str, value: str) -> None:
    command = container(objects)["command"]
    command[:] = [value if argument.startswith(prefix) else argument for argument in command]


def build_job(objects: Objects) -> Any:
    (found,) = [o for o in objects if o["kind"] == "Job" and "engine-build" in o["metadata"]["name"]]
    return found["spec"]["template"]["spec"]


# What is broken -> (how, what the rule says of it).
BREAKAGES: dict[str, tuple[Callable[[Objects], Any], str]] = {
    "selector": (
        lambda o: server(o)["selector"]["matchLabels"].update(app="other"),
        "its selector does not select its own pods",
    ),
    "service selector": (
        lambda o: find(o, "Service", "roundhouse-grpc")["spec"]["selector"].update(app="other"),
        "Service/roundhouse-grpc: selects no pod",
    ),
    "disruption budget": (
        lambda o: find(o, "PodDisruptionBudget", "roundhouse")["spec"]["selector"]["matchLabels"].update(app="other"),
        "PodDisruptionBudget/roundhouse: selects no pod",
    ),
    "topology": (
        lambda o: pod(o)["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"].update(app="other"),
        "does not count its own pods",
    ),
    "service port": (
        lambda o: find(o, "Service", "roundhouse")["spec"]["ports"][1].update(targetPort="web"),
        "has no port web",
    ),
    "probe port": (lambda o: container(o)["startupProbe"]["httpGet"].update(port="web"), "asks port web"),
    "same port": (lambda o: container(o)["ports"].append({"name": "x", "containerPort": 8000}), "have the same port"),
    "pool port": (
        lambda o: find(o, "InferencePool", "roundhouse")["spec"]["targetPorts"][0].update(number=7),
        "port 7",
    ),
    "network policy port": (
        lambda o: find(o, "NetworkPolicy", "roundhouse")["spec"]["ingress"][0]["ports"].append({"port": "web"}),
        "has no port web",
    ),
    "volume": (lambda o: pod(o)["volumes"].pop(), "which it does not have"),
    "unused volume": (lambda o: pod(o)["volumes"].append({"name": "more", "emptyDir": {"sizeLimit": "1Gi"}}), "nobody"),
    "claim": (lambda o: without(o, "PersistentVolumeClaim", "roundhouse-engines"), "roundhouse-engines, which is not"),
    "service account": (
        lambda o: without(o, "ServiceAccount", "roundhouse"),
        "ServiceAccount/roundhouse, which is not",
    ),
    "priority class": (lambda o: without(o, "PriorityClass", "roundhouse-serving"), "PriorityClass/roundhouse-serving"),
    "scale target": (
        lambda o: find(o, "ScaledObject", "roundhouse")["spec"]["scaleTargetRef"].update(name="other"),
        "scales other",
    ),
    "picker": (lambda o: without(o, "Service", "roundhouse-endpoint-picker"), "its picker"),
    "route": (lambda o: without(o, "InferencePool", "roundhouse"), "HTTPRoute: InferencePool/roundhouse"),
    "mandatory secret": (
        lambda o: next(v for v in build_job(o)["volumes"] if v["name"] == "huggingface")["secret"].pop("optional"),
        "Secret/roundhouse-huggingface, which is not",
    ),
    "secret in a variable": (
        lambda o: container(o)["env"].append({"name": "X", "valueFrom": {"secretKeyRef": {"name": "x", "key": "x"}}}),
        "X is a secret in a variable",
    ),
    "file of a command": (lambda o: set_argument(o, "/deployment", "/deployment/other.yaml"), "is not in ConfigMap"),
    "path of a variable": (
        lambda o: container(o)["env"].append({"name": "WHERE", "value": "/engines-too/here"}),
        "/engines-too/here is not mounted",
    ),
    "variable": (lambda o: container(o)["command"].append("--x=$(MISSING)"), "$MISSING is not set"),
    "startup probe": (lambda o: container(o).pop("startupProbe"), "no startupProbe"),
    "liveness asks readiness": (
        lambda o: container(o)["livenessProbe"]["httpGet"].update(path="/v2/health/ready"),
        "false while a model loads",
    ),
    "slow start": (lambda o: container(o)["startupProbe"].update(failureThreshold=1000), "is called stuck"),
    "no preStop": (lambda o: container(o).pop("lifecycle"), "preStop waits 0 s"),
    "grace": (lambda o: pod(o).update(terminationGracePeriodSeconds=130), "but killed after 130 s"),
    "long drain": (lambda o: set_argument(o, "--drain-seconds", "--drain-seconds=300"), "to drain and end"),
    "a container beside that leaves first": (
        lambda o: pod(o)["containers"].append({**container(o), "name": "beside", "lifecycle": {}}),
        "15 s before the server",
    ),
    "GPU request": (
        lambda o: container(o)["resources"]["requests"].update({"nvidia.com/gpu": "1"}),
        "are not limits",
    ),
    "no memory limit": (lambda o: container(o)["resources"]["limits"].pop("memory"), "are not limits"),
    "CPU limit": (lambda o: container(o)["resources"]["limits"].update(cpu="2"), "and no limit"),
    "shared memory without limit": (lambda o: pod(o)["volumes"][0]["emptyDir"].pop("sizeLimit"), "has no size limit"),
    "more shared memory than memory": (
        lambda o: pod(o)["volumes"][0]["emptyDir"].update(sizeLimit="900Gi"),
        "is not counted in its memory",
    ),
    "no shared memory": (
        lambda o: container(o)["volumeMounts"].remove({"name": "shm", "mountPath": "/dev/shm"}),
        "no /dev/shm",
    ),
    "volume at /tmp": (
        lambda o: container(o)["volumeMounts"].append({"name": "cache", "mountPath": "/tmp"}),
        "outlives",
    ),
    "any GPU": (lambda o: pod(o).pop("affinity"), "GPUs of any product"),
    "taint": (lambda o: build_job(o).pop("tolerations"), "does not tolerate"),
    "tag": (lambda o: container(o).update(image="registry.example/roundhouse:latest"), "has no digest"),
    "pull policy": (lambda o: container(o).update(imagePullPolicy="Always"), "pulls an image again"),
    "secret": (
        lambda o: o.append({"kind": "Secret", "metadata": {"name": "x", "namespace": "roundhouse"}}),
        "is in the manifests",
    ),
    "token": (
        lambda o: container(o)["env"].append({"name": "HF_TOKEN", "value": "hf_x"}),
        "has its value in the manifest",
    ),
    "replicas": (lambda o: server(o).update(replicas=1), "has an autoscaler and a number of replicas"),
    "two autoscalers": (
        lambda o: o.append({**find(o, "ScaledObject", "roundhouse"), "kind": "HorizontalPodAutoscaler"}),
        "two autoscalers",
    ),
    "namespace": (lambda o: find(o, "Namespace", "roundhouse")["metadata"].update(name="other"), "other: is made"),
    "twice": (lambda o: o.append(find(o, "Service", "vllm")), "('Service', 'vllm'): twice"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_is_found(name: str, full: Objects) -> None:
    breakage, said = BREAKAGES[name]
    broken = copy.deepcopy(full)
    breakage(broken)
    found = semantics.problems(broken)
    assert any(said in problem for problem in found), found


def test_each_rule_is_among_those_that_were_broken(full: Objects) -> None:
    bitten = set()
    for breakage, _ in BREAKAGES.values():
        broken = copy.deepcopy(full)
        breakage(broken)
        bitten |= {rule for rule in semantics.RULES if list(rule(broken))}
    assert set(semantics.RULES) == bitten
