"""Servers to measure: started from a deployment file for the time of a measurement, and what their metrics say."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from roundhouse.bench.clients import Target

START_SECONDS = 600.0
STOP_SECONDS = 90.0
METRICS_SECONDS = 0.6  # after this, what was counted last is on the metrics page


class StartError(Exception):
    """A server did not start. The message has the end of its log."""


@dataclass(frozen=True)
class Running:
    """`log`: what the server has written so far."""

    target: Target
    process: psutil.Process
    log: Path

    def cpu_seconds(self) -> float:
        """CPU time so far of the server and all that it started."""
        total = 0.0
        for one in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
        return total


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


@contextmanager
def running(deployment: Path | Mapping[str, Any], model: str, protocol: str = "grpc") -> Iterator[Running]:
    """`roundhouse serve` of a deployment or of a file with one, on free ports of loopback, until the block ends.

    Raises StartError.
    """
    http, grpc, metrics = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "deployment.yaml", Path(folder) / "server.log"
        if isinstance(deployment, Path):
            path = deployment
        else:
            path.write_text(yaml.safe_dump(dict(deployment)))
        command = [sys.executable, "-m", "roundhouse.cli", "serve", str(path), "--drain-seconds", "5"]
        command += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _wait_ready(process, f"http://127.0.0.1:{http}/v2/health/ready", path, log)
            port = grpc if protocol == "grpc" else http
            target = Target.parse(f"{protocol}://127.0.0.1:{port}/{model}?metrics={metrics}")
            yield Running(target, psutil.Process(process.pid), log)
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str, deployment: Path, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=2):
            return
        if process.poll() is not None:
            text = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StartError(f"{deployment}: the server ended with code {process.returncode}\n{text}")
        time.sleep(0.1)
    raise StartError(f"{deployment}: the server was not ready within {START_SECONDS:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM; the server and what it started are gone afterwards, in one way or another."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=3)
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()


# Counters of the metrics port, and the names that reports give them.
COUNTERS = {
    "roundhouse_requests_total": "requests",
    "roundhouse_prompt_tokens_total": "prompt_tokens",
    "roundhouse_generated_tokens_total": "generated_tokens",
    "roundhouse_cancelled_total": "cancelled",
    "roundhouse_rejected_total": "rejected",
    "roundhouse_failed_total": "failed",
    "roundhouse_kv_blocks_reused_total": "kv_blocks_reused",
    "roundhouse_draft_tokens_total": "draft_tokens",
    "roundhouse_accepted_draft_tokens_total": "accepted_draft_tokens",
    "roundhouse_engine_restarts_total": "engine_restarts",
}


def scrape(target: Target) -> Counter[str] | None:
    """The page of the metrics port, each metric summed over its labels; None if it cannot be had."""
    if target.metrics is None:
        return None
    try:
        with urllib.request.urlopen(f"http://{target.metrics}/metrics", timeout=10) as response:
            return sums(response.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def sums(page: str) -> Counter[str]:
    """`name` -> sum over labels; `tokens_per_block` of upstream's gauge as well."""
    found: Counter[str] = Counter()
    for line in page.splitlines():
        if not line or line.startswith("#"):
            continue
        name, value = line.rsplit(" ", 1)
        with suppress(ValueError):
            found[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
            if 'kv_cache_block_type="tokens_per"' in name:
                found["tokens_per_block"] += float(value)  # type: ignore[assignment]
    return found


def what_happened(before: Counter[str] | None, after: Counter[str] | None) -> dict[str, float]:
    """Counters over a load, and the shares that follow; nothing if there is no metrics page."""
    if before is None or after is None or "roundhouse_requests_total" not in after:
        return {}
    found: dict[str, float] = {ours: after[name] - before[name] for name, ours in COUNTERS.items()}
    if found["prompt_tokens"]:
        reused = found["kv_blocks_reused"] * after["tokens_per_block"]
        found["kv_reuse_percent"] = round(100 * reused / found["prompt_tokens"], 2)
    if found["draft_tokens"]:
        found["acceptance_percent"] = round(100 * found["accepted_draft_tokens"] / found["draft_tokens"], 2)
    return found
