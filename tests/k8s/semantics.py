"""What a schema cannot see: names that lead nowhere, budgets that do not add up, pods that nobody selects.

Each rule yields one line for each problem. tests/k8s/test_semantics.py breaks good manifests to see each rule bite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from roundhouse import serve
from tests.k8s.manifests import Objects, command, environment, find, of_kind, pods, selects, size

WAIT_AND_READ = 5  # seconds that `Server.kill` waits for Triton's children and the log
MADE_BY_HAND = ("roundhouse-ssh", "roundhouse-api-keys", "roundhouse-tls")
GIVEN = ("PATH", "LD_LIBRARY_PATH", "LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE")  # by the image, by LeaderWorkerSet
Problems = Iterator[str]


def unique_names(objects: Objects) -> Problems:
    seen = set()
    for o in objects:
        key = o["kind"], o["metadata"]["name"]
        if key in seen:
            yield f"{key}: twice"
        seen.add(key)


def selectors_select(objects: Objects) -> Problems:
    """Workloads select their own pods; everything else that selects pods finds some."""
    everyone = list(pods(objects))
    for o in of_kind(objects, "Deployment", "DaemonSet"):
        labels = o["spec"]["template"]["metadata"]["labels"]
        if not selects(o["spec"]["selector"]["matchLabels"], labels):
            yield f"{o['kind']}/{o['metadata']['name']}: its selector does not select its own pods"
    picks = {
        "Service": lambda o: o["spec"]["selector"],
        "PodDisruptionBudget": lambda o: o["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": lambda o: o["spec"]["podSelector"]["matchLabels"],
        "PodMonitor": lambda o: o["spec"]["selector"]["matchLabels"],
        "InferencePool": lambda o: o["spec"]["selector"]["matchLabels"],
    }
    for o in of_kind(objects, *picks):
        if not any(selects(picks[o["kind"]](o), pod.labels) for pod in everyone):
            yield f"{o['kind']}/{o['metadata']['name']}: selects no pod"
    for pod in everyone:
        for constraint in pod.spec.get("topologySpreadConstraints", []):
            if not selects(constraint["labelSelector"]["matchLabels"], pod.labels):
                yield f"{pod.name}: its topology spread does not count its own pods"


def ports_exist(objects: Objects) -> Problems:
    """Whoever names a port means one that the selected pods have."""
    everyone = list(pods(objects))
    for pod in everyone:
        numbers = [port["containerPort"] for c in pod.containers for port in c.get("ports", [])]
        if len(numbers) > len(set(numbers)):
            yield f"{pod.name}: two containers have the same port"
        for container in pod.containers:
            own = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container.get(probe, {})
                kind = next((kind for kind in ("httpGet", "grpc", "tcpSocket") if kind in asked), "")
                port = asked.get(kind, {}).get("port")
                if port is not None and port not in own and port not in own.values():
                    yield f"{pod.name}/{container['name']}: {probe} asks port {port}, which it does not have"
    wanted = {
        "Service": lambda o: [(o["spec"]["selector"], p["targetPort"]) for p in o["spec"]["ports"]],
        "PodMonitor": lambda o: [
            (o["spec"]["selector"]["matchLabels"], p["port"]) for p in o["spec"]["podMetricsEndpoints"]
        ],
        "NetworkPolicy": lambda o: [
            (o["spec"]["podSelector"]["matchLabels"], p["port"])
            for rule in o["spec"].get("ingress", [])
            for p in rule.get("ports", [])
        ],
        "InferencePool": lambda o: [
            (o["spec"]["selector"]["matchLabels"], p["number"]) for p in o["spec"]["targetPorts"]
        ],
    }
    for o in of_kind(objects, *wanted):
        for selector, port in wanted[o["kind"]](o):
            for pod in everyone:
                if selects(selector, pod.labels) and port not in pod.port_names() | pod.port_numbers():
                    yield f"{o['kind']}/{o['metadata']['name']}: {pod.name} has no port {port}"


def volumes_match(objects: Objects) -> Problems:
    for pod in pods(objects):
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        mounted = {mount["name"] for c in pod.all_containers for mount in c.get("volumeMounts", [])}
        for name in mounted - volumes:
            yield f"{pod.name}: mounts the volume {name}, which it does not have"
        for name in volumes - mounted:
            yield f"{pod.name}: nobody mounts the volume {name}"


def references_resolve(objects: Objects) -> Problems:
    there = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for pod in pods(objects):
        wanted = [("ServiceAccount", pod.spec.get("serviceAccountName", "default"))]
        if "priorityClassName" in pod.spec:
            wanted.append(("PriorityClass", pod.spec["priorityClassName"]))
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                wanted.append(("ConfigMap", volume["configMap"]["name"]))
            if "secret" in volume and not _is_known(volume["secret"]):
                wanted.append(("Secret", volume["secret"]["secretName"]))
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for kind, name in wanted:
            if (kind, name) not in there:
                yield f"{pod.name}: needs {kind}/{name}, which is not there"
    for o in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = o["spec"]["scaleTargetRef"]
        if (target.get("kind", "Deployment"), target["name"]) not in there:
            yield f"{o['kind']}/{o['metadata']['name']}: scales {target['name']}, which is not there"
    for o in of_kind(objects, "InferencePool"):
        picker = o["spec"]["endpointPickerRef"]
        if ("Service", picker["name"]) not in there:
            yield f"InferencePool: its picker {picker['name']} is not there"
        elif picker["port"]["number"] not in {
            p["port"] for p in find(objects, "Service", picker["name"])["spec"]["ports"]
        }:
            yield f"InferencePool: its picker has no port {picker['port']['number']}"
    for o in of_kind(objects, "HTTPRoute"):
        for rule in o["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if (backend["kind"], backend["name"]) not in there:
                    yield f"HTTPRoute: {backend['kind']}/{backend['name']} is not there"
    for o in of_kind(objects, "RoleBinding"):
        for subject in o["subjects"]:
            if (subject["kind"], subject["name"]) not in there or subject.get("namespace") != o["metadata"][
                "namespace"
            ]:
                yield f"RoleBinding: {subject['name']} is not there"


def _is_known(secret: dict[str, Any]) -> bool:
    """Secrets are made by hand (docs/operations.md): the pod does without, or it is one that must be there."""
    return bool(secret.get("optional")) or secret["secretName"] in MADE_BY_HAND


def paths_are_mounted(objects: Objects) -> Problems:
    """Files that a command or a variable names lie on a volume that the container sees, or in the image."""
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.all_containers:
            mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
            texts = [*command(container), *environment(container).values()]
            for path in re.findall(
                r"/(?:deployment|models|engines|config|cache|huggingface|api-keys|tls|ssh)[\w./-]*", " ".join(texts)
            ):
                mount = next((m for m in mounts if path == m or path.startswith(f"{m}/")), None)
                if mount is None:
                    if not any(f"roundhouse{path}" in text for text in texts):  # /opt/roundhouse/models
                        yield f"{pod.name}/{container['name']}: {path} is not mounted"
                    continue
                config = volumes.get(mounts[mount], {}).get("configMap")
                if config is None or not [o for o in objects if o["metadata"]["name"] == config["name"]]:
                    continue
                data = find(objects, "ConfigMap", config["name"])["data"]
                if path != mount and path.removeprefix(f"{mount}/") not in data:
                    yield f"{pod.name}/{container['name']}: {path} is not in ConfigMap/{config['name']}"


def variables_are_set(objects: Objects) -> Problems:
    for pod in pods(objects):
        for container in pod.all_containers:
            names = {entry["name"] for entry in container.get("env", [])}
            for text in command(container):
                for name in re.findall(r"\$[({]?([A-Z][A-Z_]+)", text):
                    if name not in names and name not in GIVEN:
                        yield f"{pod.name}/{container['name']}: ${name} is not set"


def probes(objects: Objects) -> Problems:
    """Each container that serves has all three; what restarts a container is not what takes it out of service."""
    for pod in pods(objects):
        if not pod.serves:
            continue
        for container in pod.containers:
            where = f"{pod.name}/{container['name']}"
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe not in container:
                    yield f"{where}: no {probe}"
            path = container.get("livenessProbe", {}).get("httpGet", {}).get("path", "")
            if "ready" in path:
                yield f"{where}: liveness asks {path}, which is false while a model loads"
            startup = container.get("startupProbe", {})
            budget = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
            deadline = pod.owner["spec"].get("progressDeadlineSeconds", 600)
            if pod.owner["kind"] == "Deployment" and budget >= deadline:
                yield f"{where}: may start for {budget} s, but the rollout is called stuck after {deadline} s"


def drain_budget(objects: Objects) -> Problems:
    """preStop + drain + what ending takes fits into the grace period; no container is cut before the others."""
    for pod in pods(objects):
        serving = [c for c in pod.containers if c.get("command", [])[:2] == ["roundhouse", "serve"]]
        for container in serving:
            pause = pre_stop(container)
            (drain,) = [int(a.split("=")[1]) for a in command(container) if a.startswith("--drain-seconds=")]
            needed = pause + drain + serve.IDLE_SECONDS + serve.EXIT_SECONDS + WAIT_AND_READ
            grace = pod.spec.get("terminationGracePeriodSeconds", 30)
            if pause < 10:
                yield f"{pod.name}: preStop waits {pause} s; proxies take longer to hear that a pod leaves"
            if needed >= grace:
                yield f"{pod.name}: {needed:.0f} s to drain and end, but killed after {grace} s"
            for beside in pod.containers:
                if pre_stop(beside) < pause:
                    yield f"{pod.name}/{beside['name']}: stops {pause - pre_stop(beside)} s before the server"


def pre_stop(container: dict[str, object]) -> int:
    """Seconds that a container goes on as before when its pod is to end."""
    hook = container.get("lifecycle", {}).get("preStop", {})  # type: ignore[attr-defined]
    sleep = hook.get("exec", {}).get("command", ["", "0"])
    return int(sleep[1]) if sleep[0] in ("", "/bin/sleep") else 0


def resources(objects: Objects) -> Problems:
    """Requests are limits for what cannot be taken back; no CPU limit; shared memory is part of the memory."""
    for pod in pods(objects):
        shared = sum(size(v["emptyDir"].get("sizeLimit", "0")) for v in pod.spec.get("volumes", []) if _is_memory(v))
        for container in pod.all_containers:
            where = f"{pod.name}/{container['name']}"
            requests = container.get("resources", {}).get("requests", {})
            limits = container.get("resources", {}).get("limits", {})
            if "cpu" not in requests or "cpu" in limits:
                yield f"{where}: needs a CPU request, and no limit"
            fixed = {name: value for name, value in requests.items() if name != "cpu"}
            if "memory" not in fixed or fixed != limits:
                yield f"{where}: requests {fixed} are not limits {limits}"
            sees = {m["name"] for m in container.get("volumeMounts", [])} & {
                v["name"] for v in pod.spec.get("volumes", []) if _is_memory(v)
            }
            if sees and size(limits.get("memory", "0")) < 2 * shared:
                yield f"{where}: shared memory of {shared} is not counted in its memory"
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.name}: the volume {volume['name']} has no size limit"


def _is_memory(volume: dict[str, dict[str, str]]) -> bool:
    return volume.get("emptyDir", {}).get("medium") == "Memory"


def shared_memory(objects: Objects) -> Problems:
    """Triton's Python models talk through /dev/shm: in the container itself, not only in an init container."""
    for pod in pods(objects):
        for container in pod.containers:
            first = container.get("command", [])[:2]
            if first in (["roundhouse", "serve"], ["roundhouse", "build"], ["vllm", "serve"]):
                paths = {m["mountPath"] for m in container["volumeMounts"]}
                if "/dev/shm" not in paths:
                    yield f"{pod.name}/{container['name']}: no /dev/shm"
                # A restarted container has the process ids of the one before, and would find its `draining` file.
                if any(path == "/tmp" or path.startswith("/tmp/") for path in paths):
                    yield f"{pod.name}/{container['name']}: a volume at /tmp outlives the container"


