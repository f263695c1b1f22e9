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
from tests.k8s.manifests import ROOT

SLOW = {
    "model": {"path": str(ROOT / "models/tiny")},
    "engine": {"kind": "synthetic", "tokens_per_second_per_sequence": 40},
    "limits": {"max_batch_size": 16, "max_seq_len": 2048},
}
OPTIONS = ["--streams=8", "--max-tokens=160", "--timeout=120"]  # four seconds a stream


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
    overlay.render(deployments.parse(SLOW, source="slow", base=ROOT), tmp_path / "overlay", image=overlay.LOCAL_IMAGE)
    yield state
    for pod in state.glob("*.pod"):
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(json.loads(pod.read_text())["pid"], signal.SIGTERM)
    for pod in state.glob("*.pod"):
        wait_for_end(json.loads(pod.read_text())["pid"])


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
def test_a_drain_that_loses_nothing(cluster: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert k8s_smoke.main([f"--overlay={tmp_path / 'overlay'}", "--context=kind", *OPTIONS]) == 0
    said = capfd.readouterr().out
    assert "deployment/roundhouse created" in said
    assert "answer of roundhouse-0 after" in said
    assert "deleting roundhouse-0 under 8 open streams" in said
    assert "open streams: 8" in said  # they were open when the pod was deleted
    assert "lost streams: 0 of 8; roundhouse-1 has taken over" in said
    calls = [json.loads(line) for line in (cluster / "calls").read_text().splitlines()]
    assert all("--context=kind" in call or call[0] == "end" for call in calls)


@pytest.mark.server
def test_lost_streams_are_counted(
    cluster: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CLUSTER_KILLS", "1")
    assert k8s_smoke.main([f"--overlay={tmp_path / 'overlay'}", *OPTIONS]) == 1
    said = capfd.readouterr().out
    assert "lost streams: 8 of 8; roundhouse-1 has taken over" in said


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
