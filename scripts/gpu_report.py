"""Draw the plots of scripts/bench_gpu.py and write its page, docs/benchmarks/gpu.md, from its JSON files.

Servers that were measured side by side have files and tables of their own.

    .venv/bin/python scripts/gpu_report.py
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "docs/benchmarks"
PRECISIONS = {"bf16": "bfloat16 weights and KV cache", "fp8": "FP8 weights and FP8 KV cache"}
TARGETS = {
    "raw": "raw engine, no server",
    "raw-attended": "raw engine, no server, requests made ready while the GPU computes",
    "tensorrt_llm_bls": "Triton, `tensorrt_llm_bls`",
    "ensemble": "Triton, `ensemble`",
    "openai": "our OpenAI-compatible door",
    "vllm-1": "`vllm serve`, 1 API server",
    "vllm-4": "`vllm serve`, 4 API servers",
    "vllm-rust": "`vllm serve`, Rust front end",
}
INTRODUCTION = """# Streaming at the speed of the engine, on an H200

<!-- written by scripts/gpu_report.py from gpu-*.json -->

One NVIDIA H200 and 16 cores for each run, also where the host has more of them. Llama-3-8B shape with random weights, a
tokenizer of 128,256 entries, prompts of 512 tokens and answers of 256, sampled at temperature 1, streaming. Closed
loop: all streams start at once, and each sends its next request when it has its answer. Eight client processes on the
same machine. The engine is vLLM's in every row, with the same settings: in a loop of its own (raw), behind Triton and
our fronts, behind our OpenAI-compatible door, behind its own servers.

tokens/s: all tokens, from the first request to the last chunk. TTFT: from sending to the first chunk. TPOT: (last -
first chunk) / 255. ITL: between neighbouring chunks, which may carry several tokens.

Side by side: all servers of a table are up at once on one GPU, each with a share of its memory that its load fits into,
and a run of one is followed by one of the next. That is the comparison with `vllm serve`. Servers had ten cores and
clients others, as the settings say; a front sent 1,000 responses a second, else 4,000. A run of one stream is twelve
answers there, four in all other tables. The row of 512 streams beside the Rust front end and the table beside four API
servers, both bfloat16, are of two earlier hosts, with twelve cores for the clients, and of before our fronts tokenised
with fastokens; on the second, both engines also wrote down how long their steps took at 512 streams.

Prompts are made of words that are one token to every server, and the benchmark asks each for its count. In the table of
eight fronts the Rust front end had prompts of 506 tokens on average instead of 512: it takes a word whole that has an
entry of its own, where the merges of this made-up tokenizer end in two. That is 1.2 % less prefill, and 16 prompts fit
into a step of 8,192 tokens beside the running streams' own. Its servers had no cores of their own, and the host's other
half served bfloat16 at the time.

In the other tables a row is two runs of its load counted together, but for `vllm serve` with 1 API server and, with
FP8, its Rust front end: one run each, of another day. With bfloat16 the Rust front end had the other GPU of the host.
With FP8 at 64 streams the raw engine and the Rust front end have three runs on one host, and what goes through Triton
four on another, all of a later day. The same target gave up to 3 % more or less on another day; within a day, 1 %, with
one exception: one of the two runs of `ensemble` at 256 streams with FP8 was 9 % slower than the other. In these runs
each client process began as soon as it had imported what it needs, which takes longest with Triton's client: so rates
through Triton are low by what its eight processes were apart, and the clients' cores hold their imports. Side by side
they start together. Here too the Rust front end had the shorter prompts.

From end to end an answer takes TTFT + 255 TPOT. Where `tensorrt_llm_bls` has a higher TPOT p50 than four API servers on
the same GPU, its first tokens come earlier, and its answers end within 1 % of the same time. At 64 streams with FP8
first tokens come later, too, and yet answers end sooner in the median: first tokens come in groups, a prefill apart, so
that medians do not add up.

