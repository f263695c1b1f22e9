"""Every answer is checked while things break: none lost without an error, mixed up, doubled or left open."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from roundhouse.bench.identity import Examiner, Tally, for_seconds
from tests.faults.conftest import Start
from tests.server.client import gauge, metrics, until
from tests.server.conftest import Server

pytestmark = pytest.mark.server
Examine = Callable[..., Examiner]
TRITONS = 3


def idle(server: Any) -> bool:
    return gauge(server, "active") == 0 and gauge(server, "used") == 0


def right(tally: Tally) -> None:
    assert tally.faults == 0, tally.examples
    assert tally.finished > 50


async def break_now_and_then(examiner: Examiner, break_it: Callable[[], None], times: int, every: float) -> Tally:
    """Load, with `break_it` called so many times, and two seconds behind the last."""
    going_on = True
    load = asyncio.create_task(examiner.run(lambda: going_on))
    for _ in range(times):
        await asyncio.sleep(every)
        await asyncio.to_thread(break_it)
    await asyncio.sleep(max(every, 3))
    going_on = False
    return await load


def stubs(server: Server, model: str) -> list[psutil.Process]:
    found = server.processes("triton_python_backend_stub")
    return [process for process in found if f"/{model}/1/model.py" in " ".join(process.cmdline())]


def test_random_cancels_and_sizes(start: Start, examiner: Examine) -> None:
    """On a server of its own, and on another if Triton 2.51 crashes, as it can where clients cancel."""
    for _ in range(TRITONS):
        server = start("--log-verbose")
        tally = asyncio.run(examiner(server, clients=48, cancelled=0.4).run(for_seconds(6)))
        right(tally)
        if tally.failed == 0:
            break
        assert server.process.wait(timeout=10) == 1, tally.errors
        assert "tritonserver was ended by SIG" in server.log.read_text()
    assert tally.failed == 0, tally.errors
    assert tally.cancelled > 20
    until(lambda: idle(server), 4, "idle")


def test_the_engine_is_killed_again_and_again(shared: Server, examiner: Examine) -> None:
    tally = asyncio.run(break_now_and_then(examiner(shared), lambda: shared.engine().kill(), 2, 2.5))
    right(tally)
    assert tally.failed > 20
    assert all("started again" in error for error in tally.errors), tally.errors
    until(lambda: idle(shared), 4, "idle")


def test_the_socket_is_removed(shared: Server, examiner: Examine) -> None:
    """Who is connected stays so; and the engine is to be found again when it is started anew."""
    from roundhouse.engine.runtime import SOCKET, runtime_dir

    (triton,) = [p for p in shared.processes("bin/tritonserver") if "stub" not in p.name()]
    path = runtime_dir(triton.pid) / SOCKET
    tally = asyncio.run(break_now_and_then(examiner(shared), path.unlink, 1, 1))
    right(tally)
    assert tally.failed == 0, tally.errors
    assert path.exists()


def test_the_engine_hangs_under_load(start: Start, examiner: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HANG_SECONDS", "1")
    server = start(engine={"kind": "synthetic", "tokens_per_second_per_sequence": 400, "hang_after_tokens": 8000})
    tally = asyncio.run(examiner(server).run(for_seconds(9)))
    right(tally)
    assert tally.failed > 20
    assert sum(value for name, value in metrics(server).items() if "engine_restarts" in name) >= 1


def test_a_front_is_killed(start: Start, examiner: Examine) -> None:
    """Triton leaves its clients waiting and cannot start it again, so the server drains and ends, with code 1."""
    server = start("--drain-seconds", "2")
    going_on = True

    async def load() -> Tally:
        nonlocal going_on
        task = asyncio.create_task(examiner(server, patience=15).run(lambda: going_on))
        await asyncio.sleep(2)
        for stub in stubs(server, "tensorrt_llm_bls"):
            stub.kill()
        until_then = time.monotonic() + 20
        while server.process.poll() is None and time.monotonic() < until_then:
            await asyncio.sleep(0.1)
        going_on = False
        return await task

    tally = asyncio.run(load())
    right(tally)
    assert server.process.poll() == 1


def test_sigterm_under_load_finishes_every_accepted_stream(start: Start, examiner: Examine) -> None:
    server = start()
    going_on = True
    made = examiner(server, tokens=(200, 400), clients=24, cancelled=0.1)

    async def load() -> Tally:
        nonlocal going_on
        task = asyncio.create_task(made.run(lambda: going_on))
        await asyncio.sleep(3)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        going_on = False
        return await task

    tally = asyncio.run(load())
    right(tally)
    assert all("stopping" in error for error in tally.errors), tally.errors
    assert server.process.wait(timeout=20) == 0


def test_the_engine_is_killed_while_the_server_drains(start: Start, examiner: Examine) -> None:
    server = start("--drain-seconds", "20")

    async def load() -> Tally:
        ends = time.monotonic() + 2
        task = asyncio.create_task(
            examiner(server, tokens=(800, 1200), clients=24, cancelled=0).run(lambda: time.monotonic() < ends)
        )
        await asyncio.sleep(2)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        server.engine().kill()
        return await task

    tally = asyncio.run(load())
    assert tally.faults == 0, tally.examples
    assert tally.failed > 10
    assert server.process.wait(timeout=20) == 0
