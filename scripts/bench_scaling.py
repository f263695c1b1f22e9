"""Measure how many front instances it takes: tokens that reach clients, by front instances and streams.

    .venv/bin/python scripts/bench_scaling.py          # about 5 minutes; wants 16 cores, needs no GPU
        --fronts 1 --streams 64 --rate 5000            # a part of it

The synthetic engine makes 30,000 tokens a second, more than a Llama 3 8B on an H200, and computes nothing, so what is
lost is lost on the way: engine process, fronts, Triton, gRPC, clients. Prompts have 512 tokens and answers 256, in a
vocabulary of 128,256 entries (scripts/bench_gpu.py makes it). Clients are processes of the same machine. Writes
docs/benchmarks/scaling.json after each server, and a plot.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from bench_gpu import BENCHMARKS, make_model
from bench_path import machine

from roundhouse.bench import metrics, servers
from roundhouse.bench.load import LoadError, Plan, Seen, default_processes, run
from roundhouse.bench.prompts import PromptMaker
from roundhouse.bench.scenario import Closed, Request, Session
from roundhouse.text.tokenizer import Tokenizer

MODELS = ("tensorrt_llm_bls", "ensemble")
PROMPT, ANSWER = 512, 256  # tokens
PROMPTS = 512  # different ones
PATIENCE = 0.2  # seconds after a load; answers that are open then are cancelled


def deployment(model: Path, fronts: int, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "engine": {"kind": "synthetic", "tokens_per_second": args.rate},
        "limits": {"max_batch_size": max(args.streams), "max_seq_len": 2048, "queue": 2048},
        "kv_cache": {"reuse": False},
        "fronts": {
            "preprocessing": max(fronts // 2, 1),
            "tensorrt_llm": fronts,
            "tensorrt_llm_bls": fronts,
            "responses_per_second": args.responses_per_second,
        },
    }


def sessions(model: Path) -> list[Session]:
    """One request a session; all prompts differ."""
    maker, chance = PromptMaker(Tokenizer.load(model)), random.Random(4)
    texts = [maker.make(chance, PROMPT) for _ in range(PROMPTS)]
    return [(Request("request", text, PROMPT, ANSWER),) for text in texts]


def figures(seen: Seen, server_cores: float, rate: float) -> dict[str, Any]:
    """What came while it counted. TTFT is of requests that began to come then."""
    inside = [
        (trace, count)
        for trace in seen.traces
        for at, count in zip(trace.times, trace.tokens, strict=True)
        if seen.start <= at < seen.end
    ]
    seconds = seen.end - seen.start
    first = [t.times[0] - t.sent for t in seen.traces if t.times and seen.start <= t.times[0] < seen.end]
    whole = [value for t in seen.traces if not t.error and not t.warm_up and (value := metrics.tpot(t)) is not None]
    tokens = sum(count for _, count in inside)
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "delivered_percent": round(100 * tokens / seconds / rate, 1),
        "tokens_per_response": round(tokens / max(len(inside), 1), 2),
        "ttft_ms": metrics.quantiles(first, 1e3),
        "tpot_ms": metrics.quantiles(whole, 1e3),
        "server_cores": round(server_cores, 2),
        "client_cores": seen.overhead.cores,
        "client_lag_ms": seen.overhead.lag_ms,
    }


def measure(fronts: int, model: Path, load: list[Session], args: argparse.Namespace) -> dict[str, Any]:
    """Both models of one server, all numbers of streams."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deployment.yaml"
        path.write_text(yaml.safe_dump(deployment(model, fronts, args)))
        with servers.running(path, MODELS[0]) as server:
            for name in MODELS:
                target = servers.Target(server.target.protocol, server.target.address, name)
                for streams in args.streams:
                    level, processes = Closed(kind="closed", streams=streams), min(args.processes, streams)
                    plan = Plan(target, level, load, 1, args.warm_up, args.seconds, PATIENCE, processes)
                    cpu, begun = server.cpu_seconds(), time.monotonic()
                    seen = run(plan)
                    cores = (server.cpu_seconds() - cpu) / (time.monotonic() - begun)
                    point = figures(seen, cores, args.rate)
                    result.setdefault(name, {})[str(streams)] = point
                    shown = {key: value for key, value in point.items() if not isinstance(value, dict)}
                    print(
                        f"{time.strftime('%H:%M:%S')} {fronts} fronts, {name}, {streams} streams: {shown}", flush=True
                    )
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, model in zip(axes, MODELS, strict=True):
        for fronts, models in sorted(result["fronts"].items(), key=lambda item: int(item[0])):
            points = models.get(model, {})
            streams = sorted(points, key=int)
            axis.plot(
                [int(key) for key in streams],
                [points[key]["tokens_per_second"] for key in streams],
                marker="o",
                label=f"{fronts} front{'s' * (fronts != '1')}",
            )
        axis.axhline(result["settings"]["rate"], color="black", linewidth=0.8)
        axis.set(title=model, xlabel="streams", ylabel="tokens/s that reach the clients", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.legend()
    figure.suptitle(
        f"Synthetic engine at {result['settings']['rate']:,.0f} tokens/s, {result['machine']['cores']} cores"
    )
    figure.tight_layout()
    figure.savefig(path)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fronts", type=numbers, default="1,2,4,8", help="'' only draws the plot again")
    parser.add_argument("--streams", type=numbers, default="64,256,512,1024")
    parser.add_argument("--rate", type=float, default=30_000, help="tokens/s of the engine")
    parser.add_argument("--responses-per-second", type=int, default=4000, help="pace of each front")
    parser.add_argument("--processes", type=int, default=default_processes(), help="client processes")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds before measuring")
    parser.add_argument("--seconds", type=float, default=4, help="seconds of measuring")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "roundhouse-llama-3-8b-shape")
    parser.add_argument("--output", type=Path, default=BENCHMARKS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "scaling.json"
    result = json.loads(path.read_text()) if path.exists() else {"fronts": {}}
    if args.fronts:
        if not (args.model / "tokenizer_config.json").exists():
            print(f"making the tokenizer in {args.model}", flush=True)
            make_model(args.model)
        load = sessions(args.model)
        result |= {"machine": machine(), "settings": {key: str(value) for key, value in vars(args).items()}}
        result["settings"] |= {"rate": args.rate, "prompt_tokens": PROMPT, "answer_tokens": ANSWER}
    failed = 0
    for fronts in args.fronts:
        try:
            result["fronts"][str(fronts)] = measure(fronts, args.model, load, args)
        except (servers.StartError, LoadError) as error:  # costs the others nothing
            print(f"{fronts} fronts failed: {error}", flush=True)
            failed += 1
        path.write_text(json.dumps(result, indent=1) + "\n")
    with suppress(ImportError):  # a host without matplotlib keeps the JSON
        plot(result, path.with_suffix(".png"))
    print(f"written to {path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
