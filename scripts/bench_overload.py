"""Overload: 5 times what the server can do, as an open loop, between two loads that it can carry.

The synthetic engine sets the capacity, so that the machine is not the limit: 40 answers a second. Written to
docs/benchmarks/overload.json and .png.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from roundhouse.bench import load
from roundhouse.bench.load import Plan, Seen
from roundhouse.bench.machine import machine
from roundhouse.bench.overload import Phase, goodput, judge
from roundhouse.bench.prompts import PromptMaker
from roundhouse.bench.scenario import Poisson, Request, Session
from roundhouse.bench.servers import running
from roundhouse.bench.watch import Watch
from roundhouse.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs/benchmarks"
ANSWER, PROMPT = 20, 32
CAPACITY = 40.0  # answers a second
QUEUE = 32
OVERLOAD = 5
DEPLOYMENT = {
    "model": {"path": str(ROOT / "models/tiny")},
    "engine": {"kind": "synthetic", "tokens_per_second": ANSWER * CAPACITY},
    "limits": {"max_batch_size": 16, "max_seq_len": 1024, "queue": QUEUE},
}
# A slot is free after the answers of all others before it: those in the queue, and the 16 that run.
LONGEST_WAIT = (QUEUE + 16) / CAPACITY * 1.25


def sessions(count: int) -> list[Session]:
    maker = PromptMaker(Tokenizer.load(ROOT / "models/tiny"))
    chance = random.Random(1)
    return [(Request("overload", maker.make(chance, PROMPT), PROMPT, ANSWER),) for _ in range(count)]


def measure(model: str, seconds: float) -> tuple[dict[str, Any], list[Phase], list[tuple[float, float]]]:
    """A steady load of half the capacity; during parts of it as much again as makes 1.2 and 5 times the capacity."""
    made = sessions(500)
    length = 2 * seconds + 30  # more than everything takes, with the starts of the client processes
    with (
        ThreadPoolExecutor(1) as pool,
        running(DEPLOYMENT, model) as server,
        Watch(server.process, 1.0) as watch,
    ):

        def run(factor: float, length: float) -> Seen:
            level = Poisson(kind="poisson", requests_per_second=factor * CAPACITY)
            return load.run(Plan(server.target, level, made, 1, 0.0, length, patience=10.0))

        steady = pool.submit(run, 0.5, length)
        time.sleep(max(seconds / 4, 5.0))
        peak = run(0.7, max(seconds / 2, 6.0))
        over = run(OVERLOAD - 0.5, seconds)
        always = steady.result()
    parts = [
        ("before", always.start, peak.start, []),
        ("peak", peak.start, peak.end, peak.traces),
        ("overload", over.start, over.end, over.traces),
        ("after", over.end, always.end, []),
    ]
    phases = [
        Phase(name, start, end, traces + [t for t in always.traces if start <= t.sent < end])
        for name, start, end, traces in parts
    ]
    memory = [one.total_mb for one in watch.samples if over.start + LONGEST_WAIT <= one.at < over.end]
    figures = judge(*phases, longest_wait=LONGEST_WAIT, memory_mb=memory)
    return figures, phases, [(one.at, one.total_mb) for one in watch.samples]


def plot(results: dict[str, list[Phase]], memory: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, held) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True)
    for model, phases in results.items():
        zero = phases[0].start
        traces = list(chain.from_iterable(phase.traces for phase in phases))
        seconds = range(int(phases[-1].end - zero))
        rates.plot([goodput(traces, zero + s, zero + s + 1, LONGEST_WAIT) for s in seconds], label=f"{model}: good")
        if model == next(iter(results)):
            rates.plot([sum(zero + s <= t.sent < zero + s + 1 for t in traces) for s in seconds], "k:", label="sent")
        held.plot([at - zero for at, _ in memory[model]], [mb for _, mb in memory[model]], label=model)
    rates.set_ylabel("requests/s")
    rates.legend()
    held.set_ylabel("memory (PSS), MB")
    held.set_xlabel("seconds")
    held.set_ylim(bottom=0)
    held.legend()
    rates.set_title(f"Overload: {OVERLOAD} x capacity")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of the overload")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "overload.json")
    parser.add_argument("--models", nargs="+", default=["tensorrt_llm_bls", "ensemble"])
    args = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(),
        "command": sys.argv,
        "deployment": {**DEPLOYMENT, "model": "models/tiny"},
        "capacity_answers_per_second": CAPACITY,
        "overload": OVERLOAD,
        "seconds": args.seconds,
        "models": {},
    }
    phases, memory = {}, {}
    for model in args.models:
        result["models"][model], phases[model], memory[model] = measure(model, args.seconds)
        print(json.dumps(result["models"][model], indent=1), flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    plot(phases, memory, args.output.with_suffix(".png"))
    print(f"written to {args.output} and .png")


if __name__ == "__main__":
    main()
