"""Real Triton servers for the tests: each deployment is started once a session, on free loopback ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "models/tiny")
START_SECONDS = 120
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
needs_vllm = pytest.mark.skipif(
    not (ROOT / ".venv-vllm/.roundhouse-vllm").exists(), reason="vLLM's environment is missing: scripts/setup --vllm"
)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


class Server:
    """`roundhouse serve` as a user starts it; ends with the block."""

    def __init__(self, deployment: Path, log: Path, *options: str) -> None:
        self.deployment = deployment
        self.log = log
        http, grpc, metrics, openai = free_ports(4)
        self.http_url = f"http://127.0.0.1:{http}"
        self.grpc_url = f"127.0.0.1:{grpc}"
        self.metrics_url = f"http://127.0.0.1:{metrics}"
        self.openai_url = f"http://127.0.0.1:{openai}"  # if the deployment opens that door
        self._command = [sys.executable, "-m", "roundhouse.cli", "serve", str(deployment), "--http-port", str(http)]
        self._command += ["--grpc-port", str(grpc), "--metrics-port", str(metrics), "--openai-port", str(openai)]
        self._command += options

    def __enter__(self) -> Self:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while not self.ready():
            assert self.process.poll() is None, f"the server ended\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"the server is not ready\n{self.log.read_text()}"
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def ready(self) -> bool:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.http_url}/v2/health/ready"):
            return True
        return False

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=90)

    def processes(self, text: str) -> list[psutil.Process]:
        """Those that the server started whose command line holds `text`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if text in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def engine(self) -> psutil.Process:
        (process,) = self.processes("roundhouse.engine.host")
        return process


def write_deployment(folder: Path, deployment: dict[str, Any]) -> Path:
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": TINY}, **deployment}))
    return path


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server of the test's own: `start({"engine": {...}, ...})`."""
    with ExitStack() as stack:

        def started(deployment: dict[str, Any], *options: str) -> Server:
            server = Server(write_deployment(tmp_path, deployment), tmp_path / "server.log", *options)
            return stack.enter_context(server)

        yield started


@pytest.fixture(scope="session")
def local_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The default deployment; or that of ROUNDHOUSE_TEST_DEPLOYMENT, which scripts/prove-trtllm sets."""
    log = tmp_path_factory.mktemp("local-cpu") / "server.log"
    deployment = Path(os.environ.get("ROUNDHOUSE_TEST_DEPLOYMENT", ROOT / "deployments/local-cpu.yaml"))
    with Server(deployment, log) as server:
        yield server


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Slow streams: 200 tokens a second each, 64 at once."""
    folder = tmp_path_factory.mktemp("synthetic")
    deployment = {
        "engine": {"kind": "synthetic", "tokens_per_second_per_sequence": 200},
        "limits": {"max_batch_size": 64, "max_seq_len": 8192, "queue": 16},
    }
    with Server(write_deployment(folder, deployment), folder / "server.log") as server:
        yield server
