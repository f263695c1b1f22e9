"""The search: optuna proposes, a trial measures, a journal remembers. Whatever ends it, the next run goes on there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from roundhouse import deployment as deployments
from roundhouse.deployment import Deployment
from roundhouse.tune import trials
from roundhouse.tune.space import Knob, override, value
from roundhouse.tune.trials import Bench, BrokenError, Clock, GivenUpError

LAGGING = 0.8  # of the best trial's tokens/s: less than that is not noise
REPEATED_PROPOSALS = 25  # in a row: there is nothing left to try
WORTH = 1.03  # a setting that brings less than 3 % stays as it was: that much is noise
TRIED, CONTRADICTORY = "tried before", "contradictory settings"  # proposals that are not worth a server

Attempt = Callable[[dict[str, Any], Bench, Callable[[int, float], None]], dict[str, Any]]
Told = Callable[[dict[str, Any]], None]


class OtherStudyError(Exception):
    """The folder holds trials of something else. The message says what to do."""


class Search:
    """The trials of one folder."""

    def __init__(
        self, folder: Path, raw: dict[str, Any], deployment: Deployment, found: list[Knob], about: Any
    ) -> None:
        """Go on with what the folder holds. Raises OtherStudyError if it belongs to another deployment or load."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.raw = raw
        self.knobs = found
        self.start = {knob.key: value(deployment, knob.key) for knob in found}
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))),
            study_name="tune",
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=1),
            load_if_exists=True,
        )
        self._check_same(folder, json.loads(json.dumps({**about, "deployment": raw})))
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            self._study.tell(trial.number, state=TrialState.FAIL)  # tune itself ended in the middle of it
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(self.start)

    def _check_same(self, folder: Path, about: Any) -> None:
        known = self._study.user_attrs.get("about")
        if known is None:
            self._study.set_user_attr("about", about)
        elif known != about:
            raise OtherStudyError(
                f"--output {folder}: holds trials of another deployment, scenario, load or goal; choose another folder"
            )

    def run(
        self, bench: Bench, clock: Clock, reserve: Callable[[], float], limit: int | None, told: Told, attempt: Attempt
    ) -> None:
        """Trials until only `reserve` seconds are left, `limit` were made, or nothing new is proposed.

        The start is first. Then each knob is turned once, on top of what has helped so far: where a server takes
        minutes to start, that tells most. From there on the optimiser proposes.
        """
        done = repeated = 0
        while clock.left > reserve() and (limit is None or done < limit) and repeated < REPEATED_PROPOSALS:
            self._enqueue_step()
            trial = self._study.ask()
            values = {knob.key: trial.suggest_categorical(knob.key, knob.values) for knob in self.knobs}
            if (same := self._tried(values)) is not None:
                repeated += 1
                trial.set_user_attr("why", TRIED)
                self._study.tell(trial, same.value, state=same.state)
                continue
            repeated = 0
            if not self._consistent(values):
                trial.set_user_attr("why", CONTRADICTORY)
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            done += 1
            self._attempt(trial, values, bench, attempt)
            told(self.record(self._study.trials[trial.number]))

    def _enqueue_step(self) -> None:
        """Unless something is enqueued already, or every step was made."""
        trials = self._study.get_trials(deepcopy=False)
        if trials[-1].state == TrialState.WAITING:
            return
        made = sum("step" in trial.user_attrs for trial in trials)
        steps = [(knob.key, wanted) for knob in self.knobs for wanted in knob.steps(self.start[knob.key])]
        if made < len(steps):
            key, wanted = steps[made]
            self._study.enqueue_trial({**self._base(), key: wanted}, user_attrs={"step": made})

    def _base(self) -> dict[str, Any]:
        """The start, with the steps that made more of a difference than noise does."""
        base, score = self.start, 0.0
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            if (trial.value or 0.0) >= WORTH * score:
                base, score = trial.params, trial.value or 0.0
        return base

    def _attempt(self, trial: optuna.Trial, values: dict[str, Any], bench: Bench, attempt: Attempt) -> None:
        best = self.best()

        def checkpoint(step: int, rate: float) -> None:
            trial.report(rate, step)
            if best is not None and rate < LAGGING * (good := _good_rate(best, step)):
                raise GivenUpError(
                    f"{rate:.0f} tokens/s so far, good or not; trial {best.number} had {good:.0f} good ones by then"
                )

        try:
            run = attempt(override(self.raw, values), bench, checkpoint)
        except GivenUpError as error:
            trial.set_user_attr("why", str(error))
            self._study.tell(trial, state=TrialState.PRUNED)
        except BrokenError as error:
            trial.set_user_attr("why", str(error))
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("figures", trials.figures(run))
            self._study.tell(trial, bench.score(run))

    def _tried(self, values: dict[str, Any]) -> FrozenTrial | None:
        """The finished trial of these values, if there is one."""
        finished = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        known = self._study.get_trials(deepcopy=False, states=finished)
        return next((trial for trial in known if trial.params == values), None)

    def _consistent(self, values: dict[str, Any]) -> bool:
        try:
            deployments.parse(override(self.raw, values), source="trial", base=Path.cwd())
        except deployments.DeploymentError:
            return False
        return True

    def best(self) -> FrozenTrial | None:
        complete = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return max(complete, key=lambda trial: trial.value or 0.0, default=None)

    def gained(self) -> int:
        """How many settings of the best trial are not those of the start."""
        best = self.best()
        return 0 if best is None else len(changes(self.start, best.params))

    def trial_seconds(self) -> float | None:
        """What a measured trial takes, in the median; None before there was one."""
        complete = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        taken = [
            trial.duration.total_seconds() for trial in complete if trial.duration and "figures" in trial.user_attrs
        ]
        return statistics.median(taken) if taken else None

    def record(self, trial: FrozenTrial) -> dict[str, Any]:
        """A trial as the JSON has it."""
        changed = changes(self.start, trial.params)
        states = {TrialState.COMPLETE: "measured", TrialState.PRUNED: "given up", TrialState.FAIL: "broken"}
        seconds = trial.duration.total_seconds() if trial.duration else None
        return {
            "trial": trial.number,
            "state": states.get(trial.state, "not run"),
            "changed": changed,
            "score": trial.value if trial.state == TrialState.COMPLETE else None,
            "seconds": None if seconds is None else round(seconds, 1),
            **{key: trial.user_attrs[key] for key in ("why", "figures") if key in trial.user_attrs},
        }

    def records(self) -> list[dict[str, Any]]:
        """Of all trials that were run."""
        ran = [trial for trial in self._study.trials if trial.state.is_finished()]
        return [self.record(trial) for trial in ran if trial.user_attrs.get("why") not in (TRIED, CONTRADICTORY)]


def _good_rate(best: FrozenTrial, step: int) -> float:
    """Tokens/s of a trial at a checkpoint, in good answers alone if there is an objective."""
    good = best.user_attrs["figures"]["good_percent"]
    return float(best.intermediate_values.get(step, 0.0)) * (1.0 if good is None else good / 100)


def changes(start: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {key: wanted for key, wanted in found.items() if wanted != start[key]}
