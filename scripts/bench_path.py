"""Measure what the serving path costs: tokens that reach clients through a real Triton, against those the engine makes.

    .venv/bin/python scripts/bench_path.py capacity     # synthetic engine, 256 streams, 20,000 tokens/s
    .venv/bin/python scripts/bench_path.py latency      # synthetic engine, 8 streams of 30 tokens/s
    .venv/bin/python scripts/bench_path.py embedded     # the embedded engine with and without Triton, side by side

Client, server and engine share this machine. Each part writes JSON and a plot under docs/benchmarks/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from roundhouse.bench.machine import machine
from roundhouse.bench.servers import running
from roundhouse.bench.watch import role

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs/benchmarks"
MODELS = ("tensorrt_llm_bls", "ensemble")
PROMPT = 32  # tokens
BASE = {"model": {"path": str(ROOT / "models/tiny")}}
CAPACITY = {
    **BASE,
    "engine": {"kind": "synthetic", "tokens_per_second": 20000},
    "limits": {"max_batch_size": 256, "max_seq_len": 2048, "queue": 512},
}
LATENCY = {
    **BASE,
    "engine": {"kind": "synthetic", "tokens_per_second_per_sequence": 30},
    "limits": {"max_batch_size": 8, "max_seq_len": 2048, "queue": 8},
}
EMBEDDED = {
    **BASE,
    "engine": {"kind": "transformers"},
    "limits": {"max_batch_size": 64, "max_seq_len": 2048, "queue": 512},
}


# --- the server ---------------------------------------------------------------------------------------


def wait_ready(url: str, server: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"the server was not ready within {seconds:.0f} s")


def memory_mb(process: psutil.Process) -> float:
    """Resident memory of the server and all that it started, shared pages counted once (PSS)."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


# --- the client, a process of its own -----------------------------------------------------------------


@dataclass
class Answer:
    """One finished request: when it was sent, when each response came, how many tokens each carried."""

    stream: int
    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    first_token_ns: int = 0
    last_token_ns: int = 0


