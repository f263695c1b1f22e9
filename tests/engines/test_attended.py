"""Waiting for a step of vLLM's, on doubles of its executor."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from roundhouse.engine.vllm.attended import attend


class Output:
    """What a GPU will have sampled. `name`: of the event, which happens at the third look."""

    def __init__(self, name: str) -> None:
        setattr(self, name, SimpleNamespace(query=self.query))
        self.looks = 0

    def query(self) -> bool:
        self.looks += 1
        return self.looks > 2


def executor(async_output: Output | None) -> Any:
    future: Any = Future()
    future.set_result("tokens")
    if async_output is not None:
        future.async_output = async_output
    return SimpleNamespace(sample_tokens=lambda grammar, non_block=False: future if non_block else grammar)


@pytest.mark.parametrize("event", ["copy_event", "async_copy_ready_event"])
def test_whoever_waits_looks_after_others(event: str) -> None:
    called: list[int] = []
    one = executor(Output(event))
    attend(one, lambda: called.append(1))
    future = one.sample_tokens("grammar", non_block=True)
    assert called == []
    assert future.result() == "tokens"
    assert called == [1, 1]


def test_a_result_that_is_there_is_not_waited_for() -> None:
    called: list[int] = []
    one = executor(None)
    attend(one, lambda: called.append(1))
    assert one.sample_tokens("grammar", non_block=True).result() == "tokens"
    assert one.sample_tokens("grammar") == "grammar"
    assert called == []
