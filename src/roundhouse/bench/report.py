"""The HTML report of a benchmark: one file that needs no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from roundhouse.bench import plots, tables

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } .warning { color: #b00; } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
"""


def html(result: dict[str, Any], first: str = "") -> str:
    """The report of what Benchmark.as_json gives, with other HTML before it."""
    return (
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>roundhouse bench</title>"
        f"<style>{STYLE}</style>\n<body>\n{first}\n" + "\n".join(_sections(result)) + "\n</body></html>\n"
    )


def _sections(result: dict[str, Any]) -> Iterator[str]:
    machine, settings = result["machine"], result["settings"]
    names = list(dict.fromkeys(cell["target"] for cell in result["results"]))
    yield f"<h1>{escape(' against '.join(names))}</h1>"
    yield (
        f"<p>{escape(result['scenario']['description'])}; {settings['repeats']} runs of {settings['seconds']:g} s "
        f"after {settings['warm_up']:g} s of warm-up; {result['when']}; {escape(machine['cpu'])}, "
        f"{machine['cores']} cores"
        f"{''.join(f', {escape(gpu)}' for gpu in machine.get('gpus', ()))}. Latencies are in milliseconds; figures are "
        "medians of the runs, with the half width of the 95 % confidence interval where there are several.</p>"
    )
    yield from (f"<p>{escape(line)}</p>" for line in tables.capacity(result))
    yield table(tables.overview(result))
    if len(names) > 1:
        yield "<h2>Comparison</h2><p>Below 1 is less, above 1 is more; in brackets the 95 % confidence interval.</p>"
        yield table(tables.comparison(result))
    figures = (
        f"<figure><figcaption>{title}</figcaption>{plots.render(draw, result)}</figure>"
        for title, draw in plots.PLOTS.items()
    )
    yield f"<h2>Plots</h2><div class='plots'>{''.join(figures)}</div>"
    yield "<h2>Percentiles</h2>"
    for cell in result["results"]:
        yield f"<h3>{escape(cell['target'])}, {escape(cell['level'])}</h3>{table(tables.percentiles(cell))}"
    yield "<h2>Client, server, doubts</h2><ul>"
    for line in tables.notes(result):
        yield f"<li{' class=warning' if line.startswith('warning') else ''}>{escape(line)}</li>"
    yield "</ul><h2>Settings</h2>"
    about = {key: result[key] for key in ("command", "machine", "settings", "scenario", "targets")}
    yield f"<pre>{escape(json.dumps(about, indent=1))}</pre>"


def table(content: tables.Table) -> str:
    """A table as HTML."""
    header, rows = content
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
