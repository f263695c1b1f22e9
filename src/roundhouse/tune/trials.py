"""One trial: a server with other settings under the user's load. And the record of all trials."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from roundhouse import deployment as deployments
from roundhouse.bench import benchmark, servers
from roundhouse.bench.load import LoadError, Plan
from roundhouse.bench.metrics import Objective
from roundhouse.bench.scenario import Level, Session
from roundhouse.bench.servers import StartError
from roundhouse.deployment import DeploymentError
from roundhouse.tune import space

Goal = Literal["goodput", "tokens"]
PATIENCE_SECONDS = 20.0  # for answers that are open at the end of a load
CHECKPOINTS = (0.35, 0.7)  # of a load: where a trial that lags behind the others is given up


class GivenUpError(Exception):
    """A trial that lags behind the others."""


class BrokenError(Exception):
    """A trial that cannot be measured. The message says why."""


@dataclass(frozen=True)
class Bench:
    """The load that every trial gets."""

    level: Level
    sessions: list[Session]
    objective: Objective | None
    goal: Goal
    seconds: float
    warm_up: float
    processes: int
    model: str
    seed: int = 1

    def score(self, run: dict[str, Any]) -> float:
        """What is maximised. Where no request was good, tokens decide among the bad."""
        tokens = float(run["output_tokens_per_second"])
        if self.goal == "tokens":
            return tokens
        return float(run["goodput"]) or 1e-6 * tokens


def attempt(
    raw: dict[str, Any], bench: Bench, checkpoint: Callable[[int, float], None] = lambda step, rate: None
) -> dict[str, Any]:
    """Figures of a deployment under the load, as roundhouse bench gives them.

    `checkpoint` hears of tokens/s at each of CHECKPOINTS, and may raise GivenUpError.
    Raises BrokenError if it cannot be deployed, does not fit, does not start, or answers nothing.
    """
    passed = 0

    def progress(elapsed: float, requests: int, tokens: int) -> None:
        nonlocal passed
        whole = bench.warm_up + bench.seconds
        while passed < len(CHECKPOINTS) and elapsed >= CHECKPOINTS[passed] * whole:
            passed += 1
            checkpoint(passed - 1, tokens / max(elapsed, 1e-3))

    try:
        parsed = deployments.parse(raw, source="trial", base=Path.cwd())
        space.check_fits(parsed)
        with tempfile.TemporaryDirectory(prefix="roundhouse-tune-") as folder:
            path = Path(folder) / "trial.yaml"
            path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
            with servers.running(path, bench.model) as server:
                plan = Plan(
                    target=server.target,
                    level=bench.level,
                    sessions=bench.sessions,
                    seed=bench.seed,
                    warm_up=bench.warm_up,
                    seconds=bench.seconds,
                    patience=PATIENCE_SECONDS,
                    processes=bench.processes,
                )
                run = benchmark.measure(plan, bench.objective, server, progress)
    except (DeploymentError, space.DoesNotFitError, StartError, LoadError) as error:
        raise BrokenError(str(error)) from error
    if not run["finished"]:
        raise BrokenError(f"no request was answered: {next(iter(run['errors']), 'none ended in time')}")
    return run


def figures(run: dict[str, Any]) -> dict[str, float | None]:
    """What the record keeps of a run."""
    return {
        "goodput": run["goodput"],
        "good_percent": run["good_percent"],
        "tokens_per_second": run["output_tokens_per_second"],
        "tokens_per_second_per_user": run["tokens_per_second_per_user"].get("p50"),
        "ttft_p95_ms": run["ttft_ms"].get("p95"),
        "tpot_p95_ms": run["tpot_ms"].get("p95"),
        "failed": run["failed"],
    }


class Clock:
    """The time that a tuning may take."""

    def __init__(self, minutes: float) -> None:
        self._began = time.monotonic()
        self.seconds = 60 * minutes

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed
