"""docs/operations.md: what can run without a cluster is run, and the rest names what there is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from roundhouse.triton.metrics import COUNTERS, GAUGES, HISTOGRAMS
from tests.k8s.manifests import ROOT, Objects, find, of_kind, pods

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
NEEDS_MORE = ("docker", "kind", "minikube", "curl", "ssh-keygen")  # than this machine has
KINDS = {
    "deployment": "Deployment",
    "service": "Service",
    "job": "Job",
    "scaledobject": "ScaledObject",
    "horizontalpodautoscaler": "HorizontalPodAutoscaler",
}


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]


def of(*programs: str) -> list[str]:
    return [command for command in commands() if shlex.split(command)[0] in programs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, as far as the commands look at it; overlays are written into it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("deployments", "k8s", "scripts", "models", "src"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
    words = shlex.split(command)
    if words[0] == "scripts/k8s-smoke":  # less the setting up
        words[:1] = ["python", "scripts/k8s_smoke.py"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_every_command_is_dealt_with_here() -> None:
    known = ("kubectl", "roundhouse", "scripts/k8s-smoke", *NEEDS_MORE)
    assert len(commands()) > 30
    assert [command for command in commands() if shlex.split(command)[0] not in known] == []


def test_what_can_run_without_a_cluster_runs(folder: Path) -> None:
    """In the order of the page."""
    offline = [c for c in of("roundhouse", "scripts/k8s-smoke", "kubectl") if _offline(c)]
    assert len(offline) >= 7
    for command in offline:
        done = run(command, folder)
        if command.startswith("roundhouse plan"):  # the checkpoint is on nobody's laptop
            assert "config.json cannot be read" in done.stderr
            continue
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_smoke_test_is_a_command() -> None:
    script = ROOT / "scripts/k8s-smoke"
    assert os.access(script, os.X_OK)
    assert script.read_text().endswith('exec .venv/bin/python scripts/k8s_smoke.py "$@"\n')


def test_the_folders_that_are_applied_are_there(folder: Path) -> None:
    applied = {argument for c in of("kubectl") for argument in re.findall(r"-k (\S+)", c)}
    assert len(applied) >= 4
    for name in applied:
        assert run(f"kubectl kustomize {name}", folder).returncode == 0, name


@pytest.mark.parametrize("command", sorted(set(of("kubectl"))))
def test_kubectl_knows_the_options(command: str, folder: Path) -> None:
    """It complains of unknown ones even if it is only to print its help."""
    done = run(f"{command} --help", folder)
    assert done.returncode == 0, done.stderr


def test_kubectl_would_say_if_it_did_not(folder: Path) -> None:
    assert run("kubectl get pods --no-such-option --help", folder).returncode != 0


def test_objects_and_selectors_are_those_of_the_manifests(full: Objects) -> None:
    named = [match for c in of("kubectl") for match in re.findall(r"\b(\w+)[/ ](roundhouse(?:-\w+)*)\b", c)]
    named = [(kind, name) for kind, name in named if kind in KINDS]
    assert len(named) > 8
    for kind, name in named:
        if (kind, name) != ("horizontalpodautoscaler", "roundhouse"):
            assert find(full, KINDS[kind], name)
    for selector in {s for c in of("kubectl") for s in re.findall(r"--selector (\S+)", c)}:
        key, value = re.split(r"!?=", selector)
        labels = [o["metadata"].get("labels", {}) for o in full] + [pod.labels for pod in pods(full)]
        assert any(label.get(key) == value for label in labels), selector


def test_secrets_that_pods_need_are_made_on_the_page() -> None:
    from tests.k8s.semantics import MADE_BY_HAND

    made = {name for c in of("kubectl") for name in re.findall(r"create secret \w+ (\S+)", c)}
    assert made == {*MADE_BY_HAND, "roundhouse-huggingface"}


def test_everything_but_the_server_is_what_the_page_says(full: Objects) -> None:
    """`kubectl apply -k` with that selector leaves out the one Deployment that would take the GPUs."""
    key, value = "app.kubernetes.io/component", "server"
    left_out = [o for o in full if o["metadata"].get("labels", {}).get(key) == value]
    assert [(o["kind"], o["metadata"]["name"]) for o in left_out] == [("Deployment", "roundhouse")]
    (build,) = [o for o in of_kind(full, "Job") if "engine-build" in o["metadata"]["name"]]
    assert build["metadata"]["labels"][key] == "engine-build"


def test_figures_of_the_page_are_those_of_the_manifests(full: Objects) -> None:
    server = next(pod for pod in pods(full) if pod.name == "Deployment/roundhouse")
    grace = server.spec["terminationGracePeriodSeconds"]
    (drain,) = [a.split("=")[1] for a in server.container("server")["command"] if a.startswith("--drain-seconds=")]
    (pause,) = server.container("server")["lifecycle"]["preStop"]["exec"]["command"][1:]
    assert f"goes on for {pause} s," in PAGE
    assert f"finish, for {drain} s at most; and is killed after {grace} s." in PAGE
    assert "30 minutes are allowed" in PAGE
    startup = server.container("server")["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 30 * 60
    keda = find(full, "ScaledObject", "roundhouse")["spec"]
    waiting, fraction = (trigger["metadata"] for trigger in keda["triggers"])
    assert f'| `nv_trt_llm_request_metrics{{request_type="waiting"}}` | {waiting["threshold"]} |' in PAGE
    assert f"| `active` / `max` of the same | {fraction['threshold']} |" in PAGE
    assert f"`maxReplicas` is {keda['maxReplicaCount']}" in PAGE
    assert waiting["serverAddress"].removeprefix("http://") in PAGE


def test_the_metrics_of_the_page_are_exported() -> None:
    exported = {*COUNTERS, *GAUGES, *HISTOGRAMS}
    named = set(re.findall(r"\b(?:nv_trt_llm|roundhouse)_[a-z_]+\b", PAGE)) - {"roundhouse_waiting_requests"}
    assert len(named) >= 6
    assert named <= exported
    for family, label, value in re.findall(r'`(nv_trt_llm_\w+)\{(\w+)="(\w+)"\}`', PAGE):
        assert GAUGES[family][1] == label
        assert value in GAUGES[family][2]


def _offline(command: str) -> bool:
    words = shlex.split(command)
    return words[0] != "kubectl" or words[1] == "kustomize"
