"""`roundhouse openai`: the front door of a running server, in the foreground. Workers that end are started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console

from roundhouse import deployment as deployments
from roundhouse.engine import runtime
from roundhouse.engine.runtime import ServerRecord
from roundhouse.openai import guard
from roundhouse.openai.worker import Settings, listener

RESTART_SECONDS = 1.0
STOP_SECONDS = 5.0  # beyond the drain, before workers are killed


class DoorError(Exception):
    """The front door cannot be opened. The message says why."""


def find_server(deployment: Path, grpc_url: str | None) -> tuple[int, ServerRecord]:
    """Process id and record of the server of this machine and user that a front door can join. Raises DoorError."""
    servers = runtime.servers()
    if grpc_url is not None:
        servers = {pid: server for pid, server in servers.items() if same_address(server.grpc, grpc_url)}
        if not servers:
            raise DoorError(
                f"--grpc-url {grpc_url}: no `roundhouse serve` of this user and machine listens there. A front door "
                "joins the engine of a server beside it; for another machine, set `openai:` in the deployment there"
            )
    path = str(deployment.resolve())
    found = {pid: server for pid, server in servers.items() if server.deployment == path}
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        urls = ", ".join(server.grpc for server in found.values())
        raise DoorError(f"several servers run {deployment}; choose one with --grpc-url: {urls}")
    if servers and grpc_url is not None:
        raise DoorError(f"--grpc-url {grpc_url}: that server runs {next(iter(servers.values())).deployment}")
    raise DoorError(f"no server runs {deployment}: start `roundhouse serve {deployment}` first, or set its `openai:`")


def same_address(listening: str, wanted: str) -> bool:
    """Whether a client on this machine that is told `wanted` gets to `listening`."""
    host, _, port = wanted.rpartition(":")
    own_host, _, own_port = listening.rpartition(":")
    local = ("127.0.0.1", "localhost", "0.0.0.0", "::1", "::", "")
    return port == own_port and (host == own_host or (host in local and own_host in local))


class Workers:
    """The worker processes, kept running until `stop`."""

    def __init__(self, settings: Settings, count: int, figures: str) -> None:
        """`figures`: the folder that their metrics share."""
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": figures}
        command = [sys.executable, "-m", "roundhouse.openai.worker", msgspec.json.encode(settings).decode()]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

        self._start = start
        self._processes = [self._start() for _ in range(count)]
        self._drain_seconds = settings.drain_seconds

    def tend(self) -> None:
        """Start those again that have ended."""
        for index, process in enumerate(self._processes):
            if process.poll() is not None:
                print(f"openai: a worker ended with code {process.returncode}; it is started again", file=sys.stderr)
                time.sleep(RESTART_SECONDS)
                self._processes[index] = self._start()

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self._processes)

    def stop(self) -> None:
        """Let open answers finish; end."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + self._drain_seconds + STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run(deployment: Path, address: str, port: int, grpc_url: str | None, *, drain_seconds: int) -> int:
    """Serve until SIGTERM or Ctrl-C, or until the server ends. Returns the exit code.

    Raises DoorError or DeploymentError.
    """
    section = deployments.load(deployment).openai_section
    pid, server = find_server(deployment, grpc_url)
    try:
        guard.api_keys(section.api_key_file)
        listener(address, port, shared=False).close()
    except OSError as error:
        where = f"--port {port} on {address}" if error.filename is None else f"openai.api_key_file: {error.filename}"
        raise DoorError(f"{where}: {error.strerror}; choose another one") from error
    except ValueError as error:
        raise DoorError(f"openai.api_key_file: {error}") from error
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    console = Console(stderr=True)
    settings = Settings(str(deployment.resolve()), pid, server.metrics_url, address, port, drain_seconds)
    with tempfile.TemporaryDirectory(prefix="roundhouse-openai-") as figures:
        workers = Workers(settings, section.workers, figures)
        scheme = "https" if section.tls_certificate else "http"
        console.print(f"OpenAI: {scheme}://{address}:{port}/v1, {section.workers} workers", highlight=False)
        while not stop.wait(0.2) and runtime.alive(pid):
            workers.tend()
        workers.stop()
    return 0 if stop.is_set() else 1
