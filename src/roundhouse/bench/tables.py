"""Tables of a benchmark, for the terminal and the report. `result` is what Benchmark.as_json gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from roundhouse.bench import repeats
from roundhouse.bench.metrics import QUANTILES

LATENCIES = {"TTFT": "ttft_ms", "ITL": "itl_ms", "TPOT": "tpot_ms", "end to end": "e2e_ms"}
# What is compared: title -> (how to read it from a run, whether more is better)
COMPARED: dict[str, tuple[tuple[str, ...], bool]] = {
    "tokens/s out": (("output_tokens_per_second",), True),
    "goodput": (("goodput",), True),
    "TTFT p50": (("ttft_ms", "p50"), False),
    "TTFT p99": (("ttft_ms", "p99"), False),
    "TPOT p50": (("tpot_ms", "p50"), False),
    "ITL p99": (("itl_ms", "p99"), False),
}
TOO_WIDE = 100  # an interval whose ends are so far apart says nothing

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # header, rows


def number(value: float | None, width: float | None = None) -> str:
    """Three digits that say something, and the half width of the interval, if there is one."""
    if value is None:
        return "-"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    digits = min(digits, 3)
    text = f"{value:,.{digits}f}"
    return text if width is None else f"{text} ±{width:,.{digits}f}"


def overview(result: Result) -> Table:
    """One row for each target and load."""
    header = ["target", "load", "tokens/s out", "in", "per user", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p99"]
    header += ["end to end p50", "requests", "failed", "goodput/s", "SLO"]
    rows = []
    for cell in result["results"]:
        median, width = cell["median"], cell["half_width_95"]
        rows.append([
            cell["target"],
            cell["level"],
            number(median["output_tokens_per_second"], width.get("output_tokens_per_second")),
            number(median["input_tokens_per_second"]),
            number(median["tokens_per_second_per_user"].get("p50") if "tokens_per_second_per_user" in median else None),
            *(number(median.get(metric, {}).get(at)) for metric in ("ttft_ms", "tpot_ms") for at in ("p50", "p99")),
            number(median.get("itl_ms", {}).get("p99")),
            number(median.get("e2e_ms", {}).get("p50")),
            f"{sum(run['requests'] for run in cell['runs'])}",
            f"{sum(run['failed'] for run in cell['runs'])}",
            number(median.get("goodput"), width.get("goodput")),
            slo(cell),
        ])  # fmt: skip
    return header, rows


def slo(cell: dict[str, Any]) -> str:
    """`met`, or which objective was missed in how many runs."""
    judged = [run["slo"] for run in cell["runs"] if "slo" in run]
    if not judged:
        return "-"
    missed = {name: sum(not run[name]["met"] for run in judged) for name in judged[0]}
    said = [
        f"{name} missed" + (f" in {times} of {len(judged)}" if len(judged) > 1 else "")
        for name, times in missed.items()
        if times
    ]
    return ", ".join(said) or "met"


def percentiles(cell: dict[str, Any]) -> Table:
    """Latencies of one target at one load, in milliseconds; medians over the runs."""
    names = [*(f"p{percent}" for percent in QUANTILES), "mean", "min", "max"]
    rows = [
        [
            title,
            *(number(cell["median"][key].get(name), cell["half_width_95"].get(key, {}).get(name)) for name in names),
        ]
        for title, key in LATENCIES.items()
        if cell["median"].get(key)
    ]
    return ["ms", *names], rows


def comparison(result: Result) -> Table:
    """Each target against the first one, at each load."""
    first, *others = dict.fromkeys(cell["target"] for cell in result["results"])
    cells = {(cell["target"], cell["level"]): cell for cell in result["results"]}
    levels = list(dict.fromkeys(cell["level"] for cell in result["results"]))
    rows = []
    for name in others:
        for level in levels:
            if (first, level) in cells and (name, level) in cells:
                pair = cells[first, level]["runs"], cells[name, level]["runs"]
                rows.append([f"{name} : {first}", level, *(_times(*pair, path) for path, _ in COMPARED.values())])
    arrows = [f"{title} {'↑' if more else '↓'}" for title, (_, more) in COMPARED.items()]
    return ["ratio", "load", *arrows], rows


def _times(first: list[Any], other: list[Any], path: tuple[str, ...]) -> str:
    found = repeats.ratio(_values(first, path), _values(other, path))
    if found is None:
        return "-"
    middle, low, high = found
    if low <= 0 or high / low > TOO_WIDE:
        return f"{middle:.2f} (too few runs)" if len(first) > 1 else f"{middle:.2f}"
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _values(runs: list[Any], path: tuple[str, ...]) -> list[float]:
    values = []
    for run in runs:
        for key in path:
            run = run.get(key) if run else None
        values.append(float(run or 0.0))
    return values


def notes(result: Result) -> Iterator[str]:
    """What the clients cost, what the servers said of themselves, and what is to be doubted."""
    for cell in result["results"]:
        where = f"{cell['target']}, {cell['level']}"
        client = cell["median"]["client"]
        late = client.get("lag_ms", {}).get("p99", 0.0)
        yield (
            f"{where}: client {client['cores']:.2f} cores in {client['processes']:g} processes, "
            f"{client['microseconds_per_response']:.0f} µs a response, noticed tokens {late:.1f} ms late at p99"
            + (f"; server {cell['median']['server_cores']:.2f} cores" if "server_cores" in cell["median"] else "")
        )
        server = cell["median"].get("server", {})
        said = [
            f"{title} {server[key]:.1f} %"
            for key, title in (("kv_reuse_percent", "prompt tokens from the KV cache"),
                               ("acceptance_percent", "draft tokens accepted"))
            if key in server
        ]  # fmt: skip
        if said:
            yield f"{where}: {', '.join(said)}"
        doubted = [run["client"]["warnings"] for run in cell["runs"] if run["client"]["warnings"]]
        if doubted:
            yield f"warning: {where}, {len(doubted)} of {len(cell['runs'])} runs: {'; '.join(doubted[-1])}"
        for error, count in _errors(cell).items():
            yield f"warning: {where}: {count} requests failed: {error}"


def _errors(cell: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for run in cell["runs"]:
        for error, count in run["errors"].items():
            found[error] = found.get(error, 0) + count
    return found


def capacity(result: Result) -> Iterator[str]:
    """Up to which load each target kept to its SLO in every run; nothing for targets without."""
    for name in dict.fromkeys(cell["target"] for cell in result["results"]):
        cells = [cell for cell in result["results"] if cell["target"] == name and slo(cell) != "-"]
        if not cells:
            continue
        kept = list(takewhile(lambda cell: slo(cell) == "met", sorted(cells, key=lambda cell: float(cell["load"]))))
        yield (
            f"{name}: within its SLO up to {kept[-1]['level']}" if kept else f"{name}: outside of its SLO at each load"
        )