def load(
    grpc: str, model: str, streams: int, seconds: float, max_tokens: int, texts: list[str]
) -> tuple[list[Answer], float]:
    """Keep `streams` requests going for `seconds`; those that are open at the end count with what came by then.

    Returns the client's CPU seconds too.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (grpc, model, streams, seconds, max_tokens, texts))


def _load(*args: Any) -> tuple[list[Answer], float]:
    import tritonclient.grpc  # noqa: F401  what it takes to import is not counted

    begun = time.process_time()
    return asyncio.run(_run_streams(*args)), time.process_time() - begun


async def _run_streams(
    grpc: str, model: str, streams: int, seconds: float, max_tokens: int, texts: list[str]
) -> list[Answer]:
    import grpc as grpc_library
    from tritonclient.grpc import service_pb2_grpc

    answers: list[Answer] = []
    ends = time.monotonic() + seconds

    async def one(index: int, stub: Any) -> None:
        count = 0
        while time.monotonic() < ends:
            request = _request(model, texts[(index + count * streams) % len(texts)], max_tokens)
            count += 1
            answer = Answer(index, time.monotonic())
            answers.append(answer)
            call = stub.ModelStreamInfer(iter([request]))
            async for message in call:
                if message.error_message:
                    raise SystemExit(f"error response: {message.error_message}")
                _note(answer, message.infer_response)
                if time.monotonic() > ends:
                    call.cancel()
                    return

    channels = [grpc_library.aio.insecure_channel(grpc, options=[("n", i)]) for i in range(8)]
    stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
    tasks = [asyncio.create_task(one(index, stubs[index % len(stubs)])) for index in range(streams)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    return answers


def _request(model: str, text: str, max_tokens: int) -> Any:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, datatype, value in (
        ("text_input", "BYTES", text.encode()),
        ("max_tokens", "INT32", max_tokens),
        ("stream", "BOOL", True),
        ("end_id", "INT32", 1048576),
        ("return_num_output_tokens", "BOOL", True),
        ("return_perf_metrics", "BOOL", True),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        if isinstance(value, bytes):
            request.raw_input_contents.append(len(value).to_bytes(4, "little") + value)
        else:
            request.raw_input_contents.append(value.to_bytes(1 if datatype == "BOOL" else 4, "little"))
    return request


def _note(answer: Answer, response: Any) -> None:
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "num_output_tokens":
            answer.times.append(time.monotonic())
            answer.tokens.append(int.from_bytes(raw, "little"))
        elif output.name == "first_token_time_ns":
            answer.first_token_ns = int.from_bytes(raw, "little")
        elif output.name == "last_token_time_ns":
            answer.last_token_ns = int.from_bytes(raw, "little")


def prompt_texts(count: int, seed: int) -> list[str]:
    """Prompts of exactly PROMPT tokens of models/tiny."""
    from roundhouse.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(ROOT / "models/tiny")
    chance = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        text = "copy: " + " ".join(str(chance.randrange(10)) for _ in range(40))
        ids = tokenizer.encode(text, True)[:PROMPT]
        text = tokenizer.decode(ids)
        if len(tokenizer.encode(text, True)) == PROMPT:
            texts.append(text)
    return texts


# --- the parts ----------------------------------------------------------------------------------------


def window(answers: list[Answer], start: float, end: float) -> dict[int, int]:
    """Tokens that each stream got between `start` and `end`."""
    got: dict[int, int] = {}
    for answer in answers:
        got.setdefault(answer.stream, 0)
        got[answer.stream] += sum(n for n, at in zip(answer.tokens, answer.times, strict=True) if start <= at < end)
    return got


def rates(answers: list[Answer], warm_up: float, seconds: float) -> dict[str, float]:
    """Rates over the part of the load that lies between ramp-up and the end."""
    start = min(answer.sent for answer in answers) + warm_up
    end = start + seconds
    got = window(answers, start, end)
    responses = sum(1 for answer in answers for at in answer.times if start <= at < end)
    total = sum(got.values())
    ordered = sorted(got.values())
    first = sorted(answer.times[0] - answer.sent for answer in answers if answer.times and answer.sent >= start)
    result = {
        "tokens_per_second": round(total / seconds, 1),
        "responses_per_second": round(responses / seconds, 1),
        "tokens_per_response": round(total / max(responses, 1), 2),
        "slowest_stream_of_median": round(ordered[0] / statistics.median(ordered), 3),
    }
    if first:  # long answers: none may have begun in this time
        result["ttft_p50_ms"] = round(1e3 * statistics.median(first), 2)
    return result


def capacity(args: argparse.Namespace) -> dict[str, Any]:
    texts = prompt_texts(512, seed=1)
    result: dict[str, Any] = {"offered_tokens_per_second": 20000, "streams": 256, "max_tokens": 1500}
    for model in MODELS:
        runs = []
        with running(CAPACITY, model) as server:
            grpc, process = server.target.address, server.process
            for _ in range(args.repeats):
                before = memory_mb(process)
                answers, _ = load(grpc, model, 256, args.seconds + 6, 1500, texts)
                run = rates(answers, 4, args.seconds)
                run["delivered_percent"] = round(run["tokens_per_second"] / 200, 2)
                run |= {"memory_before_mb": round(before, 1), "memory_after_mb": round(memory_mb(process), 1)}
                print(f"{model}: {run}", flush=True)
                runs.append(run)
                time.sleep(3)
        result[model] = {"median": median_of(runs), "runs": runs}
    return result


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """Added latency: from the engine's making of a token to its arrival at the client.

    The engine tells when it made the first and the last token of an answer, and makes those between at a fixed rate.
    """
    texts = prompt_texts(64, seed=2)
    result: dict[str, Any] = {"streams": 8, "tokens_per_second_per_stream": 30, "max_tokens": 120}
    for model in MODELS:
        with running(LATENCY, model) as server:
            grpc = server.target.address
            load(grpc, model, 8, 3, 30, texts)
            answers, _ = load(grpc, model, 8, args.seconds, 120, texts)
        answers = [answer for answer in answers if answer.last_token_ns]
        added = sorted(1e3 * value for answer in answers for value in added_latencies(answer))
        result[model] = {
            "tokens_per_response": round(sum(sum(a.tokens) for a in answers) / sum(len(a.tokens) for a in answers), 4),
            "added_ms": {f"p{p}": round(float(np.percentile(added, p)), 3) for p in (50, 90, 95, 99)},
            "responses": len(added),
        }
        print(f"{model}: {result[model]}", flush=True)
    return result


def added_latencies(answer: Answer) -> Iterator[float]:
    """Seconds from the making of each response's last token to its arrival."""
    made = np.cumsum(answer.tokens) - 1
    step = (answer.last_token_ns - answer.first_token_ns) / max(made[-1], 1)
    for index, at in zip(made, answer.times, strict=True):
        yield at - (answer.first_token_ns + index * step) / 1e9


