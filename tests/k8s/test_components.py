"""What single components are for, where no general rule says it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import Combination, Objects, Pod, command, environment, find, of_kind, pods

SPECULATIVE = "llama-3-70b-2xh100-speculative"


def only(objects: Objects, name: str) -> Pod:
    return next(pod for pod in pods(objects) if pod.name == name)


def strategy(objects: Objects) -> Any:
    return find(objects, "Deployment", "roundhouse")["spec"]["strategy"]["rollingUpdate"]


def test_a_rollout_keeps_the_old_pod_or_needs_no_spare_gpu(everything: dict[Any, Objects]) -> None:
    """Surge 1 and unavailable 0 without a spare GPU is stuck for ever; the other way round is a pause."""
    assert strategy(everything[Combination(SPECULATIVE, ())]) == {"maxSurge": 1, "maxUnavailable": 0}
    without = everything[Combination(SPECULATIVE, ("rollout-without-spare-gpu",))]
    assert strategy(without) == {"maxSurge": 0, "maxUnavailable": 1}


def test_clients_that_balance_by_themselves_see_every_pod(local_cpu: Objects) -> None:
    headless = find(local_cpu, "Service", "roundhouse-grpc")["spec"]
    assert headless["clusterIP"] == "None"
    assert [port["port"] for port in headless["ports"]] == [8001]
    assert "clusterIP" not in find(local_cpu, "Service", "roundhouse")["spec"]


def test_a_node_can_be_drained_though_there_is_one_pod(local_cpu: Objects) -> None:
    """`minAvailable: 1` would block it for ever; unhealthy pods do not block it either."""
    budget = find(local_cpu, "PodDisruptionBudget", "roundhouse")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_only_those_who_may_get_in(local_cpu: Objects) -> None:
    """The server has no authentication."""
    (clients, monitoring) = find(local_cpu, "NetworkPolicy", "roundhouse")["spec"]["ingress"]
    assert {p["port"] for p in monitoring["ports"]} == {"metrics"}
    assert {p["port"] for p in clients["ports"]} == {"http", "grpc"}
    for rule in (clients, monitoring):
        assert all(peer.get("namespaceSelector", {}) != {} or "podSelector" in peer for peer in rule["from"])
    assert find(local_cpu, "NetworkPolicy", "roundhouse")["spec"]["egress"] == []


def test_the_image_is_pulled_where_the_server_may_run(everything: dict[Any, Objects]) -> None:
    objects = everything[Combination(SPECULATIVE, ("image-prepull",))]
    server, image = only(objects, "Deployment/roundhouse"), only(objects, "DaemonSet/roundhouse-image")
    assert image.spec["affinity"] == server.spec["affinity"]
    assert image.spec["tolerations"] == server.spec["tolerations"]
    assert image.container("hold")["image"] == server.container("server")["image"]


def test_the_build_runs_where_the_server_runs(everything: dict[Any, Objects]) -> None:
    """Same image, GPUs and volumes: an engine runs only where it was compiled."""
    objects = everything[Combination(SPECULATIVE, ())]
    (build,) = [pod for pod in pods(objects) if "engine-build" in pod.name]
    server = only(objects, "Deployment/roundhouse")
    assert build.spec["affinity"] == server.spec["affinity"]
    assert build.container("build")["image"] == server.container("server")["image"]
    gpu = "nvidia.com/gpu"
    assert (
        build.container("build")["resources"]["limits"][gpu] == server.container("server")["resources"]["limits"][gpu]
    )
    mounts = {
        name: {m["name"]: m.get("readOnly", False) for m in pod.container(name)["volumeMounts"]}
        for pod, name in ((build, "build"), (server, "server"))
    }
    assert (mounts["build"]["engines"], mounts["build"]["models"]) == (False, True)
    assert (mounts["server"]["engines"], mounts["server"]["models"]) == (True, True)


@pytest.mark.parametrize("deployment", [SPECULATIVE, "llama-3-8b-h200-vllm"])
def test_vllm_gets_the_classic_arguments(deployment: str, everything: dict[Any, Objects]) -> None:
    combination = Combination(deployment, ("vllm-comparison",))
    meant = combination.load()
    assert meant.gpu is not None
    container = only(everything[combination], "Deployment/vllm").container("vllm")
    arguments = command(container)
    assert arguments[:3] == ["vllm", "serve", "$(MODEL)"]
    assert environment(container)["MODEL"] == f"/models/{meant.model.path.rsplit('/', 1)[-1]}"
    expected = {
        "--port=8000",
        "--max-num-batched-tokens=8192",
        "--max-num-seqs=64",
        "--enable-chunked-prefill",
        "--enable-prefix-caching",
        "--gpu-memory-utilization=0.92",
        "--kv-cache-dtype=fp8_e5m2",
        f"--tensor-parallel-size={meant.gpu.tensor_parallel}",
        "--max-model-len=8192",
    }
    given = {a for a in arguments[3:] if not a.startswith("--speculative-config=")}
    assert given == expected  # and no --enforce-eager
    drafting = [json.loads(a.split("=", 1)[1]) for a in arguments if a.startswith("--speculative-config=")]
    if meant.speculative is None:
        assert drafting == []
    else:
        (settings,) = drafting
        assert settings == {
            "method": "draft_model",
            "model": "/models/Meta-Llama-3-8B-Instruct",
            "num_speculative_tokens": 5,
        }
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(meant.gpu.count)


def test_the_picker_knows_the_engine_and_the_parsers(everything: dict[Any, Objects]) -> None:
    """Without `passthrough-parser` its version 0.10 answers 400 to any path that is not OpenAI's."""
    objects = everything[Combination("local-cpu", ("inference-gateway",))]
    (config,) = [o for o in of_kind(objects, "ConfigMap") if "endpoint-picker" in o["metadata"]["name"]]
    settings = yaml.safe_load(config["data"]["endpoint-picker-config.yaml"])
    declared = {plugin["type"] for plugin in settings["plugins"]}
    used = [p["pluginRef"] for profile in settings["schedulingProfiles"] for p in profile["plugins"]]
    parsers = [p["pluginRef"] for p in settings["requestHandler"]["parsers"]]
    assert parsers == ["openai-parser", "passthrough-parser"]
    assert {*used, *parsers} <= declared
    assert {"queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer"} == set(used)
    labels = only(objects, "Deployment/roundhouse").labels
    assert labels["llm-d.ai/engine-type"] == "triton-tensorrt-llm"
    assert find(objects, "Deployment", "roundhouse-endpoint-picker")["spec"]["replicas"] == 1


def test_tensor_parallel_pods_have_a_short_host_name(everything: dict[Any, Objects]) -> None:
    """Open MPI 5 puts "singleton.HOST.PID" into 50 bytes."""
    server = only(everything[Combination(SPECULATIVE, ())], "Deployment/roundhouse")
    assert len(environment(server.container("server"))["PMIX_HOSTNAME"]) < 30
