"""The figures of docs/reliability.md are those that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
MODELS = ("tensorrt_llm_bls", "ensemble")


def measured(name: str) -> Any:
    return json.loads((ROOT / f"docs/benchmarks/{name}.json").read_text())


def row(label: str) -> list[str]:
    """The cells behind a row's label."""
    (found,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", PAGE, flags=re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


def test_overload() -> None:
    figures = [measured("overload")["models"][model] for model in MODELS]
    assert row("goodput in overload, of its peak") == [f"{f['goodput_percent']:.0f} %" for f in figures]
    assert row("refusal, p50 / p99 / slowest") == [
        f"{f['refusal_ms']['p50']:.0f} / {f['refusal_ms']['p99']:.0f} / {f['refusal_ms']['max']:.0f} ms"
        for f in figures
    ]
    assert row("first token of accepted requests, p99") == [f"{f['ttft_ms']['p99']:,.0f} ms" for f in figures]
    assert row("latency is as before after") == [f"{f['recovery_seconds']:.0f} s" for f in figures]
    assert row("memory, first and last third of the overload") == [
        f"{f['memory_mb']['first_third']:.0f}, {f['memory_mb']['last_third']:.0f} MB" for f in figures
    ]


def test_soak() -> None:
    soak = measured("soak")
    tally = soak["tally"]
    assert soak["passed"]
    assert row("soaked streams") == [f"{soak['streams']:,}"]
    faults = sum(tally[name] for name in ("wrong", "silent", "late", "hanging"))
    assert row("lost, mixed up, doubled, late or left open") == [str(faults)]
    assert row("ended with an error, after so many kills") == [f"{tally['failed']:,}, {soak['engine_kills']}"]
    assert row("KV blocks in use at the end") == [f"{soak['blocks_used_at_the_end']:.0f}"]
    assert row("grown by more than 2 %") == [", ".join(soak["grown_more_than_2_percent"]) or "nothing"]


def test_identity() -> None:
    report = measured("identity")
    assert report["passed"]
    assert row("checked streams") == [f"{report['streams']:,}"]
    ends = ("finished", "cancelled", "failed")
    assert row("finished, cancelled, ended with an error") == [", ".join(f"{report[end]:,}" for end in ends)]
    assert row("wrong, cut short, late or left open") == [str(report["faults"])]
    assert row("engine kills") == [str(report["engine_kills"])]
    assert row("servers") == [str(report["servers"])]
    causes = report["servers_ended_because"].items()
    assert row("ended because") == [", ".join(f"{count} x {why}" for why, count in causes)]


def test_fuzz() -> None:
    fuzz = measured("fuzz")
    assert row("fuzz cases") == [f"{fuzz['cases']:,}"]
    assert row("fuzz targets that failed") == [str(fuzz["failed"])]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:tests|scripts|docs)/[\w./-]+\w", PAGE))))
def test_the_files_exist(name: str) -> None:
    assert (ROOT / name).exists()
