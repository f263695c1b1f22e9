"""What can be tuned: the keys of a deployment that change its speed, and the values that are worth a try."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from roundhouse import deployment as deployments
from roundhouse import plan as planning
from roundhouse.bench.scenario import Closed, Level
from roundhouse.deployment import Deployment

PATHS = (
    "model.path",
    "model.tokenizer",
    "engine.path",
    "engine.lora",
    "speculative.draft_model",
    "speculative.draft_engine",
)
BATCHES = (4, 8, 16, 32, 64, 128, 256)
FEW_STREAMS = 64  # up to here speculation tends to matter more than anything else
MEMORY_SHARE = 0.7  # of the memory that is free, for the KV cache of an engine without a GPU


class DoesNotFitError(Exception):
    """A deployment would not fit into memory. The message says what does."""


@dataclass(frozen=True)
class Knob:
    """A key of the deployment file, and its values; None: the key is left out."""

    key: str
    values: tuple[Any, ...]

    def steps(self, now: Any) -> list[Any]:
        """Half of the way from one of the values to the first of them and to the last, where there is a way."""
        at, last = self.values.index(now), len(self.values) - 1
        down = at - max(1, at // 2)
        up = at + max(1, (last - at) // 2)
        return [self.values[index] for index in (up, down) if 0 <= index <= last]


def knobs(deployment: Deployment, level: Level) -> list[Knob]:
    """The knobs of this deployment's engine, those first that tend to matter most.

    The value that the deployment has now is always among a knob's values. Values that are the same as another under
    this load are left out.
    """
    found: list[Knob] = []
    compiled = deployment.engine.kind == "tensorrt_llm"  # it has its limits fixed; each value would need a build
    if not compiled:
        found += [
            Knob("limits.max_batch_size", _batches(deployment.limits.max_batch_size, level)),
            Knob("limits.max_num_tokens", (256, 512, 1024, 2048, 4096, 8192)),
        ]
    found += _ENGINES[deployment.engine.kind]
    speculation = list(_SPECULATION.get(deployment.engine.kind, ()))
    if deployment.speculative is not None:
        speculation.append(Knob("speculative.draft_tokens", (2, 3, 5, 8)))
    few = isinstance(level, Closed) and level.streams <= FEW_STREAMS
    found = [*speculation, *found] if few else [*found, *speculation]
    found += [Knob("kv_cache.reuse", (True, False)), Knob("scheduling.chunked_prefill", (True, False))]
    if not compiled:
        found.append(Knob("kv_cache.tokens_per_block", (16, 32, 64)))
    found.append(Knob("fronts.responses_per_second", (250, 500, 1000, 2000, 4000)))
    if (os.cpu_count() or 1) >= 4:
        found += [Knob("fronts.tensorrt_llm", (1, 2, 4)), Knob("fronts.preprocessing", (1, 2, 4))]
    return [_with_current(knob, value(deployment, knob.key)) for knob in found]


def _batches(now: int, level: Level) -> tuple[int, ...]:
    """Of the batches that hold all streams of a closed loop, one: what it has now, or the smallest."""
    if not isinstance(level, Closed):
        return BATCHES
    whole = [batch for batch in (now, *BATCHES) if batch >= level.streams]
    return tuple(batch for batch in BATCHES if batch < level.streams) + tuple(whole[:1])


_SPECULATION: dict[str, tuple[Knob, ...]] = {"vllm": (Knob("engine.ngram.draft_tokens", (None, 3, 5)),)}
_ENGINES: dict[str, tuple[Knob, ...]] = {
    "synthetic": (),
    "transformers": (Knob("precision.kv_cache", ("auto", "bfloat16")),),
    "tensorrt_llm": (
        Knob("kv_cache.free_memory_fraction", (0.8, 0.9, 0.95)),
        Knob("scheduling.policy", ("guaranteed_no_evict", "max_utilization")),
    ),
    "vllm": (
        Knob("precision.kv_cache", ("auto", "fp8")),
        Knob("engine.memory_fraction", (0.8, 0.9, 0.94)),
    ),
}


def _with_current(knob: Knob, now: Any) -> Knob:
    if now in knob.values:
        return knob
    below = 0
    if isinstance(now, int | float):
        below = sum(known is None or known < now for known in knob.values)
    return Knob(knob.key, (*knob.values[:below], now, *knob.values[below:]))


def value(deployment: Deployment, key: str) -> Any:
    """What stands at a key path; None where it or a section of it is absent."""
    at: Any = deployment
    for part in key.split("."):
        at = getattr(at, part, None)
    return at


def override(raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a parsed deployment file with other values. None takes a key away, and a section that is then empty."""
    changed = copy.deepcopy(raw)
    for key, wanted in values.items():
        *sections, last = key.split(".")
        path = [changed]
        for section in sections:
            path.append(path[-1].setdefault(section, {}))
        if wanted is not None:
            path[-1][last] = wanted
            continue
        path[-1].pop(last, None)
        for parent, section in reversed(list(zip(path, sections, strict=False))):
            if not parent[section]:
                del parent[section]
    return changed


def read(path: Path) -> dict[str, Any]:
    """The file as it stands, its paths made absolute. Raises DeploymentError."""
    parsed = deployments.load(path)
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = {key for key in PATHS if _has(raw, key)}
    return override(raw, {key: value(parsed, key) for key in given})


def relative_to(raw: dict[str, Any], folder: Path, source: Path) -> dict[str, Any]:
    """What was read from `source`, as a file in `folder` says it. A path that is absolute there stays so."""
    written = yaml.safe_load(source.read_text(encoding="utf-8"))
    return override(raw, {key: _moved(_get(raw, key), _get(written, key), folder) for key in PATHS if _has(raw, key)})


def _moved(path: Any, written: Any, folder: Path) -> Any:
    """`path`, or each of a mapping's, as seen from `folder`, unless it was written as an absolute one."""
    if isinstance(path, dict):
        return {key: _moved(path[key], written[key], folder) for key in path}
    return path if Path(written).is_absolute() else os.path.relpath(path, folder)


def _has(raw: dict[str, Any], key: str) -> bool:
    return _get(raw, key) is not None


def _get(raw: Any, key: str) -> Any:
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def check_fits(deployment: Deployment) -> None:
    """Asks the memory planner, before anything is started. Raises DoesNotFitError."""
    if deployment.gpu is not None:
        try:
            planning.plan(deployment)
        except planning.PlanError as error:
            raise DoesNotFitError(str(error)) from error
        return
    if deployment.engine.kind != "transformers" or deployment.limits.max_seq_len is None:
        return
    try:
        shape = planning.Shape.read(Path(deployment.model.path))
    except planning.PlanError:
        return  # not Llama-like: the engine will tell
    tokens = deployment.kv_cache.tokens or deployment.limits.max_batch_size * deployment.limits.max_seq_len
    precision = "bfloat16" if deployment.precision.kv_cache == "bfloat16" else "float32"
    needed, free = tokens * shape.kv_bytes_per_token(precision), psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise DoesNotFitError(
            f"a KV cache of {tokens:,} tokens takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
