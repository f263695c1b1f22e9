"""Environment variables that override a deployment file, by the names that servers of tensorrtllm_backend know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError("must be true or false")
    return text.lower() in ("true", "1")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError("must be a whole number from 1 up")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ValueError("must be a number between 0 and 1")
    return value


def _policy(text: str) -> str:
    if text not in ("guaranteed_no_evict", "max_utilization"):
        raise ValueError("must be guaranteed_no_evict or max_utilization")
    return text


# Name -> section and key of the deployment, and how the text is read.
VARIABLES: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "DECOUPLED_MODE": ("serving", "decoupled", _flag),
    "BATCH_SCHEDULER_POLICY": ("scheduling", "policy", _policy),
    "MAX_BATCH_SIZE": ("limits", "max_batch_size", _count),
    "ENABLE_KV_CACHE_REUSE": ("kv_cache", "reuse", _flag),
    "KV_CACHE_FREE_GPU_MEM_FRACTION": ("kv_cache", "free_memory_fraction", _fraction),
}


def overridden(raw: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A parsed deployment file with what the environment sets, and the names of the variables that did. Pure.

    A variable that is empty is not set. Raises ValueError, naming the variable, for a value that cannot be.
    """
    result, used = dict(raw), []
    for name, (section, key, read) in VARIABLES.items():
        text = environment.get(name, "").strip()
        if not text:
            continue
        try:
            value = read(text)
        except ValueError as error:
            raise ValueError(f"environment variable {name}: {text!r} is not allowed; it {error}") from None
        if isinstance(result.get(section) or {}, Mapping):  # else the schema has something to say about it
            result[section] = {**(result.get(section) or {}), key: value}
            used.append(name)
    return result, used
