"""After the search: which of the new settings matter, and how much better they are than the old ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from roundhouse.bench import repeats
from roundhouse.tune.search import WORTH, Attempt, changes
from roundhouse.tune.space import override
from roundhouse.tune.trials import Bench, BrokenError, Clock

Values = dict[str, Any]
NEAR = (0.97, 1.15)  # a factor between these may come from noise alone: one pair of runs does not tell


@dataclass(frozen=True)
class Effect:
    """What one setting brought: `factor` is the score with it, over the score without; None: without it nothing ran."""

    key: str
    before: Any
    after: Any
    factor: float | None
    kept: bool

    def line(self) -> str:
        change = f"{self.key}: {_said(self.before)} -> {_said(self.after)}"
        if self.factor is None:
            return f"{change}: without it the server does not run"
        if self.kept:
            return f"{change}: without it the score falls to {100 / self.factor:.0f} %"
        less = f"{100 * (WORTH - 1):.0f} %"
        return f"{change}: brings less than {less} ({self.factor:.2f} x), so it stays {_said(self.before)}"


def _said(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def settle(
    raw: dict[str, Any], start: Values, found: Values, score: float, bench: Bench, clock: Clock, reserve: float,
    attempt: Attempt, told: Callable[[Effect], None],
) -> tuple[Values, list[Effect]]:  # fmt: skip
    """Take back one new setting after the other, and leave it so where that costs nothing.

    Where a factor is near to 1, the pair is measured once more if that leaves time for the other settings, and the
    means count. Returns what is left of the new settings, and what each brought. Stops when only `reserve` seconds are
    left: settings that were not looked at by then stay new.
    """

    def measured(values: Values) -> float:
        return bench.score(attempt(override(raw, values), bench, lambda step, rate: None))

    new = changes(start, found)
    kept, effects = new, []
    with suppress(BrokenError):  # measured anew: the best of a search is the luckiest of its trials, too
        score = measured(kept)
    for done, key in enumerate(new):
        if (before := clock.left) < reserve:
            break
        less = {other: wanted for other, wanted in kept.items() if other != key}
        try:
            without = measured(less)
        except BrokenError:
            effects.append(Effect(key, start[key], kept[key], None, kept=True))
        else:
            needed = (len(new) - done + 1) * (before - clock.left)
            if NEAR[0] <= _factor(score, without) <= NEAR[1] and clock.left - needed >= reserve:
                with suppress(BrokenError):
                    score, without = (score + measured(kept)) / 2, (without + measured(less)) / 2
            factor = _factor(score, without)
            effects.append(Effect(key, start[key], kept[key], round(factor, 3), kept=factor >= WORTH))
            if factor < WORTH:
                kept, score = less, without
        told(effects[-1])
    return kept, effects


def _factor(score: float, without: float) -> float:
    return min(score / without, 1e6) if without > 0 else 1e6


def gains(result: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """For each load of the confirmation: how much better the tuned deployment is, with its 95 % interval."""
    start, tuned = (target["name"] for target in result["targets"])
    cells = {(cell["target"], cell["level"]): cell for cell in result["results"]}
    found = []
    for level in dict.fromkeys(cell["level"] for cell in result["results"]):
        before, after = cells[start, level], cells[tuned, level]
        gain = repeats.ratio([run[key] or 0.0 for run in before["runs"]], [run[key] or 0.0 for run in after["runs"]])
        found.append({
            "level": level,
            "start": before["median"].get(key),
            "tuned": after["median"].get(key),
            "ratio": None if gain is None else round(gain[0], 3),
            "from": None if gain is None or gain[1] <= 0 else round(gain[1], 3),
            "to": None if gain is None or gain[2] > 1e6 else round(gain[2], 3),
        })  # fmt: skip
    return found


def advice(
    found: list[Effect], gained: list[dict[str, Any]], records: list[dict[str, Any]], what: str
) -> Iterator[str]:
    """In plain words: what was gained where, what each setting brought, what did not work."""
    for gain in gained:
        yield _gain_line(gain, what)
    yield from (effect.line() for effect in sorted(found, key=lambda effect: -(effect.factor or float("inf"))))
    better = [gain["level"] for gain in gained if _pays(gain)]
    unsure = [gain["level"] for gain in gained if gain["ratio"] and not _pays(gain) and (gain["to"] or 1) >= 1]
    if unsure:
        yield (
            f"not proven at {', '.join(unsure)}: the 95 % interval includes 1 (that of a single pair has no ends), so "
            "the tuned file may be no better there; measure again with more --repeats, and the --minutes for them"
        )
    if found and len(better) < len(gained) and len(unsure) < len(gained):
        where = ", ".join(better) or "none of the loads that were compared"
        yield f"the new settings pay at {where}; with another load, tune again"
    broken = [record for record in records if record["state"] == "broken"]
    reasons = dict.fromkeys(str(record.get("why", "tune was ended in the middle of it")) for record in broken)
    yield from (f"did not work: {reason.splitlines()[0]}" for reason in list(reasons)[:5])


def _pays(gain: dict[str, Any]) -> bool:
    """Whether the gain is proven: the whole interval lies above 1, or there was nothing at all before."""
    if gain["ratio"] is None:
        return (gain["tuned"] or 0.0) > (gain["start"] or 0.0)
    return gain["from"] is not None and bool(gain["from"] > 1)


def _gain_line(gain: dict[str, Any], what: str) -> str:
    level, before, after = gain["level"], gain["start"], gain["tuned"]
    if gain["ratio"] is None:
        return f"{level}: {what} {before} before, {after} tuned"
    sure = f" (95 %: {gain['from']} to {gain['to']})" if gain["from"] and gain["to"] else ""
    return f"{level}: {what} {before:.2f} before, {after:.2f} tuned: {gain['ratio']:.2f} x{sure}"


def as_json(found: list[Effect]) -> list[dict[str, Any]]:
    return [asdict(effect) for effect in found]
