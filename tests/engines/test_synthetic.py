"""The synthetic engine: its rate, its checkable answers, its faults."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from roundhouse.engine.base import EngineError
from roundhouse.engine.protocol import Sampling
from roundhouse.engine.synthetic import SyntheticConfig, SyntheticEngine
from tests.engines.conftest import GREEDY, drain, prompt, request, run_one


def build(**settings: object) -> SyntheticEngine:
    return SyntheticEngine(SyntheticConfig(vocab_size=256, **settings))  # type: ignore[arg-type]


def test_the_answer_is_the_prompt_over_and_over() -> None:
    answer = run_one(build(), request(1, prompt=(5, 6, 7), max_tokens=8, log_probs=True))
    assert answer.tokens == [5, 6, 7, 5, 6, 7, 5, 6]
    assert answer.log_probs == [0.0] * 8


def test_sampled_answers_take_their_tokens_from_the_prompt() -> None:
    answer = run_one(build(), request(1, prompt=(5, 6), max_tokens=50, sampling=Sampling(seed=1), log_probs=True))
    assert set(answer.tokens) == {5, 6}
    assert answer.log_probs == pytest.approx([-0.6931] * 50, abs=1e-4)


@pytest.mark.parametrize(("streams", "rate"), [(64, 4000), (1, 200)])
def test_total_rate(streams: int, rate: int) -> None:
    engine = build(tokens_per_second=float(rate))
    for i in range(streams):
        engine.submit(request(i, max_tokens=rate // streams // 2))
    start = time.monotonic()
    drain(engine)
    assert 0.49 <= time.monotonic() - start < 0.65


def test_rate_of_each_sequence() -> None:
    engine = build(tokens_per_second_per_sequence=100.0)
    for i in range(8):
        engine.submit(request(i, max_tokens=30))
    start, cpu = time.monotonic(), time.process_time()
    drain(engine)
    assert 0.29 <= time.monotonic() - start < 0.4
    assert time.process_time() - cpu < 0.1, "it must sleep, not spin"


def test_a_late_engine_catches_up_without_a_burst() -> None:
    engine = build(tokens_per_second_per_sequence=100.0)
    engine.submit(request(1, max_tokens=100))
    engine.step()
    time.sleep(0.2)
    start = time.monotonic()
    at_once = 0
    while time.monotonic() - start < 0.005:
        at_once += len(engine.step())
    assert at_once <= 4


def test_the_first_token_after_a_pause_is_alone() -> None:
    engine = build(tokens_per_second_per_sequence=50.0)
    run_one(engine, request(1, max_tokens=2))
    time.sleep(0.1)
    start = time.monotonic()
    run_one(engine, request(2, max_tokens=3))
    assert time.monotonic() - start >= 0.055


def test_fail_load() -> None:
    with pytest.raises(EngineError, match="no such weights"):
        build(fail_load="no such weights")


def test_load_seconds() -> None:
    start = time.monotonic()
    build(load_seconds=0.1)
    assert time.monotonic() - start >= 0.1


FAULT = """
import sys
from roundhouse.engine.protocol import Request, Sampling
from roundhouse.engine.synthetic import SyntheticConfig, SyntheticEngine
engine = SyntheticEngine(SyntheticConfig(vocab_size=256, **{sys.argv[1]: 5}))
engine.submit(Request(1, (3, 4), 50, sampling=Sampling(temperature=0.0)))
while engine.unfinished():
    for output in engine.step():
        print(*output.tokens, flush=True)
"""


def test_crash_after_tokens() -> None:
    result = subprocess.run([sys.executable, "-c", FAULT, "crash_after_tokens"], capture_output=True, timeout=30)
    assert result.returncode == -signal.SIGKILL
    assert result.stdout.split() == [b"3", b"4", b"3", b"4", b"3"]


def test_hang_after_tokens() -> None:
    with subprocess.Popen([sys.executable, "-c", FAULT, "hang_after_tokens"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(5)] == [b"3", b"4", b"3", b"4", b"3"]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.kill()


def test_prompts_outlive_nothing() -> None:
    engine = build()
    run_one(engine, request(1, prompt=prompt(1), sampling=Sampling()))
    engine.submit(request(2, sampling=Sampling()))
    engine.cancel(2)
    drain(engine)
    assert engine._seeds == {}
    assert run_one(engine, request(2, sampling=GREEDY)).tokens == list(prompt(2)[:8])
