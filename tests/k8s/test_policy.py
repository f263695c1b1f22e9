"""Every pod keeps to the restricted Pod Security Standard and to our own rules; each rule and exception matters."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.k8s import policy
from tests.k8s.manifests import Combination, Objects, combinations, find

BREAKAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes to the pod, changes to the container
    "hostNetwork": ({"hostNetwork": True}, {}),
    "hostPID": ({"hostPID": True}, {}),
    "hostIPC": ({"hostIPC": True}, {}),
    "user id": ({"securityContext": {"runAsNonRoot": True, "runAsUser": 1000}}, {}),
    "seccompProfile": ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, {}),
    "sysctls": ({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}, {}),
    "automountServiceAccountToken": ({"automountServiceAccountToken": True}, {}),
    "enableServiceLinks": ({"enableServiceLinks": True}, {}),
    "reaches the node": ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, {}),
    "privileged": ({}, {"securityContext": {"privileged": True}}),
    "allowPrivilegeEscalation": ({}, {"securityContext": {}}),
    "capabilities": ({}, {"securityContext": {"capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}}),
    "overrides": ({}, {"securityContext": {"runAsUser": 0}}),
    "hostPort": ({}, {"ports": [{"name": "http", "containerPort": 8000, "hostPort": 80}]}),
}


@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_the_shipped_combinations_keep_the_rules(combination: Combination, everything: dict[Any, Objects]) -> None:
    assert policy.violations(everything[combination]) == []


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_rule_is_found(name: str, local_cpu: Objects) -> None:
    broken = copy.deepcopy(local_cpu)
    spec = find(broken, "Deployment", "roundhouse")["spec"]["template"]["spec"]
    pod, container = BREAKAGES[name]
    spec.update(pod)
    spec["containers"][0].update(container)
    assert any(name in violation for violation in policy.violations(broken))


def test_rights_network_and_namespace_are_looked_at(full: Objects) -> None:
    broken = copy.deepcopy(full)
    find(broken, "Role", "roundhouse-endpoint-picker")["rules"][0]["verbs"] = ["*"]
    find(broken, "Namespace", "roundhouse")["metadata"]["labels"].clear()
    broken.remove(find(broken, "NetworkPolicy", "vllm"))
    assert policy.violations(broken) == [
        "Deployment/vllm/*: no NetworkPolicy",
        "Role/roundhouse-endpoint-picker: may more than read its namespace",
        "Namespace/roundhouse: does not enforce the standard",
    ]


@pytest.mark.parametrize("exception", policy.EXCEPTIONS, ids="/".join)
def test_each_exception_is_needed(
    exception: tuple[str, str, str], full: Objects, group: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(policy.EXCEPTIONS, exception)
    _, container, rule = exception
    found = policy.violations(full) or policy.violations(group)
    assert len(found) == 1
    assert found[0].endswith(f"/{container}: {rule}")
