"""A benchmark in the terminal: a progress bar while it runs, tables when it is done."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from roundhouse.bench import tables

PERCENTILES_OF = 4  # so many results are few enough to show all their percentiles


class Bar:
    """A Watch with a progress bar; one line a load where the output is no terminal. A context manager."""

    def __init__(self, console: Console, total_seconds: float) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[rate]}"), console=console, transient=True)
        self._task = self._progress.add_task("", total=total_seconds, rate="")
        self._what = ""
        self._done = self._seconds = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str, seconds: float) -> None:
        self._what, self._seconds = what, seconds
        self._progress.update(self._task, description=what, completed=self._done, rate="")

    def progress(self, elapsed: float, requests: int, tokens: int) -> None:
        rate = f"{requests} requests, {tokens / max(elapsed, 1.0):,.0f} tokens/s"
        self._progress.update(self._task, completed=self._done + min(max(elapsed, 0.0), self._seconds), rate=rate)

    def end(self, run: dict[str, Any]) -> None:
        self._done += self._seconds
        first = run["ttft_ms"].get("p50")
        self._console.print(
            f"{self._what}: {run['output_tokens_per_second']:,.0f} tokens/s out, "
            f"TTFT p50 {tables.number(first)} ms, {run['failed']} failed",
            highlight=False,
        )


def show(result: dict[str, Any], console: Console) -> None:
    """The tables and what there is to note."""
    _print(console, tables.overview(result), "latencies in ms")
    if len(result["results"]) <= PERCENTILES_OF:
        for cell in result["results"]:
            _print(console, tables.percentiles(cell), f"{cell['target']}, {cell['level']}")
    if len(result["targets"]) > 1:
        _print(console, tables.comparison(result), "against the first; ↑ more is better, ↓ less is better")
    for line in (*tables.capacity(result), *tables.notes(result)):
        style = "yellow" if line.startswith("warning") else None
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, table: tables.Table, title: str) -> None:
    header, rows = table
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(header):
        shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