TTFT with 256 streams comes in whole prefill steps (0.2 s in bfloat16, 0.12 s in FP8). Streams end in groups, a decode
step apart. The groups that end before the first of their next requests has come in wait for each other's prefills: two
in the loop without a server, one more for each decode step (15 and 11 ms) that the way out and back in takes.
"""


def read(name: str, folder: Path = BENCHMARKS) -> dict[str, Any]:
    """The figures of one table; see TABLES."""
    return json.loads((folder / f"gpu-{name}.json").read_text(encoding="utf-8"))


def title(name: str) -> str:
    base, _, pace = name.partition("@")
    return TARGETS[base] + (f", {pace} responses a second and front" if pace else "")


def ordered(targets: dict[str, Any]) -> dict[str, Any]:
    """The targets as the tables have them."""
    order = list(TARGETS)
    return {
        name: targets[name] for name in sorted(targets, key=lambda name: (order.index(name.partition("@")[0]), name))
    }


def quantiles(point: dict[str, Any], name: str, digits: int = 0) -> str:
    return " / ".join(f"{point[name][p]:,.{digits}f}" for p in ("p50", "p95", "p99"))


def head(first: str, streams: list[str]) -> list[str]:
    cells = [first, *(f"{count} stream{'s' * (count != '1')}" for count in streams)]
    return [f"| {' | '.join(cells)} |", "|---|" + "---|" * len(streams)]


def summary(folder: Path = BENCHMARKS) -> list[str]:
    """The rows of the README: tokens/s with FP8, by streams."""
    targets = read("fp8", folder)["targets"]
    streams = sorted(targets["raw"], key=int)
    rows = head("tokens/s, FP8", streams)
    for name, title in TARGETS.items():
        if name in targets:
            cells = [f"{targets[name][count]['tokens_per_second']:,.0f}" for count in streams]
            rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows


def comparison(folder: Path = BENCHMARKS) -> list[str]:
    """The rows of the README: tokens/s with FP8, of those of the best `vllm serve` on the same GPU."""
    targets = read("fp8-side-by-side", folder)["targets"]
    streams = sorted(targets["vllm-rust"], key=int)
    rows = head("of the best `vllm serve`, FP8", streams)
    for name in ordered(targets):
        shares = [targets[name][count]["tokens_per_second"] / best_vllm(targets, count) for count in streams]
        rows.append(f"| {TARGETS[name]} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    return rows


def section(result: dict[str, Any]) -> str:
    """The table of one precision."""
    targets = ordered(result["targets"])
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
                title(name),
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
    return "\n".join(lines + origin(result)) + "\n"


def side_by_side(result: dict[str, Any], heading: str) -> str:
    """The table of the servers that shared one GPU: each against the best `vllm serve` of its row's streams."""
    targets = ordered(result["targets"])
    lines = [
        f"## {PRECISIONS[result['precision']]}, {heading}",
        "",
        "| streams | | tokens/s | its runs | of the best `vllm serve` | TTFT p50 / p95 / p99, ms | TPOT, ms "
        "| end to end, ms | cores: server, client |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in sorted({key for points in targets.values() for key in points}, key=int):
        for name, points in targets.items():
            if (point := points.get(count)) is None:
                continue
            cells = [
                count,
                title(name),
                f"{point['tokens_per_second']:,.0f}",
                ", ".join(f"{run:,.0f}" for run in point["runs"]),
                f"{100 * point['tokens_per_second'] / best_vllm(targets, count):.1f} %",
                quantiles(point, "ttft_ms"),
                quantiles(point, "tpot_ms", 2),
                quantiles(point, "end_to_end_ms"),
                f"{point['server_cores']}, {point['client_cores']}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + first_token(targets) + origin(result)) + "\n"


def first_token(targets: dict[str, Any]) -> list[str]:
    """Where a first token's time goes at one stream; nothing where that was not measured."""
    rows = []
    for name, points in targets.items():
        point = points.get("1", {})
        if "first_token_ms" in point:
            parts = [f"{part:.1f}" for part in point["first_token_ms"].values()]
            rows.append(f"| {title(name)} | {' | '.join(parts)} | {point['ttft_ms']['p50']:.1f} |")
    if not rows:
        return []
    return [
        "",
        "Where a first token's time goes at one stream, ms, in the median of answers with `return_perf_metrics`; TTFT",
        "is of those without. `tensorrt_llm_bls` tokenises between front and engine, the ensemble before the front.",
        "",
        "| | to the front | to the engine | in the engine | to the client | TTFT p50 |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def best_vllm(targets: dict[str, Any], streams: str) -> float:
    """tokens/s of the fastest `vllm serve`."""
    servers = [points for name, points in targets.items() if name.startswith("vllm-")]
    return max(points[streams]["tokens_per_second"] for points in servers if streams in points)


def origin(result: dict[str, Any]) -> list[str]:
    """Hardware, versions, settings and commands, as lines of the page."""
    hardware, settings = result["hardware"], result["settings"]
    shown = [f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict)]
    fractions = {point["memory_fraction"] for points in result["targets"].values() for point in points.values()}
    shown.append(f"memory_fraction {' or '.join(map(str, sorted(fractions)))}")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        "",
        f"{hardware['gpu'].splitlines()[0]}; {hardware['cpu']}; Python {hardware['python']}; {versions}; Triton 2.51.",
        f"Settings: {', '.join(shown)}; fronts: {settings['fronts']}. Commands:",
        "",
        "```",
        *(command.replace("scripts/", ".venv/bin/python scripts/") for command in result["commands"]),
        "```",
    ]


def page(folder: Path = BENCHMARKS) -> str:
    return "\n".join([INTRODUCTION, *(table(read(name, folder)) for name, table in TABLES.items())])


TABLES = {  # how a file is called, without gpu- -> its table
    "fp8-side-by-side": partial(side_by_side, heading="side by side"),
    "bf16-rust/gpu-bf16-side-by-side": partial(side_by_side, heading="side by side with the Rust front end"),
    "bf16-four/gpu-bf16-side-by-side": partial(side_by_side, heading="side by side with four API servers"),
    "eight-fronts/gpu-fp8-side-by-side": partial(side_by_side, heading="side by side, earlier, eight fronts"),
    "bf16": section,
    "fp8": section,
}


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
