"""Deployments on several nodes: a LeaderWorkerSet whose pods are the Deployment's, and what mpirun is told."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from roundhouse import deployment as deployments
from roundhouse.deployment import DeploymentError
from roundhouse.kubernetes import overlay
from tests.k8s import crds, policy, semantics
from tests.k8s.manifests import IMAGE, ROOT, Objects, Pod, environment, find, of_kind, pods


def load(**gpu: int) -> deployments.Deployment:
    raw = yaml.safe_load((ROOT / "deployments/llama-3-70b-2xh100.yaml").read_text())
    raw["gpu"] |= gpu
    return deployments.parse(raw, source="here", base=ROOT / "deployments")


@pytest.fixture
def leader(group: Objects) -> Pod:
    return next(pod for pod in pods(group) if pod.labels["app.kubernetes.io/component"] == "server")


@pytest.fixture
def worker(group: Objects) -> Pod:
    return next(pod for pod in pods(group) if pod.labels["app.kubernetes.io/component"] == "worker")


def test_it_keeps_every_rule(group: Objects) -> None:
    assert semantics.problems(group) == []
    assert policy.violations(group) == []


def test_the_custom_resource_is_valid(group: Objects) -> None:
    (o,) = of_kind(group, "LeaderWorkerSet")
    assert crds.problems(o, crds.schemas()[o["apiVersion"], o["kind"]]) == []
    broken: Any = {**o, "spec": {**o["spec"], "startupPolicy": "Someday"}}
    assert crds.problems(broken, crds.schemas()[o["apiVersion"], o["kind"]])


def test_the_group_takes_the_deployments_place(group: Objects) -> None:
    assert not of_kind(group, "Deployment")
    template = find(group, "LeaderWorkerSet", "roundhouse-group")["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_gpus_are_those_of_one_node(leader: Pod, worker: Pod, group: Objects) -> None:
    for pod in (leader, worker):
        assert pod.container("server")["resources"]["limits"]["nvidia.com/gpu"] == "8"
    (build,) = of_kind(group, "Job")
    assert build["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_a_worker_is_the_servers_pod_that_serves_nothing(leader: Pod, worker: Pod, group: Objects) -> None:
    """The ranks that mpirun starts there find the same files."""
    assert worker.spec["volumes"] == leader.spec["volumes"]
    assert worker.container("server")["volumeMounts"] == leader.container("server")["volumeMounts"]
    assert worker.container("server")["image"] == leader.container("server")["image"]
    assert worker.port_names() == {"ssh"}
    for service in of_kind(group, "Service"):
        assert not service["spec"]["selector"].items() <= worker.labels.items()


def test_mpirun_is_told_of_every_host(leader: Pod, tmp_path: Path) -> None:
    """The init container's own script, with the variables that LeaderWorkerSet sets."""
    container = leader.container("hosts")
    script = container["args"][0].replace("/cache/", f"{tmp_path}/")
    given = {
        **environment(container),
        "PATH": "/usr/bin:/bin",
        "LWS_LEADER_ADDRESS": "roundhouse-group-0.roundhouse-group.roundhouse",
        "LWS_GROUP_SIZE": "3",
    }
    subprocess.run([*container["command"], script], env=given, check=True, timeout=10, stdout=subprocess.DEVNULL)
    assert (tmp_path / "hosts").read_text().splitlines() == [
        "roundhouse-group-0.roundhouse-group.roundhouse slots=8",
        "roundhouse-group-0-1.roundhouse-group.roundhouse slots=8",
        "roundhouse-group-0-2.roundhouse-group.roundhouse slots=8",
    ]
    assert environment(leader.container("server"))["OMPI_MCA_orte_default_hostfile"] == "/cache/hosts"


def test_short_host_names_for_open_mpi(leader: Pod, worker: Pod) -> None:
    """Pods of about 60 characters break its spawn: "singleton.HOST.PID" must fit 50 bytes."""
    for pod in (leader, worker):
        assert len(environment(pod.container("server"))["PMIX_HOSTNAME"]) < 30


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"count": 6, "tensor_parallel": 6, "nodes": 4}, "gpu.nodes: 4 do not share gpu.count (6) evenly"),
        ({"count": 2, "tensor_parallel": 2, "nodes": 0}, "gpu.nodes: "),
    ],
)
def test_nodes_that_cannot_be_are_refused(gpu: dict[str, int], said: str) -> None:
    with pytest.raises(DeploymentError, match=r"gpu\.nodes") as refused:
        load(**gpu)
    assert said in str(refused.value)


def test_only_ranks_that_mpirun_starts_may_be_elsewhere() -> None:
    raw = yaml.safe_load((ROOT / "deployments/llama-3-70b-2xh100.yaml").read_text())
    raw["gpu"]["nodes"] = 2
    raw["engine"]["launch"] = "orchestrator"
    with pytest.raises(DeploymentError, match=r"gpu\.nodes: 2 machines need ranks that mpirun starts"):
        deployments.parse(raw, source="here", base=ROOT)


@pytest.mark.parametrize("component", ["autoscaling-keda", "rollout-without-spare-gpu"])
def test_what_acts_on_a_deployment_is_refused(component: str, tmp_path: Path) -> None:
    two = load(count=4, tensor_parallel=4, nodes=2)
    with pytest.raises(DeploymentError, match=f"--with {component}: not for gpu.nodes > 1"):
        overlay.render(two, tmp_path / "overlay", image=IMAGE, components=(component,))
    assert not (tmp_path / "overlay").exists()
