#!/usr/bin/env python3
"""Draw the plots of scripts/bench_gpu.py and write its page, docs/benchmarks/gpu.md, from its JSON files.

scripts/gpu_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "docs/benchmarks"
PRECISIONS = {"bf16": "bfloat16 weights and KV cache", "fp8": "FP8 weights and FP8 KV cache"}
TARGETS = {
    "raw": "raw engine, no server",
    "tensorrt_llm_bls": "Triton, `tensorrt_llm_bls`",
    "ensemble": "Triton, `ensemble`",
    "openai": "our OpenAI-compatible door",
    "vllm-1": "`vllm serve`, 1 API server",
    "vllm-4": "`vllm serve`, 4 API servers",
    "vllm-rust": "`vllm serve`, Rust front end",
}
INTRODUCTION = """# Streaming at the speed of the engine, on an H200

<!-- written by scripts/gpu_report.py from gpu-bf16.json and gpu-fp8.json -->

One NVIDIA H200 and 16 cores for each run. Llama-3-8B shape with random weights, a tokenizer of 128,256 entries, prompts
of 512 tokens and answers of 256, sampled at temperature 1, streaming. Closed loop: all streams start at once, and each
sends its next request when it has its answer. Eight client processes on the same machine. The engine is vLLM's in every
row, with the same settings: in a loop of its own (raw), behind Triton and our fronts, behind our OpenAI-compatible
door, behind its own servers.

tokens/s: all tokens, from the first request to the last chunk. TTFT: from sending to the first chunk. TPOT: (last -
first chunk) / 255. ITL: between neighbouring chunks, which may carry several tokens.

A row is two runs of its load counted together (`runs` in the JSON files), but for `vllm serve` with 1 API server and,
with FP8, its Rust front end: one run each, of another day. With bfloat16 the Rust front end had the other GPU of the
host. With FP8 at 64 streams the raw engine and the Rust front end have three runs on one host, and what goes through
Triton four on another, all of a later day. The same target gave up to 3 % more or less on another day; within a day,
1 %, with one exception: one of the two runs of `ensemble` at 256 streams with FP8 was 9 % slower than the other.

In all these runs each client process began as soon as it had imported what it needs, which takes longest with Triton's
client: so rates through Triton are low by what its eight processes were apart, and the clients' cores hold their
imports. Since then they start together (`scripts/bench_gpu.py`); the rows have not been measured again.

TTFT with 256 streams comes in whole prefill steps (0.2 s in bfloat16, 0.12 s in FP8). Streams end in groups, a decode
step apart. The groups that end before the first of their next requests has come in wait for each other's prefills: two
in the loop without a server, one more for each decode step (15 and 11 ms) that the way out and back in takes.
"""


def read(precision: str, folder: Path = BENCHMARKS) -> dict[str, Any]:
    return json.loads((folder / f"gpu-{precision}.json").read_text(encoding="utf-8"))


def quantiles(point: dict[str, Any], name: str, digits: int = 0) -> str:
    return " / ".join(f"{point[name][p]:,.{digits}f}" for p in ("p50", "p95", "p99"))


def summary(folder: Path = BENCHMARKS) -> list[str]:
    """The rows of the README: tokens/s with FP8, by streams."""
    targets = read("fp8", folder)["targets"]
    streams = sorted(targets["raw"], key=int)
    rows = ["| tokens/s, FP8 | " + " | ".join(f"{count} stream{'s' * (count != '1')}" for count in streams) + " |"]
    rows.append("|---|" + "---|" * len(streams))
    for name, title in TARGETS.items():
        if name in targets:
            cells = [f"{targets[name][count]['tokens_per_second']:,.0f}" for count in streams]
            rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows


def section(result: dict[str, Any]) -> str:
    """The table of one precision."""
    targets = {name: result["targets"][name] for name in TARGETS if name in result["targets"]}
    streams = sorted({int(key) for points in targets.values() for key in points})
    lines = [
        f"## {PRECISIONS[result['precision']]}",
        "",
        f"![tokens/s and TTFT](gpu-{result['precision']}.png)",
        "",
        "| streams | | tokens/s | of raw | TTFT p50 / p95 / p99, ms | TPOT, ms | ITL, ms | end to end, ms "
        "| chunks an answer | cores: server, client |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for count in streams:
        raw = targets["raw"][str(count)]["tokens_per_second"]
        for name, points in targets.items():
            if (point := points.get(str(count))) is None:
                continue
            cores = f"{point['server_cores']}, {point['client_cores']}" if "server_cores" in point else ""
            cells = [
                str(count),
                TARGETS[name],
                f"{point['tokens_per_second']:,.0f}",
                f"{100 * point['tokens_per_second'] / raw:.1f} %",
                quantiles(point, "ttft_ms"),
                quantiles(point, "tpot_ms", 2),
                quantiles(point, "itl_ms", 1),
                quantiles(point, "end_to_end_ms"),
                f"{point['chunks_per_answer']:.0f}",
                cores,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    hardware, settings = result["hardware"], result["settings"]
    shown = ", ".join(f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        f"{hardware['gpu'].splitlines()[0]}; {hardware['cpu']}; Python {hardware['python']}; {versions}; Triton 2.51.",
        f"Settings: {shown}; fronts: {settings['fronts']}. Commands:",
        "",
        "```",
        *result["commands"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def page(folder: Path = BENCHMARKS) -> str:
    return "\n".join([INTRODUCTION, *(section(read(precision, folder)) for precision in PRECISIONS)])


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rate, first) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, points in result["targets"].items():
        streams = sorted(points, key=int)
        rate.plot(streams, [points[key]["tokens_per_second"] for key in streams], marker="o", label=name)
        first.plot(streams, [points[key]["ttft_ms"]["p50"] for key in streams], marker="o", label=name)
    rate.set(xlabel="streams", ylabel="tokens/s", ylim=(0, None))
    first.set(xlabel="streams", ylabel="TTFT p50, ms", yscale="log")
    rate.legend()
    figure.suptitle(f"Llama-3-8B shape, {PRECISIONS[result['precision']]}, {result['hardware']['gpu'].splitlines()[0]}")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    for precision in PRECISIONS:
        plot(read(precision), BENCHMARKS / f"gpu-{precision}.png")
    (BENCHMARKS / "gpu.md").write_text(page(), encoding="utf-8")
