"""The Pod Security Standard "restricted", and what we ask of pods beyond it.

The rules of the standard: https://kubernetes.io/docs/concepts/security/pod-security-standards. A scanner does not add
to these: checkov 3.3.30 on everything that is shipped found 12 things beside 363 that pass; three became rules here
(network policies, secrets as files, read-only root), the others are argued in docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.k8s.manifests import Objects, Pod, of_kind, pods, selects

VOLUMES = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret", "csi"}
# Exceptions: (workload's component, container, rule) -> why.
CDI = "GPU injection through CDI hooks writes into the container's root"
EXCEPTIONS = {
    ("server", "server", "readOnlyRootFilesystem"): f"{CDI}; and /tmp must be as young as the container",
    ("server", "wait-for-engine", "readOnlyRootFilesystem"): f"a pod with GPUs: {CDI}",
    ("engine-build", "build", "readOnlyRootFilesystem"): CDI,
    ("server", "hosts", "readOnlyRootFilesystem"): f"a pod with GPUs: {CDI}",
    ("worker", "server", "readOnlyRootFilesystem"): f"the server's container, with another command: {CDI}",
    ("vllm", "vllm", "readOnlyRootFilesystem"): CDI,
    ("endpoint-picker", "*", "automountServiceAccountToken"): "it watches pods and the pool through the API server",
}


def violations(objects: Objects) -> list[str]:
    """One line for each rule that a pod breaks, without the exceptions."""
    found = [
        f"{pod.name}/{container}: {rule}"
        for pod in pods(objects)
        for container, rule in [*_of_pod(pod), *_of_containers(pod), *_of_network(pod, objects)]
        if (pod.labels["app.kubernetes.io/component"], container, rule) not in EXCEPTIONS
    ]
    for o in of_kind(objects, "Role", "ClusterRole"):
        for rule in o["rules"]:
            if o["kind"] == "ClusterRole" or "*" in str(rule) or set(rule["verbs"]) - {"get", "list", "watch"}:
                found.append(f"{o['kind']}/{o['metadata']['name']}: may more than read its namespace")
    for o in of_kind(objects, "Namespace"):
        if o["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            found.append(f"Namespace/{o['metadata']['name']}: does not enforce the standard")
    return found


def _of_pod(pod: Pod) -> Iterator[tuple[str, str]]:
    spec, context = pod.spec, pod.spec.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield "*", key
    if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) <= 10000:
        yield "*", "runAsNonRoot with a user id above 10000"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "*", "seccompProfile"
    if context.get("sysctls"):
        yield "*", "sysctls"
    if spec.get("automountServiceAccountToken") is not False:
        yield "*", "automountServiceAccountToken"
    if spec.get("enableServiceLinks") is not False:
        yield "*", "enableServiceLinks"
    for volume in spec.get("volumes", []):
        if not set(volume) - {"name"} <= VOLUMES:
            yield "*", f"volume {volume['name']} of a kind that reaches the node"


def _of_containers(pod: Pod) -> Iterator[tuple[str, str]]:
    for container in pod.all_containers:
        name, context = container["name"], container.get("securityContext", {})
        if context.get("privileged"):
            yield name, "privileged"
        if context.get("allowPrivilegeEscalation") is not False:
            yield name, "allowPrivilegeEscalation"
        if context.get("capabilities", {}).get("drop") != ["ALL"] or context.get("capabilities", {}).get("add"):
            yield name, "capabilities"
        if context.get("readOnlyRootFilesystem") is not True:
            yield name, "readOnlyRootFilesystem"
        if {"runAsUser", "runAsNonRoot", "seccompProfile", "procMount"} & set(context):
            yield name, "overrides what is said of the pod"
        for port in container.get("ports", []):
            if "hostPort" in port:
                yield name, "hostPort"


def _of_network(pod: Pod, objects: Objects) -> Iterator[tuple[str, str]]:
    """Each pod is under a policy that says who may come in."""
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        if selects(spec["podSelector"]["matchLabels"], pod.labels) and "Ingress" in spec["policyTypes"]:
            return
    yield "*", "no NetworkPolicy"
