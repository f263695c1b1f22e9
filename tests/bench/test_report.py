"""Benchmarks are summed up as they were measured: loads, tables, the report; and what cannot be asked is refused."""

from __future__ import annotations

import re
import xml.dom.minidom
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roundhouse.bench import benchmark, command, load, plots, report, scenario, tables
from roundhouse.bench.benchmark import Benchmark, Contestant, Settings
from roundhouse.bench.clients import Target, TargetError
from roundhouse.bench.load import Overhead, Plan, Seen
from roundhouse.bench.metrics import Trace

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "deployments/local-cpu.yaml"


class Silent:
    def begin(self, what: str, seconds: float) -> None: ...

    def progress(self, elapsed: float, requests: int, tokens: int) -> None: ...

    def end(self, run: dict[str, Any]) -> None: ...


def answers(plan: Plan) -> Iterator[Trace]:
    """Streams of 10 ms a token; 100 ms for the first, and more on the target that is called slow."""
    first = 0.9 if plan.target.model == "slow" else 0.1
    assert isinstance(plan.level, scenario.Closed)
    for stream in range(plan.level.streams):
        sent = plan.warm_up + 0.01 * stream
        times = [sent + first + 0.01 * token for token in range(21)]
        yield Trace("request", 128, sent, sent, times, [1] * 21, times[-1])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def run(plan: Plan, progress: load.Progress | None = None) -> Seen:
        overhead = Overhead(1, 0.1, 40.0, {"p99": 0.2})
        return Seen(list(answers(plan)), plan.warm_up, plan.warm_up + plan.seconds, overhead, repeated=False)

    monkeypatch.setattr(load, "run", run)
    contestants = [Contestant.of(f"grpc://127.0.0.1:1/{model}", TINY) for model in ("quick", "slow", "quick")]
    settings = Settings(scenario.load("ramp"), benchmark.levels_of(scenario.load("ramp"), [1, 8], []), repeats=2)
    states: list[dict[str, Any]] = []
    result = Benchmark(contestants, settings, Silent()).run(states.append)
    assert len(states) == 6, "the state is saved after each server"
    return result


def test_every_target_is_measured_at_every_load(measured: dict[str, Any]) -> None:
    cells = {(cell["target"], cell["load"]): cell for cell in measured["results"]}
    quick, slow = "grpc://127.0.0.1:1/quick (1)", "grpc://127.0.0.1:1/slow"
    assert len(cells) == 6
    assert len(cells[quick, 8]["runs"]) == 2
    assert cells[quick, 8]["median"]["ttft_ms"]["p99"] == pytest.approx(100, abs=0.1)
    assert cells[slow, 8]["median"]["ttft_ms"]["p50"] == pytest.approx(900, abs=0.1)
    assert cells[quick, 1]["timeline"][0] == (pytest.approx(100, abs=0.1), 1)
    assert sum(count for _, count in cells[quick, 8]["itl_histogram"]) == 2 * 8 * 20


def test_the_tables(measured: dict[str, Any]) -> None:
    header, rows = tables.overview(measured)
    assert {row[header.index("SLO")] for row in rows if "quick" in row[0]} == {"met"}
    assert {row[header.index("SLO")] for row in rows if "slow" in row[0]} == {"TTFT missed in 2 of 2"}
    header, rows = tables.comparison(measured)
    shown = [row[header.index("TTFT p50 ↓")] for row in rows]
    assert shown == ["9.00 (9.00 to 9.00)"] * 2 + ["1.00 (1.00 to 1.00)"] * 2
    lines = list(tables.capacity(measured))
    assert lines[0].endswith("within its SLO up to 8 streams")
    assert lines[1].endswith("outside of its SLO at each load")
    assert command.exit_code(measured, check_slo=False) == 0
    assert command.exit_code(measured, check_slo=True) == 1


def test_one_run_gives_a_ratio_without_an_interval(measured: dict[str, Any]) -> None:
    for cell in measured["results"]:
        cell["runs"] = cell["runs"][:1]
    header, rows = tables.comparison(measured)
    assert rows[0][header.index("TTFT p50 ↓")] == "9.00"


def test_the_report_stands_alone(measured: dict[str, Any]) -> None:
    page = report.html(measured)
    assert len(re.findall("<svg", page)) == len(plots.PLOTS)
    assert not re.search(r"(src|href)=['\"](?!#)", page), "it needs no other file"
    for draw in plots.PLOTS.values():
        xml.dom.minidom.parseString(plots.render(draw, measured))
    assert "slow" in plots.render(plots.timeline, measured)


def test_a_report_of_failures_alone(measured: dict[str, Any]) -> None:
    empty: dict[str, Any] = {"ttft_ms": {}, "itl_ms": {}, "tpot_ms": {}, "e2e_ms": {}, "tokens_per_second_per_user": {}}
    for cell in measured["results"]:
        cell |= {"timeline": [], "itl_histogram": []}
        cell["median"] |= {**empty, "finished": 0}
        cell["runs"] = [{**run, **empty, "finished": 0, "errors": {"UNAVAILABLE": 3}} for run in cell["runs"]]
    assert "6 requests failed: UNAVAILABLE" in report.html(measured)
    assert command.exit_code(measured, check_slo=False) == 1


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("localhost:9001", Target("grpc", "localhost:9001")),
        ("grpc://h", Target("grpc", "h:8001")),
        ("http://h:1/tensorrt_llm_bls?metrics=2", Target("http", "h:1", "tensorrt_llm_bls", "h:2")),
        ("openai://h/meta-llama/Llama-3", Target("openai", "h:8000", "meta-llama/Llama-3")),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert Target.parse(text) == target


@pytest.mark.parametrize("text", ["ftp://h:1", "grpc://h:port", "http://"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(TargetError):
        Target.parse(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["a:1", "b:1"], "compare": False}, "add --compare"),
        ({"protocol": "carrier-pigeon"}, "--protocol carrier-pigeon"),
        ({"streams": "1,x"}, "--streams 1,x: must be whole positive numbers"),
        ({"rate": "0"}, "--rate 0: must be positive numbers"),
        ({"seconds": 0}, "--seconds 0: must be at least 1"),
        ({"scenario": "nothing"}, "scenario 'nothing' is not known"),
        ({"targets": ["nowhere.yaml"]}, "nowhere.yaml: cannot be read"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    usual: dict[str, Any] = {
        "targets": ["localhost:1"], "compare": True, "scenario": "ramp", "streams": "", "rate": "", "seconds": 1,
        "warm_up": 0, "repeats": 1, "processes": 1, "prompts": 9, "seed": 1, "deployment": TINY, "protocol": "grpc",
        "model": "ensemble", "output": None, "check_slo": False,
    }  # fmt: skip
    assert command.bench(command.Asked(**{**usual, **options})) == 1
    assert said in capsys.readouterr().err
