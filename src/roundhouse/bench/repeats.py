"""Several runs of the same thing: medians, and how sure they are."""

from __future__ import annotations

import math
import statistics
from typing import Any

# Student's t, two-sided 95 %, by degrees of freedom; beyond them it is the normal distribution's.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL = 1.96


def half_width(values: list[float]) -> float:
    """Of the 95 % confidence interval of the mean, if runs vary like a normal distribution. Needs two values."""
    freedom = len(values) - 1
    t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    return t * statistics.stdev(values) / math.sqrt(len(values))


def combine(runs: list[Any]) -> tuple[Any, Any]:
    """(medians, half widths) of every number in `runs`, which are dictionaries of one shape.

    Numbers that some run lacks are combined over those that have them; a half width needs two runs. What is no number
    is left out.
    """
    medians: dict[str, Any] = {}
    widths: dict[str, Any] = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        values = [run[key] for run in runs if run.get(key) is not None]
        if values and all(isinstance(value, dict) for value in values):
            medians[key], widths[key] = combine(values)
        elif values and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            medians[key] = round(statistics.median(values), 4)
            if len(values) > 1:
                widths[key] = round(half_width(values), 4)
    return medians, widths


def ratio(first: list[float], other: list[float]) -> tuple[float, float, float] | None:
    """`other` to `first`, and the ends of its 95 % confidence interval; run k of one belongs to run k of the other.

    The mean is geometric, so that the ratio the other way round is 1 / it. One pair alone has ends that are infinitely
    far apart. So have runs of which some gave nothing, which have no logarithm: their ratio is that of the medians.
    None, if there is none.
    """
    pairs = list(zip(first, other, strict=False))
    if not pairs or any(a <= 0 or b <= 0 for a, b in pairs):
        before, after = (statistics.median(values) if values else 0.0 for values in (first, other))
        return (after / before, 0.0, math.inf) if before > 0 and after > 0 else None
    logs = [math.log(b / a) for a, b in pairs]
    middle = statistics.fmean(logs)
    width = half_width(logs) if len(logs) > 1 else math.inf
    return math.exp(middle), math.exp(middle - width), math.exp(middle + width) if width < 700 else math.inf
