"""The report of a tuning: the trials, their Pareto front, and the confirmation as roundhouse bench reports it."""

from __future__ import annotations

from html import escape
from typing import Any

from matplotlib import pyplot

from roundhouse.bench import plots, report
from roundhouse.bench.tables import Table, number

Record = dict[str, Any]


def front(records: list[Record]) -> list[Record]:
    """Of the measured trials, those that no other beats both in tokens/s of one user and of all."""
    points = [(_point(record), record) for record in records if "figures" in record]
    best = [
        (at, record)
        for at, record in points
        if not any(other[0] >= at[0] and other[1] >= at[1] and other != at for other, _ in points)
    ]
    return [record for _, record in sorted(best, key=lambda pair: pair[0])]


def _point(record: Record) -> tuple[float, float]:
    figures = record["figures"]
    return float(figures["tokens_per_second_per_user"] or 0.0), float(figures["tokens_per_second"])


def pareto(records: list[Record]) -> str:
    """The plot, as SVG: each trial's tokens/s of one user and of all, coloured by its score."""
    measured = [record for record in records if "figures" in record]
    with pyplot.rc_context(plots.STYLE):
        figure, axes = pyplot.subplots(figsize=plots.SIZE, layout="constrained")
        if measured:
            users, everyone = zip(*map(_point, measured), strict=True)
            shown = axes.scatter(users, everyone, c=[record["score"] for record in measured], cmap="viridis", zorder=3)
            figure.colorbar(shown, label="score")
            axes.plot(*zip(*map(_point, front(records)), strict=True), color="C3", linewidth=1, label="Pareto front")
            for record in measured:
                axes.annotate(
                    str(record["trial"]), _point(record), fontsize=6, xytext=(4, 3), textcoords="offset points"
                )
            axes.legend(fontsize=7)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens/s of one user, p50")
        axes.set_ylabel("tokens/s of all")
        return plots.svg(figure)


def table(records: list[Record]) -> Table:
    """The trials, best first."""
    header = ["trial", "score", "goodput/s", "tokens/s", "TTFT p95 ms", "TPOT p95 ms", "seconds", "changed"]
    rows = []
    for record in sorted(records, key=lambda record: -(record["score"] or 0.0)):
        changed = ", ".join(f"{key} {value}" for key, value in record["changed"].items()) or "nothing: the start"
        figures = record.get("figures", {})
        rows.append([
            str(record["trial"]),
            number(record["score"]) if figures else record["state"],
            *(number(figures.get(key)) for key in ("goodput", "tokens_per_second", "ttft_p95_ms", "tpot_p95_ms")),
            number(record["seconds"]),
            changed if figures else f"{changed}: {record.get('why', '')}",
        ])  # fmt: skip
    return header, rows


def html(outcome: dict[str, Any]) -> str:
    """One file that needs no other."""
    advice = "".join(f"<li>{escape(line)}</li>" for line in outcome["advice"])
    first = (
        f"<h1>Tuned</h1><ul>{advice}</ul><h2>Pareto plot</h2><figure style='max-width: 760px'>"
        f"{pareto(outcome['trials'])}</figure><h2>Trials</h2>{report.table(table(outcome['trials']))}"
        f"<h2>tuned.yaml</h2><pre>{escape(outcome['tuned'])}</pre>"
    )
    return report.html(outcome["confirmation"], first)