def gpus(objects: Objects) -> Problems:
    """GPUs come with a product to choose nodes by, and a toleration of the taint that such nodes have."""
    for pod in pods(objects):
        wants = any("nvidia.com/gpu" in c.get("resources", {}).get("limits", {}) for c in pod.all_containers)
        if not wants:
            continue
        terms = (
            pod.spec.get("affinity", {})
            .get("nodeAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", {})
            .get("nodeSelectorTerms", [])
        )
        keys = {e["key"] for term in terms for e in term["matchExpressions"]}
        if "nvidia.com/gpu.product" not in keys:
            yield f"{pod.name}: asks for GPUs of any product"
        if not any(t.get("key") == "nvidia.com/gpu" for t in pod.spec.get("tolerations", [])):
            yield f"{pod.name}: does not tolerate the taint of GPU nodes"


def images(objects: Objects) -> Problems:
    for pod in pods(objects):
        for container in pod.all_containers:
            image = container["image"]
            if image != "roundhouse:local" and not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", image):
                yield f"{pod.name}/{container['name']}: image {image} has no digest"
            if container.get("imagePullPolicy") != "IfNotPresent":
                yield f"{pod.name}/{container['name']}: pulls an image again that cannot change"


def secrets(objects: Objects) -> Problems:
    """Secrets are referred to, never written down."""
    for o in of_kind(objects, "Secret"):
        yield f"Secret/{o['metadata']['name']}: is in the manifests"
    for pod in pods(objects):
        for container in pod.all_containers:
            for name, value in environment(container).items():
                if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", name) and not value.startswith("/"):
                    yield f"{pod.name}/{container['name']}: {name} has its value in the manifest"
            for entry in container.get("env", []):
                if "secretKeyRef" in entry.get("valueFrom", {}):
                    yield f"{pod.name}/{container['name']}: {entry['name']} is a secret in a variable, not in a file"


