"""The plots of a benchmark, as SVG. `result` is what Benchmark.as_json gives."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
         "axes.spines.right": False, "svg.hashsalt": "roundhouse"}  # fmt: skip
SIZE = (6.4, 3.6)

Result = dict[str, Any]
Series = Iterator[tuple[str, str, list[Any]]]  # target, colour, its results by rising load


def series(result: Result) -> Series:
    names = dict.fromkeys(cell["target"] for cell in result["results"])
    for number, name in enumerate(names):
        cells = [cell for cell in result["results"] if cell["target"] == name]
        yield name, f"C{number % 10}", sorted(cells, key=lambda cell: float(cell["load"]))


def unit(result: Result) -> str:
    """What loads are counted in."""
    levels = [cell["level"] for cell in result["results"]]
    if all("stream" in level for level in levels):
        return "streams"
    return "requests/s" if not any("stream" in level for level in levels) else "streams, or requests/s"


def render(draw: Callable[[Axes, Result], None], result: Result) -> str:
    """One plot as the text of an SVG element."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
        draw(axes, result)
        return svg(figure)


def svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def latency(axes: Axes, result: Result) -> None:
    """TTFT and TPOT against load: the median and the 99th percentile."""
    for name, colour, cells in series(result):
        for metric, style in (("ttft_ms", "-"), ("tpot_ms", "--")):
            known = [cell for cell in cells if cell["median"].get(metric)]
            loads = [cell["load"] for cell in known]
            middle = [cell["median"][metric]["p50"] for cell in known]
            far = [cell["median"][metric]["p99"] for cell in known]
            axes.plot(loads, middle, style, color=colour, marker=".", label=f"{name}: {metric[:4].upper()} p50, to p99")
            axes.fill_between(loads, middle, far, color=colour, alpha=0.12)
    if any(cell["median"].get("ttft_ms") for cell in result["results"]):  # not so, if every request failed
        axes.set_yscale("log")
    _load_axis(axes, result)
    axes.set_ylabel("ms")
    axes.legend(fontsize=7)


def throughput(axes: Axes, result: Result) -> None:
    """Output tokens a second against load, with the half width of the confidence interval."""
    for name, colour, cells in series(result):
        key = "output_tokens_per_second"
        values = [cell["median"][key] for cell in cells]
        widths = [cell["half_width_95"].get(key, 0.0) for cell in cells]
        axes.errorbar([cell["load"] for cell in cells], values, widths, color=colour, marker=".", capsize=3, label=name)
    axes.set_ylim(bottom=0)
    _load_axis(axes, result)
    axes.set_ylabel("tokens/s out")
    axes.legend(fontsize=7)


def goodput(axes: Axes, result: Result) -> None:
    """Requests a second (thin) and those within the SLO (thick) against load."""
    for name, colour, cells in series(result):
        loads = [cell["load"] for cell in cells]
        axes.plot(loads, [cell["median"]["requests_per_second"] for cell in cells], ":", color=colour)
        axes.plot(loads, [cell["median"].get("goodput", 0.0) for cell in cells], color=colour, marker=".", label=name)
    axes.set_ylim(bottom=0)
    _load_axis(axes, result)
    axes.set_ylabel("requests/s; dotted: good or not")
    axes.legend(fontsize=7)


def knee(axes: Axes, result: Result) -> None:
    """What one user gets against what all get."""
    for name, colour, cells in series(result):
        known = [cell["median"] for cell in cells if cell["median"].get("tokens_per_second_per_user")]
        users = [median["tokens_per_second_per_user"]["p50"] for median in known]
        axes.plot(users, [median["output_tokens_per_second"] for median in known], color=colour, marker=".", label=name)
        for cell in cells:
            if each := cell["median"].get("tokens_per_second_per_user"):
                point = (each["p50"], cell["median"]["output_tokens_per_second"])
                axes.annotate(f"{cell['load']:g}", point, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens/s of one user, p50")
    axes.set_ylabel("tokens/s of all")
    axes.legend(fontsize=7)


def itl_histogram(axes: Axes, result: Result) -> None:
    """Times between responses at the highest load, as shares of all."""
    for name, colour, cells in series(result):
        if gaps := cells[-1]["itl_histogram"]:
            values, counts = zip(*gaps, strict=True)
            low, high = max(min(values), 1e-3), max(values)
            edges = [low * (high * 1.01 / low) ** (step / 60) for step in range(61)]
            total = sum(counts)
            shares = [100 * count / total for count in counts]
            axes.hist(
                values, bins=edges, weights=shares, color=colour, alpha=0.55, label=f"{name}, {cells[-1]['level']}"
            )
    axes.set_xlabel("ms between responses of a stream")
    axes.set_ylabel("% of them")
    if axes.patches:
        axes.set_xscale("log")
        axes.legend(fontsize=7)


def timeline(axes: Axes, result: Result) -> None:
    """The tokens of one typical stream at the highest load, as they came."""
    for name, colour, cells in series(result):
        if points := cells[-1]["timeline"]:
            times, tokens = zip(*points, strict=True)
            axes.step(times, tokens, where="post", color=colour, label=f"{name}, {cells[-1]['level']}")
            axes.plot(times, tokens, ".", color=colour, markersize=2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ms since the request was sent")
    axes.set_ylabel("tokens so far")
    if axes.lines:
        axes.legend(fontsize=7)


PLOTS: dict[str, Callable[[Axes, Result], None]] = {
    "Latency against load": latency,
    "Throughput against load": throughput,
    "Goodput against load": goodput,
    "One user against all": knee,
    "Inter-token latency": itl_histogram,
    "Timeline of one stream": timeline,
}


def _load_axis(axes: Axes, result: Result) -> None:
    loads = sorted({cell["load"] for cell in result["results"]})
    if len(loads) > 1 and loads[-1] / loads[0] >= 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.minorticks_off()
    axes.set_xlabel(unit(result))
