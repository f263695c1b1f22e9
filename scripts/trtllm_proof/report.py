"""What the proof found: JSON for machines, and the same as a page. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Stage:
    """One thing that was tried. `details`: what a reader wants first. `log`: name of a file beside the report."""

    name: str
    outcome: Outcome
    seconds: float
    details: Sequence[str] = ()
    log: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def verdict(stages: Sequence[Stage], *, quick: bool, stand_in: bool) -> str:
    """proven: everything ran on the real thing and passed."""
    if any(stage.outcome == "failed" for stage in stages):
        return "failed"
    if stand_in:
        return "stand-in"
    return "incomplete" if quick or any(stage.outcome == "skipped" for stage in stages) else "proven"


def as_json(environment: dict[str, str], stages: Sequence[Stage], result: str) -> dict[str, Any]:
    return {"verdict": result, "environment": environment, "stages": [asdict(stage) for stage in stages]}


MEANINGS = {
    "proven": "Everything ran, on TensorRT-LLM itself, and passed.",
    "failed": "Something failed; see below.",
    "incomplete": "What ran has passed, but not everything ran.",
    "stand-in": "This ran over the stand-ins of `tests/doubles`: it proves the script, and nothing of TensorRT-LLM.",
}


def as_markdown(environment: dict[str, str], stages: Sequence[Stage], result: str) -> str:
    lines = [f"# TensorRT-LLM: {result}", "", MEANINGS[result], "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in environment.items()]
    lines += ["", "| stage | outcome | seconds | |", "|---|---|---|---|"]
    for stage in stages:
        first = stage.details[0] if stage.details else ""
        lines.append(f"| {stage.name} | {stage.outcome} | {stage.seconds:.0f} | {_cell(first)} |")
    for stage in stages:
        if len(stage.details) > 1:
            log = f" (`{stage.log}`)" if stage.log else ""
            lines += ["", f"## {stage.name}{log}", "", *(f"- {_cell(detail)}" for detail in stage.details)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
