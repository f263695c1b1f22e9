"""Every object is valid for Kubernetes 1.28 and for the newest version, unknown keys and kinds included."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import kubernetes_validate
import pytest
from kubernetes_validate import SchemaNotFoundError, ValidationError
from yamllint import linter
from yamllint.config import YamlLintConfig

from tests.k8s import crds
from tests.k8s.manifests import ROOT, Objects, find, of_kind

OLDEST, NEWEST = "1.28", kubernetes_validate.latest_version()
CUSTOM = {
    "InferencePool": "inference.networking.k8s.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}


@lru_cache(maxsize=4096)
def checked(text: str, version: str) -> None:
    """Raises ValidationError or SchemaNotFoundError. Most objects are the same in all overlays."""
    kubernetes_validate.validate(json.loads(text), version, strict=True)


def distinct(everything: dict[Any, Objects]) -> list[dict[str, Any]]:
    texts = {json.dumps(o, sort_keys=True) for objects in everything.values() for o in objects}
    return [json.loads(text) for text in sorted(texts)]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_objects_are_valid(version: str, everything: dict[Any, Objects]) -> None:
    objects = [o for o in distinct(everything) if o["kind"] not in CUSTOM]
    assert len({o["kind"] for o in objects}) > 12
    for o in objects:
        checked(json.dumps(o, sort_keys=True), version)


def test_the_newest_version_is_new() -> None:
    assert tuple(map(int, NEWEST.split("."))) >= (1, 36)


def test_custom_resources_are_valid(everything: dict[Any, Objects]) -> None:
    schemas = crds.schemas()
    seen = set()
    for o in distinct(everything):
        if o["kind"] in CUSTOM:
            assert o["apiVersion"] == CUSTOM[o["kind"]]
            assert crds.problems(o, schemas[o["apiVersion"], o["kind"]]) == [], o["metadata"]["name"]
            seen.add(o["kind"])
    assert seen == set(CUSTOM)


def deployment_with(change: Callable[[Any], Any]) -> Callable[[Objects], dict[str, Any]]:
    def changed(objects: Objects) -> dict[str, Any]:
        o = copy.deepcopy(find(objects, "Deployment", "roundhouse"))
        change(o["spec"]["template"]["spec"]["containers"][0])
        return o

    return changed


# A trap of the API server of 1.28 or newer -> an object that falls into it.
TRAPS: dict[str, Callable[[Objects], dict[str, Any]]] = {
    "unknown key": deployment_with(lambda c: c.update(livenesProbe={})),
    "preStop.sleep, which is too new": deployment_with(
        lambda c: c.update(lifecycle={"preStop": {"sleep": {"seconds": 5}}})
    ),
    "number for a string": deployment_with(lambda c: c["env"].append({"name": "X", "value": 1})),
    "y, which YAML 1.1 reads as true": deployment_with(lambda c: c["env"].append({"name": "X", "value": True})),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_seen(trap: str, full: Objects) -> None:
    with pytest.raises(ValidationError):
        kubernetes_validate.validate(TRAPS[trap](full), OLDEST, strict=True)


def test_a_kind_that_was_removed_is_an_error_and_not_a_warning(everything: dict[Any, Objects]) -> None:
    """The command line of this library only warns; `autoscaling/v2beta2`, in NVIDIA's own chart, would pass."""
    scaler = next(o for o in distinct(everything) if o["kind"] == "HorizontalPodAutoscaler")
    with pytest.raises(SchemaNotFoundError):
        kubernetes_validate.validate({**scaler, "apiVersion": "autoscaling/v2beta2"}, OLDEST, strict=True)


def test_no_native_sidecar_which_1_28_would_never_end(everything: dict[Any, Objects]) -> None:
    """1.28 accepts `restartPolicy` of an init container and drops it: no schema tells."""
    for o in distinct(everything):
        if o["kind"] in ("Deployment", "DaemonSet", "Job"):
            for container in o["spec"]["template"]["spec"].get("initContainers", []):
                assert "restartPolicy" not in container


def broken_pool(**changes: Any) -> Callable[[Objects], dict[str, Any]]:
    return lambda objects: {
        **find(objects, "InferencePool", "roundhouse"),
        "spec": {**find(objects, "InferencePool", "roundhouse")["spec"], **changes},
    }


def integer_threshold(objects: Objects) -> dict[str, Any]:
    scaled = copy.deepcopy(find(objects, "ScaledObject", "roundhouse"))
    scaled["spec"]["triggers"][0]["metadata"]["threshold"] = 4
    return scaled


CUSTOM_TRAPS: dict[str, tuple[Callable[[Objects], dict[str, Any]], str]] = {
    "integer threshold": (integer_threshold, "4 is not of type 'string'"),
    "unknown key": (broken_pool(selectors={}), "'selectors' was unexpected"),
    "same port twice": (broken_pool(targetPorts=[{"number": 9000}] * 2), "unique"),
    "picker without port": (broken_pool(endpointPickerRef={"name": "x"}), "port is required"),
}


@pytest.mark.parametrize("trap", CUSTOM_TRAPS)
def test_traps_of_custom_resources_are_seen(trap: str, full: Objects) -> None:
    broken, said = CUSTOM_TRAPS[trap]
    o = broken(full)
    found = crds.problems(o, crds.schemas()[o["apiVersion"], o["kind"]])
    assert any(said in problem for problem in found), found


def test_no_scalar_that_yaml_1_1_reads_as_a_truth_value() -> None:
    config = YamlLintConfig("{rules: {truthy: enable, key-duplicates: enable, octal-values: enable}}")
    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        assert not list(linter.run(path.read_text(encoding="utf-8"), config)), path


def test_everything_shipped_is_in_some_combination(everything: dict[Any, Objects]) -> None:
    kinds = {o["kind"] for objects in everything.values() for o in objects}
    assert {*CUSTOM, "HorizontalPodAutoscaler", "DaemonSet", "Job"} <= kinds
    assert not of_kind(distinct(everything), "Secret")
