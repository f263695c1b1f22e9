"""`roundhouse tune` from its options to its exit code."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from roundhouse import deployment as deployments
from roundhouse.bench import benchmark, files, load, scenario
from roundhouse.bench.benchmark import Benchmark, Contestant, Settings
from roundhouse.bench.command import UsageError, numbers
from roundhouse.bench.load import LoadError
from roundhouse.bench.machine import machine
from roundhouse.bench.metrics import Objective
from roundhouse.bench.prompts import PromptError, PromptMaker
from roundhouse.bench.scenario import Closed, Level, Poisson, Scenario, ScenarioError, Sessions
from roundhouse.bench.servers import StartError
from roundhouse.deployment import Deployment, DeploymentError
from roundhouse.text.tokenizer import Tokenizer
from roundhouse.tune import settle, space
from roundhouse.tune.search import OtherStudyError, Search
from roundhouse.tune.settle import Effect
from roundhouse.tune.trials import Bench, Clock, Goal, attempt

SERVER_SECONDS = 12.0  # to start and stop a server, if no trial has told yet
SETTLING_TRIALS = 5  # settings, at most, for which there is time to look at them after the search: 2 trials for each
SEARCH_SHARE = 0.4  # of the time, at least


@dataclass(frozen=True)
class Asked:
    """The options of `roundhouse tune`; its help says what they mean."""

    deployment: Path
    scenario: str
    streams: str
    rate: str
    goal: str
    minutes: float
    trials: int | None
    seconds: float
    warm_up: float
    repeats: int
    processes: int | None
    prompts: int
    model: str
    output: Path | None

    def level(self, chosen: Scenario) -> Level:
        """Raises UsageError."""
        streams = [int(count) for count in numbers("--streams", self.streams, whole=True)]
        levels = benchmark.levels_of(chosen, streams, numbers("--rate", self.rate))
        if len(levels) != 1:
            raise UsageError(f"{len(levels)} loads: deployments are tuned for one; say which with --streams or --rate")
        return levels[0]

    def goal_for(self, deployment: Deployment) -> Goal:
        """Raises UsageError."""
        if self.goal == "tokens" or (not self.goal and deployment.slo is None):
            return "tokens"
        if self.goal not in ("", "goodput"):
            raise UsageError(f"--goal {self.goal}: must be goodput or tokens")
        if deployment.slo is None:
            raise UsageError("--goal goodput: the deployment has no slo; add slo.ttft_ms and slo.itl_ms, or say tokens")
        return "goodput"


class Tuning:
    """One tuning, step by step."""

    def __init__(self, asked: Asked, console: Console) -> None:
        """Raises UsageError, DeploymentError, ScenarioError, PromptError, OtherStudyError."""
        self.asked = asked
        self.console = console
        self.clock = Clock(asked.minutes)
        deployment = deployments.load(asked.deployment)
        chosen = scenario.load(asked.scenario)
        chosen.check(deployment.limits.max_seq_len, asked.scenario)
        self.bench = self._bench(deployment, chosen)
        self.scenario = chosen
        self.folder = asked.output or Path(f"tune-{asked.deployment.stem}")
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "scenario": chosen.model_dump(exclude_none=True),
            "level": self.bench.level.model_dump(),
            "goal": self.bench.goal,
            "seconds": asked.seconds,
            "warm_up": asked.warm_up,
        }
        self.raw = space.read(asked.deployment)
        self.search = Search(self.folder, self.raw, deployment, space.knobs(deployment, self.bench.level), about)
        self._best = 0.0

    def _bench(self, deployment: Deployment, chosen: Scenario) -> Bench:
        asked, slo = self.asked, deployment.slo
        try:
            maker = PromptMaker(Tokenizer.load(deployment.model.tokenizer or deployment.model.path))
        except (OSError, ValueError) as error:
            raise PromptError(f"tokenizer of {asked.deployment}: cannot be loaded: {error}") from error
        return Bench(
            level=asked.level(chosen),
            sessions=Sessions(chosen, maker, seed=1).take(asked.prompts),
            objective=None if slo is None else Objective(slo.ttft_ms, slo.itl_ms),
            goal=asked.goal_for(deployment),
            seconds=asked.seconds,
            warm_up=asked.warm_up,
            processes=asked.processes or load.default_processes(),
            model=asked.model,
        )

    def run(self) -> dict[str, Any]:
        """All of it. Raises UsageError if no trial could be measured; StartError or LoadError in the confirmation."""
        self._say(f"searching for {(self.clock.left - self._reserve()) / 60:.1f} minutes, the rest is for the proof")
        self.search.run(self.bench, self.clock, self._reserve, self.asked.trials, self._told, attempt)
        best = self.search.best()
        if best is None or best.value is None:
            raise UsageError(f"no trial could be measured; {self.folder / 'trials.json'} says why")
        kept, effects = settle.settle(
            self.raw, self.search.start, best.params, best.value, self.bench, self.clock, self._confirming(), attempt,
            lambda effect: self._say(effect.line()),
        )  # fmt: skip
        tuned = self._write_tuned(kept)
        return self._outcome(tuned, effects, self._confirm())

    def _trial_seconds(self) -> float:
        return self.search.trial_seconds() or SERVER_SECONDS + self.bench.warm_up + self.bench.seconds

    def _confirming(self) -> float:
        """Seconds that the confirmation takes."""
        return 2 * self.asked.repeats * self._trial_seconds()

    def _reserve(self) -> float:
        """Seconds that are kept for what follows the search. Trials tell how long their servers take to start."""
        settling = (1 + 2 * min(self.search.gained(), SETTLING_TRIALS)) * self._trial_seconds()
        return min(self._confirming() + settling, (1 - SEARCH_SHARE) * self.clock.seconds)

    def _told(self, record: dict[str, Any]) -> None:
        if "figures" in record:
            self._best = max(self._best, record["score"])
            said = f"score {record['score']:.3f}"
        else:
            said = f"{record['state']}: {str(record.get('why', '')).splitlines()[0][:160]}"
        changed = ", ".join(f"{key} {value}" for key, value in record["changed"].items()) or "the start"
        self._say(f"trial {record['trial']}: {said}; best {self._best:.3f}  [{changed}]")
        files.write_json(self.folder / "trials.json", {"trials": self.search.records()})

    def _write_tuned(self, kept: dict[str, Any]) -> str:
        raw = space.relative_to(space.override(self.raw, kept), self.folder, self.asked.deployment)
        text = f"# {self.asked.deployment.name}, tuned for: {self.scenario.description}\n"
        text += yaml.safe_dump(raw, sort_keys=False)
        files.write(self.folder / "tuned.yaml", text)
        return text

    def _confirm(self) -> dict[str, Any]:
        """Start and tuned deployment in turn, on prompts that no trial had; at half of the load too, if time allows."""
        bench, level = self.bench, self.bench.level
        levels = [level]
        both = self._confirming() + 2 * self.asked.repeats * (bench.warm_up + bench.seconds + 3)
        if self.clock.left > both and (lighter := _lighter(level)) is not None:
            levels.insert(0, lighter)
        self._say(f"confirming: start and tuned deployment, {self.asked.repeats} x each")
        pair = [Contestant.of(str(path), path) for path in (self.asked.deployment, self.folder / "tuned.yaml")]
        settings = Settings(
            scenario=self.scenario,
            levels=levels,
            seconds=bench.seconds,
            warm_up=bench.warm_up,
            repeats=self.asked.repeats,
            processes=bench.processes,
            prompts=len(bench.sessions),
            seed=100_000,
            model=bench.model,
        )
        return Benchmark(pair, settings, self).run(lambda state: None)

    def _outcome(self, tuned: str, effects: list[Effect], confirmation: dict[str, Any]) -> dict[str, Any]:
        key = "goodput" if self.bench.goal == "goodput" else "output_tokens_per_second"
        gained = settle.gains(confirmation, key)
        records = self.search.records()
        return {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv[1:],
            "machine": machine(),
            "goal": self.bench.goal,
            "minutes": round(self.clock.elapsed / 60, 2),
            "start": self.search.start,
            "tuned": tuned,
            "effects": settle.as_json(effects),
            "gains": gained,
            "advice": list(settle.advice(effects, gained, records, self.bench.goal)),
            "trials": records,
            "confirmation": confirmation,
        }

    def begin(self, what: str, seconds: float) -> None:
        """Nothing to say: `end` does."""

    def progress(self, elapsed: float, requests: int, tokens: int) -> None:
        """Nothing to say: a load of a few seconds."""

    def end(self, run: dict[str, Any]) -> None:
        self._say(f"  {run['output_tokens_per_second']:,.0f} tokens/s, goodput {run['goodput']}")

    def _say(self, text: str) -> None:
        left = max(0.0, self.clock.left)
        when = f"{time.strftime('%H:%M:%S')}  {left // 60:.0f}:{left % 60:02.0f} left"
        self.console.print(f"{when}  {text}", markup=False, highlight=False, soft_wrap=True)


def _lighter(level: Level) -> Level | None:
    match level:
        case Closed() if level.streams > 1:
            return Closed(kind="closed", streams=max(1, level.streams // 4))
        case Poisson():
            return Poisson(kind="poisson", requests_per_second=level.requests_per_second / 2)
        case _:
            return None


def tune(asked: Asked) -> int:
    """Returns the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        tuning = Tuning(asked, console)
        outcome = tuning.run()
    except (UsageError, OtherStudyError, DeploymentError, ScenarioError, PromptError, StartError, LoadError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    from roundhouse.tune import report

    files.write_json(tuning.folder / "trials.json", outcome)
    files.write(tuning.folder / "report.html", report.html(outcome))
    files.write(tuning.folder / "pareto.svg", report.pareto(outcome["trials"]))
    for line in outcome["advice"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    names = ", ".join(str(tuning.folder / name) for name in ("tuned.yaml", "trials.json", "report.html", "pareto.svg"))
    console.print(f"written: {names}", highlight=False, soft_wrap=True)
    return 0
