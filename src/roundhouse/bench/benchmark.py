"""`roundhouse bench`: a scenario at one load or several, on one server or several in turn, as often as asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from roundhouse import deployment as deployments
from roundhouse.bench import load, metrics, repeats, scenario, servers
from roundhouse.bench.clients import Target
from roundhouse.bench.load import Plan, Seen
from roundhouse.bench.machine import machine
from roundhouse.bench.metrics import Objective, Trace
from roundhouse.bench.prompts import PromptError, PromptMaker
from roundhouse.bench.records import Histogram
from roundhouse.bench.scenario import Closed, Level, Poisson, Scenario, Session, Sessions
from roundhouse.text.tokenizer import Tokenizer

TIMELINE_RESPONSES = 2000  # of the one stream that is kept whole


@dataclass(frozen=True)
class Contestant:
    """A server to measure: `deployment` is started for it, or `target` is running already.

    Attributes:
        tokenizer: folder; prompts are counted with it. max_seq_len, objective: of the deployment, if it has them.
    """

    name: str
    tokenizer: str
    max_seq_len: int | None
    objective: Objective | None
    deployment: Path | None = None
    target: Target | None = None

    @classmethod
    def of(cls, text: str, described_by: Path) -> Contestant:
        """A deployment file, or a running target with what the deployment `described_by` says.

        Raises DeploymentError or TargetError.
        """
        is_file = text.endswith((".yaml", ".yml"))
        target = None if is_file else Target.parse(text)
        path = Path(text) if is_file else described_by
        parsed = deployments.load(path)
        slo = parsed.slo
        return cls(
            name=path.stem if target is None else f"{target.protocol}://{target.address}/{target.model}",
            tokenizer=parsed.model.tokenizer or parsed.model.path,
            max_seq_len=parsed.limits.max_seq_len,
            objective=None if slo is None else Objective(slo.ttft_ms, slo.itl_ms),
            deployment=path if target is None else None,
            target=target,
        )


def named(contestants: list[Contestant]) -> list[Contestant]:
    """The same with names that differ."""
    names = [one.name for one in contestants]
    return [
        replace(one, name=f"{one.name} ({names[:index].count(one.name) + 1})") if names.count(one.name) > 1 else one
        for index, one in enumerate(contestants)
    ]


@dataclass(frozen=True)
class Settings:
    """Attributes: seconds: that count, of each load; warm_up: before them. prompts: sessions that are made for each.
    protocol, model: of deployments that are started; running targets say their own.
    """

    scenario: Scenario
    levels: list[Level]
    seconds: float = 20.0
    warm_up: float = 5.0
    repeats: int = 1
    processes: int = field(default_factory=load.default_processes)
    prompts: int = 1000
    seed: int = 1
    protocol: str = "grpc"
    model: str = "ensemble"

    def run_seconds(self) -> float:
        return len(self.levels) * (self.warm_up + self.seconds)


class Watch(Protocol):
    """Hears how a benchmark goes on."""

    def begin(self, what: str, seconds: float) -> None: ...

    def progress(self, elapsed: float, requests: int, tokens: int) -> None: ...

    def end(self, run: dict[str, Any]) -> None: ...


def levels_of(chosen: Scenario, streams: list[int], rates: list[float]) -> list[Level]:
    """The loads that were asked for, else those of the scenario."""
    asked: list[Level] = [Closed(kind="closed", streams=count) for count in streams]
    asked += [Poisson(kind="poisson", requests_per_second=rate) for rate in rates]
    return asked or list(chosen.levels())


def size_of(level: Level) -> float:
    """Where a load stands on the axis of a plot: streams, or requests a second."""
    match level:
        case Closed():
            return level.streams
        case Poisson():
            return level.requests_per_second
        case _:
            return level.size / level.every_seconds


class Benchmark:
    """What was measured so far. `as_json` is the whole of it, at any time."""

    def __init__(self, contestants: list[Contestant], settings: Settings, watch: Watch) -> None:
        """Raises ScenarioError if a request would not fit a contestant."""
        self.contestants = named(contestants)
        self.settings = settings
        self._watch = watch
        self._cells = {(one.name, index): _Cell() for one in self.contestants for index in range(len(settings.levels))}
        self._when = datetime.now(UTC).isoformat(timespec="seconds")
        self._sessions = cache(self._make_sessions)
        for one in self.contestants:
            settings.scenario.check(one.max_seq_len, one.name)

    def run(self, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """All of it; `save` gets the state after each load. Raises StartError, LoadError, PromptError."""
        for repeat in range(self.settings.repeats):
            # there and back again, so that a machine that grows warm or busy is nobody's advantage
            order = self.contestants if repeat % 2 == 0 else self.contestants[::-1]
            for one in order:
                for index in range(len(self.settings.levels)):
                    self._sessions_for(one, index, repeat)  # before the server starts: they do not need it
                with self._server(one) as (target, server):
                    for index, level in enumerate(self.settings.levels):
                        self._measure(one, target, server, index, level, repeat)
                        save(self.as_json())
            self._sessions.cache_clear()
        return self.as_json()

    @contextmanager
    def _server(self, one: Contestant) -> Iterator[tuple[Target, servers.Running | None]]:
        if one.deployment is None:
            assert one.target is not None
            yield one.target, None
            return
        self._watch.begin(f"{one.name}: starting", 0.0)
        with servers.running(one.deployment, self.settings.model, self.settings.protocol) as server:
            yield server.target, server

    def _sessions_for(self, one: Contestant, index: int, repeat: int) -> list[Session]:
        """The same ones for each deployment that is started here, others for each target that is running already:
        two of those may be one engine, whose cache would know the second one's prompts from the first."""
        apart = 0 if one.target is None else 1 + self.contestants.index(one)
        return self._sessions(one.tokenizer, apart, index, repeat)

    def _make_sessions(self, tokenizer: str, apart: int, index: int, repeat: int) -> list[Session]:
        seed = f"{self.settings.seed} {apart} {index} {repeat}"  # no prompt comes again, so that no cache knows it
        try:
            maker = PromptMaker(Tokenizer.load(tokenizer))
        except (OSError, ValueError) as error:
            raise PromptError(f"tokenizer {tokenizer}: cannot be loaded: {error}") from error
        return Sessions(self.settings.scenario, maker, seed).take(self.settings.prompts)

    def _measure(
        self, one: Contestant, target: Target, server: servers.Running | None, index: int, level: Level, repeat: int
    ) -> None:
        settings = self.settings
        what = f"{one.name}: {scenario.describe(level)}"
        self._watch.begin(
            what if settings.repeats == 1 else f"{what} ({repeat + 1} of {settings.repeats})",
            settings.warm_up + settings.seconds,
        )
        plan = Plan(
            target=target,
            level=level,
            sessions=self._sessions_for(one, index, repeat),
            seed=settings.seed + repeat,
            warm_up=settings.warm_up,
            seconds=settings.seconds,
            processes=min(settings.processes, level.streams) if isinstance(level, Closed) else settings.processes,
        )
        run = measure(plan, one.objective, server, self._watch.progress, self._cells[one.name, index])
        self._watch.end(run)

    @property
    def began(self) -> bool:
        """Whether anything was measured."""
        return any(cell.runs for cell in self._cells.values())

    def as_json(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "when": self._when,
            "command": sys.argv[1:],
            "machine": machine(),
            "scenario": settings.scenario.model_dump(exclude_none=True),
            "settings": {
                key: getattr(settings, key)
                for key in ("seconds", "warm_up", "repeats", "processes", "prompts", "seed", "protocol", "model")
            },
            "targets": [self._described(one) for one in self.contestants],
            "results": [
                {"target": name, "level": scenario.describe(level), "load": size_of(level), **cell.as_json()}
                for (name, index), cell in self._cells.items()
                if cell.runs and (level := settings.levels[index])
            ],
        }

    def _described(self, one: Contestant) -> dict[str, Any]:
        found: dict[str, Any] = {"name": one.name, "slo": None if one.objective is None else asdict(one.objective)}
        if one.deployment is not None:
            parsed = deployments.load(one.deployment).model_dump(exclude_none=True)
            found["deployment"] = {key: value for key, value in parsed.items() if key != "model"}
        return found