def embedded(args: argparse.Namespace) -> dict[str, Any]:
    """The same prompts, closed loop: the engine alone in a process, then behind Triton; in turn, several times."""
    texts = prompt_texts(512, seed=3)
    runs: dict[str, list[dict[str, float]]] = {"engine alone": [], **{model: [] for model in MODELS}}
    single: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    deployment = {**EMBEDDED, "fronts": {"responses_per_second": args.responses_per_second}}
    for _ in range(args.repeats):
        for target, streams in ((runs, 64), (single, 1)):
            target["engine alone"].append(alone(texts, streams, args.seconds, args.max_tokens))
        for model in MODELS:
            with running(deployment, model) as server:
                grpc = server.target.address
                load(grpc, model, 8, 2, 64, texts)
                for target, streams in ((runs, 64), (single, 1)):
                    seconds = args.seconds + 3
                    before = cpu_seconds(server.process)
                    answers, client = load(grpc, model, streams, seconds, args.max_tokens, texts)
                    used = cpu_seconds(server.process) - before
                    engine = used.pop("engine")
                    cores = {"engine_cores": engine / seconds, "path_cores": (used.total() + client) / seconds}
                    target[model].append({**rates(answers, 2, args.seconds), **cores})
        print({name: [run["tokens_per_second"] for run in all_] for name, all_ in runs.items()}, flush=True)
    result: dict[str, Any] = {"max_tokens": args.max_tokens, "responses_per_second": args.responses_per_second}
    for label, target in (("64 streams", runs), ("1 stream", single)):
        result[label] = {name: {"median": median_of(all_), "runs": all_} for name, all_ in target.items()}
    own = result["64 streams"]["engine alone"]["median"]
    for model in MODELS:
        median = result["64 streams"][model]["median"]
        median["percent_of_engine"] = round(100 * median["tokens_per_second"] / own["tokens_per_second"], 1)
        # the most that could be, if the engine lost nothing but the cores that the path takes
        median["percent_of_cores"] = round(100 * (1 - median["path_cores"] / own["engine_cores"]), 1)
    return result


def cpu_seconds(server: psutil.Process) -> Counter[str]:
    """CPU time so far of each process of a server, by its role."""
    used: Counter[str] = Counter()
    for process in [server, *server.children(recursive=True)]:
        with suppress(psutil.Error):
            times = process.cpu_times()
            used[role(process)] += times.user + times.system  # type: ignore[assignment]
    return used


def alone(texts: list[str], streams: int, seconds: float, max_tokens: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_alone, (texts, streams, seconds, max_tokens))


def _alone(texts: list[str], streams: int, seconds: float, max_tokens: int) -> dict[str, float]:
    from roundhouse.deployment import parse
    from roundhouse.engine.load import load_engine
    from roundhouse.engine.protocol import Request, Sampling
    from roundhouse.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(ROOT / "models/tiny")
    prompts = [tuple(tokenizer.encode(text, True)) for text in texts]
    engine = load_engine(parse(EMBEDDED, source="benchmark", base=ROOT))
    answers: dict[int, Answer] = {}

    def submit(index: int, stream: int) -> None:
        answers[index] = Answer(stream, time.monotonic())
        engine.submit(
            Request(
                id=index,
                prompt=prompts[index % len(prompts)],
                max_tokens=max_tokens,
                sampling=Sampling(temperature=0.0),
            )
        )

    warm_up = 2.0
    length = warm_up + seconds + 1
    begun, ends = time.process_time(), time.monotonic() + length
    for stream in range(streams):
        submit(stream, stream)
    number = streams
    while time.monotonic() < ends:
        for output in engine.step():
            answer = answers[output.id]
            if output.tokens:
                answer.times.append(time.monotonic())
                answer.tokens.append(len(output.tokens))
            if output.last:
                submit(number, answer.stream)
                number += 1
    cores = (time.process_time() - begun) / length
    return {**rates(list(answers.values()), warm_up, seconds), "engine_cores": cores}


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    shared = [key for key in runs[0] if all(key in run for run in runs)]
    return {key: statistics.median(run[key] for run in runs) for key in shared}


# --- results ------------------------------------------------------------------------------------------


def plot(part: str, result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    if part == "latency":
        for model in MODELS:
            added = result[model]["added_ms"]
            axes.plot(list(added), list(added.values()), marker="o", label=model)
        axes.set_ylabel("added latency, ms")
        axes.set_ylim(bottom=0)
        axes.legend()
    else:
        source = result if part == "capacity" else result["64 streams"]
        names = [*MODELS] if part == "capacity" else ["engine alone", *MODELS]
        values = [source[name]["median"]["tokens_per_second"] for name in names]
        if part == "capacity":
            names, values = ["engine", *names], [result["offered_tokens_per_second"], *values]
        bars = axes.barh(names[::-1], values[::-1])
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_xlabel("tokens/s that reach the clients")
        axes.margins(x=0.15)
    axes.set_title(f"Serving path: {part}")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("capacity", "latency", "embedded"))
    parser.add_argument("--seconds", type=float, default=15, help="measured time of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=256, help="length of the embedded engine's answers")
    parser.add_argument("--responses-per-second", type=int, default=250, help="pace of the embedded engine's front")
    args = parser.parse_args()
    result = {"part": args.part, "machine": machine(), "command": sys.argv, "settings": vars(args)}
    result |= {"capacity": capacity, "latency": latency, "embedded": embedded}[args.part](args)
    BENCHMARKS.mkdir(parents=True, exist_ok=True)
    (BENCHMARKS / f"path-{args.part}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(args.part, result, BENCHMARKS / f"path-{args.part}.png")
    print(f"written to {BENCHMARKS / f'path-{args.part}.json'} and .png")


if __name__ == "__main__":
    main()
