"""Benchmarks are summed up as they were measured: loads, tables, the report; and what cannot be asked is refused."""

from __future__ import annotations

import json
import os
import re
import xml.dom.minidom
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roundhouse.bench import benchmark, command, files, load, plots, report, scenario, servers, tables
from roundhouse.bench.benchmark import Benchmark, Contestant, Settings
from roundhouse.bench.clients import Target, TargetError
from roundhouse.bench.load import Overhead, Plan, Seen
from roundhouse.bench.metrics import Trace

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "deployments/local-cpu.yaml"
USUAL: dict[str, Any] = {
    "targets": ["localhost:1"], "compare": True, "scenario": "ramp", "streams": "", "rate": "", "seconds": 1,
    "warm_up": 0, "repeats": 1, "processes": 1, "prompts": 9, "seed": 1, "deployment": TINY, "protocol": "grpc",
    "model": "ensemble", "output": None, "check_slo": False,
}  # fmt: skip


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


def seen(plan: Plan, progress: load.Progress | None = None) -> Seen:
    overhead = Overhead(1, 0.1, 40.0, {"p99": 0.2})
    return Seen(list(answers(plan)), plan.warm_up, plan.warm_up + plan.seconds, overhead, repeated=False)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(load, "run", seen)
    contestants = [Contestant.of(f"grpc://127.0.0.1:1/{model}", TINY) for model in ("quick", "slow", "quick")]
    levels = benchmark.levels_of(scenario.load("ramp"), [1, 8], [])
    settings = Settings(scenario.load("ramp"), levels, repeats=2, prompts=10)
    states: list[dict[str, Any]] = []
    result = Benchmark(contestants, settings, Silent()).run(states.append)
    assert len(states) == 12, "the state is saved after each load"
    return result


def test_no_running_target_gets_the_prompts_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be doors of one engine. Deployments that are started have caches of their own."""
    sent: list[list[str]] = []

    def run(plan: Plan, progress: load.Progress | None = None) -> Seen:
        sent.append([request.prompt for session in plan.sessions for request in session])
        return seen(plan)

    @contextmanager
    def running(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(target=Target("grpc", "127.0.0.1:1"), cpu_seconds=lambda: 0.0)

    monkeypatch.setattr(load, "run", run)
    monkeypatch.setattr(servers, "running", running)
    names = ["grpc://h/ensemble", "openai://h/M", str(TINY), str(TINY)]
    levels = benchmark.levels_of(scenario.load("ramp"), [1, 8], [])
    for seed in (1, 2):
        settings = Settings(scenario.load("ramp"), levels, prompts=4, seed=seed)
        Benchmark([Contestant.of(name, TINY) for name in names], settings, Silent()).run(lambda state: None)
    for started, again in ((4, 6), (5, 7), (12, 14), (13, 15)):
        assert sent[started] == sent[again]
    apart = [prompt for index, prompts in enumerate(sent) if index not in (6, 7, 14, 15) for prompt in prompts]
    assert len(set(apart)) == len(apart) == 12 * 4, "another target, load or --seed has other prompts"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (load.LoadError("no clients"), 1)])
def test_what_was_measured_before_it_broke_off_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def run(plan: Plan, progress: load.Progress | None = None) -> Seen:
        assert isinstance(plan.level, scenario.Closed)
        if plan.level.streams == 8:
            raise error
        return seen(plan)

    monkeypatch.setattr(load, "run", run)
    options = {"targets": ["grpc://127.0.0.1:1"], "streams": "1,8", "output": tmp_path}
    assert command.bench(command.Asked(**{**USUAL, **options})) == code
    said = capsys.readouterr().err
    assert f"what was measured by then is in {tmp_path / 'report.json'}" in said
    (cell,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert cell["level"] == "1 stream"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "and nothing that is half written"


def test_a_file_is_never_a_part_of_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    files.write_json(path, {"trials": [1]})

    def ends(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", ends)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"trials": [1, 2]})
    assert json.loads(path.read_text()) == {"trials": [1]}


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
    assert command.bench(command.Asked(**{**USUAL, **options})) == 1
    assert said in capsys.readouterr().err
