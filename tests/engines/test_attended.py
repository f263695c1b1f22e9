"""Waiting for a step of vLLM's, on doubles of its executor."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from roundhouse.engine.vllm import attended


class Output:
    """What a GPU will have sampled. `name`: of the event, which happens at the third look."""

    def __init__(self, name: str) -> None:
        setattr(self, name, SimpleNamespace(query=self.query))
        self.looks = 0

    def query(self) -> bool:
        self.looks += 1
        return self.looks > 2


class Executor:
    """Each step blocks for `seconds` once its tokens are there, as the first wait for a GPU does."""

    def __init__(self, seconds: float, event: str = "copy_event") -> None:
        self.seconds = seconds
        self.event = event

    def sample_tokens(self, grammar: str, non_block: bool) -> Any:
        return SimpleNamespace(result=self.block, async_output=Output(self.event))

    def block(self) -> str:
        time.sleep(self.seconds)
        return "tokens"


@pytest.mark.parametrize("event", ["copy_event", "async_copy_ready_event"])
def test_whoever_waits_long_looks_after_others(event: str) -> None:
    called: list[int] = []
    executor = Executor(2 * attended.LONG_SECONDS, event)
    attended.attend(executor, lambda: called.append(1))
    first, second = (executor.sample_tokens("grammar", non_block=True) for _ in range(2))
    assert first.result() == "tokens"
    assert called == [], "it was not known yet how long a step takes"
    assert second.result() == "tokens"
    assert called == [1, 1]


def test_short_waits_are_not_made_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attended, "LONG_SECONDS", 0.5)  # even on a machine that is busy, these are short
    called: list[int] = []
    executor = Executor(0.0)
    attended.attend(executor, lambda: called.append(1))
    for _ in range(3):
        assert executor.sample_tokens("grammar", non_block=True).result() == "tokens"
    assert called == []


def test_a_result_that_is_there_is_not_waited_for() -> None:
    future: Future[str] = Future()
    future.set_result("tokens")
    executor = SimpleNamespace(sample_tokens=lambda grammar, non_block: future)
    attended.attend(executor, lambda: pytest.fail("there was nothing to wait for"))
    assert executor.sample_tokens("grammar", non_block=True) is future
