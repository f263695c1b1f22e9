"""Measure what tokenising a prompt takes by `tokenizers` and by fastokens, and what the latter takes to load.

    .venv/bin/python scripts/bench_tokenize.py

Two tokenizers: models/tiny's (1,024 entries) on this repository's prose, and that of scripts/bench_gpu.py (128,256
entries) on its made-up words, where no prompt is met twice, but words are. Writes docs/benchmarks/tokenize.json and
.png.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bench_gpu
import numpy as np
import psutil
from bench_path import machine

from roundhouse.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs/benchmarks"
LENGTHS = (128, 512, 2048, 8192)  # tokens
PROMPTS = 60  # of each length


def prose(folder: Path, tokenizer: Tokenizer) -> Callable[[int], str]:
    """Makes pieces of this repository's documents, each from where it has not begun before."""
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    characters = len(text) / len(tokenizer.encode(text, False))  # of a token
    starts = iter(random.Random(1).sample(range(len(text) // 2), len(LENGTHS) * PROMPTS * 2))

    def piece(tokens: int) -> str:
        start = next(starts)
        return text[start : start + int(tokens * characters)]

    return piece


def made_up(folder: Path, tokenizer: Tokenizer) -> Callable[[int], str]:
    words = [f" {word}" for body in bench_gpu.make_prompts(folder, 200, 1).bodies for word in body.split()]
    chance = random.Random(2)
    return lambda tokens: "".join(chance.choices(words, k=tokens))


def times(tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """Milliseconds of each."""
    spent = []
    for text in texts:
        begun = time.perf_counter()
        tokenizer.encode(text, True)
        spent.append(1e3 * (time.perf_counter() - begun))
    return spent


def measure(folder: Path, maker: Callable[[Path, Tokenizer], Callable[[int], str]]) -> dict[str, Any]:
    """In a process of its own, since memory that another has freed would be taken first."""
    fast = Tokenizer.load(folder)
    memory, begun = psutil.Process().memory_info().rss, time.perf_counter()
    assert fast.hasten()
    result: dict[str, Any] = {
        "entries": fast.vocab_size,
        "load_seconds": round(time.perf_counter() - begun, 2),
        "load_mb": round((psutil.Process().memory_info().rss - memory) / 1e6),
        "lengths": {},
    }
    slow = Tokenizer.load(folder)
    make = maker(folder, slow)
    for tokens in LENGTHS:
        texts = [make(tokens) for _ in range(PROMPTS)]
        point: dict[str, Any] = {"tokens": round(float(np.mean([len(slow.encode(text, True)) for text in texts])))}
        for name, tokenizer in (("tokenizers", slow), ("fastokens", fast)):
            p50, p95 = np.percentile(times(tokenizer, texts), (50, 95))
            point[name] = {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3)}
        result["lengths"][str(tokens)] = point
        print(f"{result['entries']} entries, {tokens} tokens: {point}", flush=True)
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for text, its in result["texts"].items():
        for name in ("tokenizers", "fastokens"):
            points = its["lengths"].values()
            label = f"{name}, {text}"
            axes.plot([p["tokens"] for p in points], [p[name]["p50_ms"] for p in points], marker="o", label=label)
    axes.set(xlabel="tokens of a prompt", ylabel="tokenising it, p50, ms", xscale="log", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    result: dict[str, Any] = {"command": "scripts/bench_tokenize.py", "hardware": machine(), "texts": {}}
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes,
    ):
        bench_gpu.make_model(Path(folder))
        result["texts"]["prose"] = processes.submit(measure, ROOT / "models/tiny", prose).result()
        result["texts"]["made-up words"] = processes.submit(measure, Path(folder), made_up).result()
    (BENCHMARKS / "tokenize.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, BENCHMARKS / "tokenize.png")
    print(f"written to {BENCHMARKS / 'tokenize.json'}")


if __name__ == "__main__":
    main()