def replicas(objects: Objects) -> Problems:
    """What an autoscaler sets is not set by `kubectl apply` too; and there is one autoscaler at most."""
    scalers = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    if len({o["spec"]["scaleTargetRef"]["name"] for o in scalers}) < len(scalers):
        yield "two autoscalers fight over one Deployment"
    for scaler in scalers:
        name = scaler["spec"]["scaleTargetRef"]["name"]
        targets = [o for o in of_kind(objects, "Deployment") if o["metadata"]["name"] == name]
        if any("replicas" in o["spec"] for o in targets):
            yield f"{name}: has an autoscaler and a number of replicas"


def namespaces(objects: Objects) -> Problems:
    """Everything is in the one namespace that is made, but for what has none."""
    (namespace,) = {o["metadata"]["namespace"] for o in objects if "namespace" in o["metadata"]}
    for o in objects:
        if o["kind"] == "Namespace" and o["metadata"]["name"] != namespace:
            yield f"Namespace/{o['metadata']['name']}: is made, but {namespace} is used"
        if o["kind"] not in ("Namespace", "PriorityClass") and "namespace" not in o["metadata"]:
            yield f"{o['kind']}/{o['metadata']['name']}: in no namespace"


RULES: tuple[Callable[[Objects], Problems], ...] = (
    unique_names,
    selectors_select,
    ports_exist,
    volumes_match,
    references_resolve,
    paths_are_mounted,
    variables_are_set,
    probes,
    drain_budget,
    resources,
    shared_memory,
    gpus,
    images,
    secrets,
    replicas,
    namespaces,
)


def problems(objects: Objects) -> list[str]:
    return [problem for rule in RULES for problem in rule(objects)]
