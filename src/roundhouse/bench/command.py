"""`roundhouse bench` from its options to its exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from roundhouse.bench import benchmark, files, load, scenario, tables
from roundhouse.bench.benchmark import Benchmark, Contestant, Settings
from roundhouse.bench.clients import TargetError
from roundhouse.bench.load import LoadError
from roundhouse.bench.prompts import PromptError
from roundhouse.bench.scenario import ScenarioError
from roundhouse.bench.servers import StartError
from roundhouse.deployment import DeploymentError


class UsageError(Exception):
    """An option cannot be used. The message names it and what would do."""


@dataclass(frozen=True)
class Asked:
    """The options of `roundhouse bench`; its help says what they mean."""

    targets: list[str]
    compare: bool
    scenario: str
    streams: str
    rate: str
    seconds: float
    warm_up: float
    repeats: int
    processes: int | None
    prompts: int
    seed: int
    deployment: Path
    protocol: str
    model: str
    output: Path | None
    check_slo: bool

    def check(self) -> None:
        """Raises UsageError."""
        if len(self.targets) > 1 and not self.compare:
            raise UsageError(f"{len(self.targets)} targets: add --compare to measure them in turn")
        if self.protocol not in ("grpc", "http"):
            raise UsageError(f"--protocol {self.protocol}: must be grpc or http; openai:// targets run already")
        least = {"seconds": 1, "repeats": 1, "processes": 1, "prompts": 1, "warm_up": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise UsageError(f"--{name.replace('_', '-')} {given}: must be at least {value}")

    def settings(self) -> Settings:
        """Raises UsageError or ScenarioError."""
        chosen = scenario.load(self.scenario)
        return Settings(
            scenario=chosen,
            levels=benchmark.levels_of(
                chosen,
                [int(count) for count in numbers("--streams", self.streams, whole=True)],
                numbers("--rate", self.rate),
            ),
            seconds=self.seconds,
            warm_up=self.warm_up,
            repeats=self.repeats,
            processes=self.processes or load.default_processes(),
            prompts=self.prompts,
            seed=self.seed,
            protocol=self.protocol,
            model=self.model,
        )


def numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    """Positive numbers with commas between. Raises UsageError."""
    try:
        found = [float(int(part)) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1]
    if any(value <= 0 for value in found):
        raise UsageError(f"{option} {text}: must be {'whole ' if whole else ''}positive numbers, as in 1,8,64")
    return found


def bench(asked: Asked) -> int:
    """Returns the exit code: 1 for what cannot be run, for requests that all failed, and for a missed --check-slo."""
    try:
        from roundhouse.bench import report, terminal
    except ImportError as error:
        print(f"roundhouse bench: {error}; scripts/setup --dev installs what it needs", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        asked.check()
        contestants = [Contestant.of(target, asked.deployment) for target in asked.targets]
        settings = asked.settings()
        folder = asked.output or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
        bar = terminal.Bar(console, settings.run_seconds() * settings.repeats * len(contestants))
        measured = Benchmark(contestants, settings, bar)
        folder.mkdir(parents=True, exist_ok=True)
    except (UsageError, DeploymentError, TargetError, ScenarioError) as error:
        print(error, file=sys.stderr)
        return 1
    try:
        with bar:
            result = measured.run(partial(files.write_json, folder / "report.json"))
    except (DeploymentError, PromptError, StartError, LoadError, KeyboardInterrupt) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        if measured.began:
            print(f"what was measured by then is in {folder / 'report.json'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    files.write(folder / "report.html", report.html(result))
    terminal.show(result, console)
    console.print(f"written: {folder / 'report.json'}, {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return exit_code(result, check_slo=asked.check_slo)


def exit_code(result: dict[str, Any], *, check_slo: bool) -> int:
    nothing = any(sum(run["finished"] for run in cell["runs"]) == 0 for cell in result["results"])
    missed = check_slo and any(tables.slo(cell) not in ("met", "-") for cell in result["results"])
    return int(nothing or missed)
