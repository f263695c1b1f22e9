"""What a running server holds: memory, file descriptors, threads, shared memory, KV blocks; sampled over time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = Path("/dev/shm")
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "tensorrt_llm_bls", "ensemble")


@dataclass(frozen=True)
class Sample:
    """At one moment. `memory_mb`: PSS of each process by its role. `shm_mb`: of the Python backend's regions."""

    at: float
    memory_mb: dict[str, float]
    fds: int
    threads: int
    shm_mb: float
    blocks_used: float

    @property
    def total_mb(self) -> float:
        return sum(self.memory_mb.values())


def role(process: psutil.Process) -> str:
    """What a process of a server is: tritonserver, the engine, a model, or `roundhouse serve` itself."""
    command = process.cmdline()
    text = " ".join(command)
    if "roundhouse.engine.host" in text:
        return "engine"
    if command and command[0].endswith("bin/tritonserver"):
        return "tritonserver"
    if command and "triton_python_backend_stub" in command[0]:
        return Path(command[1]).parents[1].name
    return "serve"


def sample(server: psutil.Process, blocks_used: float) -> Sample:
    """Processes that end meanwhile are left out."""
    memory: dict[str, float] = {}
    fds = threads = 0
    regions: set[Path] = set()
    for process in [server, *server.children(recursive=True)]:
        try:
            name, pss = role(process), process.memory_full_info().pss / 1e6
            memory[name] = round(memory.get(name, 0.0) + pss, 2)
            fds += process.num_fds()
            threads += process.num_threads()
            command = process.cmdline()
        except psutil.Error:
            continue
        if name in MODELS and len(command) > 2:
            regions.add(SHARED_MEMORY / command[2])
    shm = sum(region.stat().st_size for region in regions if region.exists()) / 1e6
    return Sample(time.monotonic(), memory, fds, threads, round(shm, 2), blocks_used)


@dataclass
class Watch:
    """Samples a server from a thread of its own, until the block ends. `blocks`: how many KV blocks are in use."""

    server: psutil.Process
    every: float
    blocks: Callable[[], float] = field(default=lambda: 0.0)
    samples: list[Sample] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self.every):
            self.samples.append(sample(self.server, self.blocks()))


def as_json(samples: list[Sample]) -> list[dict[str, Any]]:
    """Times in seconds since the first."""
    return [
        {
            "seconds": round(one.at - samples[0].at, 2),
            "memory_mb": one.memory_mb,
            "fds": one.fds,
            "threads": one.threads,
            "shm_mb": one.shm_mb,
            "blocks_used": one.blocks_used,
        }
        for one in samples
    ]
