"""The parts of scripts/bench_path.py that need no server."""

from __future__ import annotations

import argparse
from typing import Any

import bench_path
import pytest


class EnoughError(Exception):
    """What is to be seen has been seen."""


def test_the_engine_alone_makes_answers_as_long_as_those_behind_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def alone(texts: list[str], streams: int, seconds: float, max_tokens: int) -> dict[str, float]:
        asked.append(max_tokens)
        return {}

    def running(*_: Any) -> Any:
        raise EnoughError

    monkeypatch.setattr(bench_path, "prompt_texts", lambda count, seed: ["hello"])
    monkeypatch.setattr(bench_path, "alone", alone)
    monkeypatch.setattr(bench_path, "running", running)
    with pytest.raises(EnoughError):
        bench_path.embedded(argparse.Namespace(repeats=1, seconds=1.0, max_tokens=7, responses_per_second=250))
    assert asked == [7, 7]