class _Cell:
    """One load on one server: its runs, and what a plot needs of them."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self._gaps = Histogram()
        self._timeline: list[tuple[float, int]] = []

    def add(self, run: dict[str, Any], sent: list[Trace]) -> None:
        self.runs.append(run)
        for trace in sent:
            for gap in metrics.gaps(trace):
                self._gaps.add(gap)
        if not self._timeline:
            self._timeline = timeline(sent)

    def as_json(self) -> dict[str, Any]:
        medians, widths = repeats.combine(self.runs)
        gaps = sorted(self._gaps.buckets.items())
        return {
            "median": medians,
            "half_width_95": widths,
            "runs": self.runs,
            "itl_histogram": [[round(1e3 * Histogram.value(bucket), 4), count] for bucket, count in gaps],
            "timeline": self._timeline,
        }


def measure(
    plan: Plan,
    objective: Objective | None,
    server: servers.Running | None = None,
    progress: load.Progress | None = None,
    cell: _Cell | None = None,
) -> dict[str, Any]:
    """Figures of one load. Raises LoadError."""
    before, cpu, began = servers.scrape(plan.target), server.cpu_seconds() if server else 0.0, time.monotonic()
    seen = load.run(plan, progress)
    wall = time.monotonic() - began
    run: dict[str, Any] = metrics.summarise(seen.traces, seen.start, seen.end, objective).as_json()
    sent = [trace for trace in seen.traces if seen.start <= trace.sent < seen.end and not trace.warm_up]
    if objective is not None:
        found = metrics.verdicts(sent, objective)
        run["slo"] = {one.name: {"value_ms": one.value_ms, "limit_ms": one.limit_ms, "met": one.met} for one in found}
    run["client"] = {**asdict(seen.overhead), "warnings": list(_warnings(plan, seen))}
    if server is not None:
        run["server_cores"] = round((server.cpu_seconds() - cpu) / wall, 3)
    if before is not None:
        time.sleep(servers.METRICS_SECONDS)
        run["server"] = servers.what_happened(before, servers.scrape(plan.target))
    if cell is not None:
        cell.add(run, sent)
    return run


def _warnings(plan: Plan, seen: Seen) -> Iterator[str]:
    if (said := seen.overhead.warning()) is not None:
        yield said
    if seen.repeated:
        yield f"all {len(plan.sessions)} prompts were sent and are repeated, which favours the cache: raise --prompts"


def timeline(sent: list[Trace]) -> list[tuple[float, int]]:
    """(milliseconds since it was sent, tokens so far) of the responses of one typical request: that of median TPOT."""
    judged = sorted((each, index) for index, trace in enumerate(sent) if (each := metrics.tpot(trace)) is not None)
    if not judged:
        return []
    trace = sent[judged[len(judged) // 2][1]]
    points, tokens = [], 0
    for at, count in list(zip(trace.times, trace.tokens, strict=True))[:TIMELINE_RESPONSES]:
        tokens += count
        points.append((round(1e3 * (at - trace.sent), 3), tokens))
    return points
