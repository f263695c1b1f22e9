"""scripts/k8s-smoke against a stand-in for kubectl, which runs the overlay's server as a process of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import k8s_smoke
import pytest

from roundhouse import deployment as deployments
from roundhouse.kubernetes import overlay
from tests.k8s import manifests
from tests.k8s.manifests import ROOT
from tests.k8s.semantics import pre_stop

OPTIONS = ["--streams=8", "--max-tokens=50", "--timeout=120"]  # four seconds a stream; preStop takes one


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a cluster behind the stand-in, which is what `kubectl` means in the test."""
    real = shutil.which("kubectl")
    if real is None:
        pytest.skip("kubectl is missing; the smoke test is not tested")
    state, programs = tmp_path / "cluster", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    (programs / "kubectl").write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/k8s/fake_kubectl.py "$@"\n')
    (programs / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_CLUSTER", str(state))
    monkeypatch.setenv("REAL_KUBECTL", real)
    yield state
    pids = [json.loads(pod.read_text())["pid"] for pod in state.glob("*.pod")]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    for pid in pids:
        wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.server
def test_a_drain_that_loses_nothing(cluster: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert k8s_smoke.main(["--context=kind", *OPTIONS]) == 0
    said = capfd.readouterr().out
    assert "deployment/roundhouse created" in said
    assert "answer of roundhouse-0 after" in said
    assert "deleting roundhouse-0 under 8 open streams; it gets SIGTERM in 1 s" in said
    assert "lost streams: 0 of 8; roundhouse-1 has taken over" in said
    calls = [json.loads(line) for line in (cluster / "calls").read_text().splitlines()]
    assert all("--context=kind" in call or call[0] == "end" for call in calls)


@pytest.mark.server
def test_a_server_that_dies_at_sigterm_is_noticed(
    cluster: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CLUSTER_KILLS", "1")
    assert k8s_smoke.main(OPTIONS) == 1
    said = capfd.readouterr().out
    assert "lost streams: 8 of 8; roundhouse-1 has taken over" in said


@pytest.mark.server
def test_streams_that_end_before_sigterm_prove_nothing(
    cluster: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an overlay of one's own, whose engine is fast; the server would die at SIGTERM."""
    fast = deployments.load(ROOT / "deployments/synthetic.yaml")
    overlay.render(fast, tmp_path / "overlay", image=overlay.LOCAL_IMAGE)
    monkeypatch.setenv("FAKE_CLUSTER_KILLS", "1")
    assert k8s_smoke.main([f"--overlay={tmp_path / 'overlay'}", *OPTIONS]) == 1
    said = capfd.readouterr()
    assert "proves nothing: 8 of 8 streams had ended before the pod got SIGTERM" in said.err
    assert "lost streams" not in said.out


def test_one_stream_that_ended_before_sigterm_is_enough() -> None:
    streams = [k8s_smoke.Stream(ended=seconds) for seconds in (15.5, 14.5, 40.0)]
    with pytest.raises(k8s_smoke.SmokeError, match="proves nothing: 1 of 3 streams"):
        k8s_smoke.check_open(streams, 15.0)
    k8s_smoke.check_open(streams, 14.0)


def test_by_default_streams_outlast_pre_stop_and_end_within_the_drain(tmp_path: Path) -> None:
    options = k8s_smoke.parse([])
    objects = manifests.build(k8s_smoke.render(tmp_path, options))
    deployment = manifests.find(objects, "Deployment", "roundhouse")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    (drain,) = [float(a.split("=")[1]) for a in server["command"] if a.startswith("--drain-seconds=")]
    pause = k8s_smoke.pre_stop_seconds(deployment)
    assert pause == pre_stop(server) > 0
    assert pause + 10 < options.max_tokens / k8s_smoke.TOKENS_PER_SECOND < drain


def test_only_a_sleep_says_when_sigterm_comes() -> None:
    def deployment(server: dict[str, object]) -> dict[str, object]:
        return {"spec": {"template": {"spec": {"containers": [{"name": "server", **server}, {"name": "beside"}]}}}}

    assert k8s_smoke.pre_stop_seconds(deployment({})) == 0
    with pytest.raises(k8s_smoke.SmokeError, match="nobody knows when SIGTERM comes"):
        k8s_smoke.pre_stop_seconds(deployment({"lifecycle": {"preStop": {"httpGet": {"path": "/drain"}}}}))


def test_what_counts_as_lost() -> None:
    whole = k8s_smoke.Stream(text="1 2 3", error="")
    other = k8s_smoke.Stream(text="1 2", error="")
    cut = k8s_smoke.Stream(text="1 2", error="connection lost: IncompleteRead")
    assert k8s_smoke.lost([whole, other, cut], "1 2 3") == [
        "another answer than without a drain",
        "connection lost: IncompleteRead",
    ]


def test_pods_that_are_about_to_end_are_not_ready() -> None:
    ready = {"metadata": {"name": "a"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    ending = {**ready, "metadata": {"name": "b", "deletionTimestamp": "now"}}
    assert [k8s_smoke._ready(pod) for pod in (ready, ending, {"metadata": {"name": "c"}})] == [True, False, False]


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/k8s_smoke.py"), "--context=none", f"--overlay={tmp_path}"]
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": str(tmp_path / "none")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("k8s-smoke: kubectl apply -k")
