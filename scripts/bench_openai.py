"""Measure the OpenAI-compatible front door: tokens that reach its clients, against those that the engine makes.

    .venv/bin/python scripts/bench_openai.py             # synthetic engine, 256 streams, 20,000 tokens/s, and 8 streams
    .venv/bin/python scripts/bench_openai.py --workers 1

Client, front door, server and engine share this machine. Writes JSON and a plot under docs/benchmarks/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import yaml
from bench_path import BENCHMARKS, ROOT, machine, median_of, wait_ready

from roundhouse.bench.servers import free_ports

OFFERED = 20_000  # tokens a second
PROMPT = "0123456789" * 3  # each character is a token, and the synthetic engine says the prompt again and again
ANSWER = 1500  # tokens
LOADS: dict[str, dict[str, Any]] = {
    "256 streams": {"engine": {"kind": "synthetic", "tokens_per_second": OFFERED}, "streams": 256},
    "8 streams": {"engine": {"kind": "synthetic", "tokens_per_second_per_sequence": 30}, "streams": 8},
}


# --- the server ---------------------------------------------------------------------------------------


@contextmanager
def serving(engine: dict[str, Any], streams: int, workers: int) -> Iterator[tuple[int, psutil.Process]]:
    """`roundhouse serve` on free ports; gives the front door's port and the process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deployment.yaml"
        limits = {"max_batch_size": streams, "max_seq_len": 2048, "queue": 512}
        openai = {"workers": workers, "access_log": False}
        model = {"path": str(ROOT / "models/tiny")}
        path.write_text(yaml.safe_dump({"model": model, "engine": engine, "limits": limits, "openai": openai}))
        command = [sys.executable, "-m", "roundhouse.cli", "serve", str(path)]
        for door in ("http", "grpc", "metrics"):
            command += [f"--{door}-port", str(free_ports(1)[0])]
        (port,) = free_ports(1)
        server = subprocess.Popen([*command, "--openai-port", str(port)], stdout=subprocess.DEVNULL)
        try:
            wait_ready(f"http://127.0.0.1:{port}/ready", server)
            yield port, psutil.Process(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


PARTS = {"roundhouse.engine.host": "engine", "roundhouse.openai.worker": "workers", "tritonserver": "triton"}


def cpu_seconds(process: psutil.Process) -> dict[str, float]:
    """CPU time so far of each part of the server."""
    spent = dict.fromkeys([*PARTS.values(), "others"], 0.0)
    for one in [process, *process.children(recursive=True)]:
        try:
            command, times = " ".join(one.cmdline()), one.cpu_times()
        except psutil.Error:
            continue
        part = next((name for text, name in PARTS.items() if text in command), "others")
        spent[part] += times.user + times.system
    return spent


# --- the client, a process of its own -----------------------------------------------------------------


class Choice(msgspec.Struct):
    text: str


class Chunk(msgspec.Struct):
    choices: list[Choice]


@dataclass
class Answer:
    """One request: when it was sent, when each chunk came, how many tokens each carried."""

    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One stream at a time over one connection. An event is never split over chunks of HTTP, so lines are enough."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(Chunk).decode
        self._rest = b""
        self._answer = Answer(0.0)
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    async def ask(self, head: bytes, body: bytes) -> Answer:
        self._done = asyncio.get_running_loop().create_future()
        self._answer = Answer(time.monotonic())
        self.transport.write(head + body)
        await self._done
        return self._answer

    @property
    def answer(self) -> Answer:
        return self._answer

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data: {"):
                choices = self._decode(line[6:]).choices
                self._answer.times.append(now)
                self._answer.tokens.append(len(choices[0].text))
            elif line.startswith(b"data: [DONE]") and self._done is not None:
                self._done.set_result(None)
                self._done = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("the server closed the connection"))


def load(port: int, streams: int, seconds: float) -> tuple[list[Answer], float]:
    """Answers of `streams` closed loops, and the client's CPU seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (port, streams, seconds))


def _load(port: int, streams: int, seconds: float) -> tuple[list[Answer], float]:
    import uvloop

    before = time.process_time()
    return uvloop.run(_run_streams(port, streams, seconds)), time.process_time() - before


async def _run_streams(port: int, streams: int, seconds: float) -> list[Answer]:
    body = json.dumps(
        {"model": "tiny", "prompt": PROMPT, "max_tokens": ANSWER, "temperature": 0, "stream": True, "ignore_eos": True}
        | {"add_special_tokens": False}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    answers: list[Answer] = []
    connections: list[Connection] = []

    async def stream() -> None:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        connections.append(connection)
        while True:
            answers.append(await connection.ask(head, body))

    tasks = [asyncio.create_task(stream()) for _ in range(streams)]
    done, pending = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    open_ones = [connection.answer for connection in connections]
    for connection in connections:
        connection.transport.abort()
    return answers + [answer for answer in open_ones if answer not in answers[-streams:]]


# --- figures ------------------------------------------------------------------------------------------


def figures(answers: list[Answer], start: float, end: float) -> dict[str, float]:
    inside = [
        (at, tokens)
        for answer in answers
        for at, tokens in zip(answer.times, answer.tokens, strict=True)
        if start <= at < end
    ]
    tokens = sum(count for _, count in inside)
    gaps = [gap for answer in answers for gap in np.diff([at for at in answer.times if start <= at < end])]
    first = [answer.times[0] - answer.sent for answer in answers if answer.times]
    return {
        "tokens_per_second": round(tokens / (end - start), 1),
        "chunks_per_second": round(len(inside) / (end - start), 1),
        "tokens_per_chunk": round(tokens / max(len(inside), 1), 2),
        "ttft_p50_ms": round(1e3 * float(np.percentile(first, 50)), 2),
        "ttft_p99_ms": round(1e3 * float(np.percentile(first, 99)), 2),
        "between_chunks_p50_ms": round(1e3 * float(np.percentile(gaps, 50)), 2),
        "between_chunks_p99_ms": round(1e3 * float(np.percentile(gaps, 99)), 2),
    }


def measure(name: str, workers: int, seconds: float, repeats: int) -> dict[str, Any]:
    engine, streams = LOADS[name]["engine"], LOADS[name]["streams"]
    offered = OFFERED if "tokens_per_second" in engine else streams * engine["tokens_per_second_per_sequence"]
    runs = []
    with serving(engine, streams, workers) as (port, process):
        load(port, streams, 2)  # the first requests fill caches
        for _ in range(repeats):
            warm_up, begun, before = 3.0, time.monotonic(), cpu_seconds(process)
            answers, client = load(port, streams, warm_up + seconds + 2)
            wall, after = time.monotonic() - begun, cpu_seconds(process)
            start = min(answer.sent for answer in answers) + warm_up
            run = figures(answers, start, start + seconds)
            run["delivered_percent"] = round(100 * run["tokens_per_second"] / offered, 1)
            run |= {f"cores_{part}": round((after[part] - before[part]) / wall, 2) for part in after}
            run["cores_client"] = round(client / wall, 2)
            print(f"{name}: {run}", flush=True)
            runs.append(run)
    return {"offered_tokens_per_second": offered, "workers": workers, "median": median_of(runs), "runs": runs}


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    point = result["256 streams"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    values = [point["offered_tokens_per_second"], point["median"]["tokens_per_second"]]
    bars = left.barh(["engine", "clients of the front door"][::-1], values[::-1])
    left.bar_label(bars, fmt="%.0f", padding=3)
    left.margins(x=0.2)
    left.set_xlabel("tokens/s, 256 streams")
    cores = {part.removeprefix("cores_"): value for part, value in point["median"].items() if part.startswith("cores_")}
    right.bar_label(right.barh(list(cores)[::-1], list(cores.values())[::-1]), fmt="%.2f", padding=3)
    right.margins(x=0.2)
    right.set_xlabel("cores used, 256 streams")
    figure.suptitle("OpenAI-compatible front door")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15, help="measured time of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=list(LOADS), help="one load, printed and not written")
    args = parser.parse_args()
    loads = [args.only] if args.only else list(LOADS)
    result: dict[str, Any] = {"machine": machine()}
    for name in loads:
        result[name] = measure(name, args.workers, args.seconds, args.repeats)
    if not args.only:
        (BENCHMARKS / "openai.json").write_text(json.dumps(result, indent=2) + "\n")
        plot(result, BENCHMARKS / "openai.png")


if __name__ == "__main__":
    main()
