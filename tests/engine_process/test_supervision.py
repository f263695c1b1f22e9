"""Engine processes that die, hang or cannot be started, as their fronts see it. Answers are checked token by token."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from roundhouse.engine import keeper as keeping
from roundhouse.engine import runtime
from roundhouse.engine.base import EngineError
from roundhouse.engine.client import EngineMonitor
from roundhouse.engine.protocol import ErrorCode, FinishReason
from tests.engine_process.conftest import Join, Side, echo, request


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of silence is a hang, for the keeper here and for the engine process."""
    monkeypatch.setattr(keeping, "HANG_SECONDS", 1.0)
    monkeypatch.setenv("ROUNDHOUSE_HANG_SECONDS", "1")


def error_of(side: Side, id: int) -> str:
    error = side.got[id][-1].error
    assert error is not None
    assert error.code is ErrorCode.UNAVAILABLE
    return error.message


def test_killed_under_streams(join: Join) -> None:
    """Each open request ends with an error and what came before it is right; the next engine answers."""
    front = join()
    front.client.submit([request(id, prompt=(id, id + 1), max_tokens=500) for id in range(1, 9)])
    front.until(lambda: all(front.tokens(id) for id in range(1, 9)))
    front.engine().kill()
    assert front.until(lambda: all(front.ended(id) for id in range(1, 9))) < 1
    for id in range(1, 9):
        assert "send the request again" in error_of(front, id)
        assert front.tokens(id) == echo((id, id + 1), len(front.tokens(id)))
    front.client.submit([request(20)])
    front.until(lambda: front.ended(20))
    assert "not running" in error_of(front, 20)
    front.until(lambda: front.client.connected)
    assert front.ask(request(21)) == echo((5, 6, 7), 8)
    assert front.client.restarts == 1


def test_killed_while_it_loads_for_the_first_time(server: Any, join: Join) -> None:
    """That is a failure of the deployment, and final."""
    path = runtime.runtime_dir(server.pid) / runtime.PID

    def kill() -> None:
        while not path.exists():
            time.sleep(0.01)
        os.kill(int(path.read_text()), signal.SIGKILL)

    import threading

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(EngineError, match="ended by signal 9 while it was loading"):
        join(load_seconds=20)
    thread.join()


def test_an_interpreter_that_is_not_there(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDHOUSE_ENGINE_PYTHON", "/nope")
    with pytest.raises(EngineError, match=r"could not be started \(ROUNDHOUSE_ENGINE_PYTHON: /nope does not exist"):
        join()


def test_killed_while_it_loads_again(join: Join) -> None:
    front = join()
    first = front.engine()
    first.kill()
    front.until(lambda: runtime.read(front.folder / runtime.PID) != str(first.pid))
    front.engine().kill()
    front.until(lambda: front.client.restarts == 2)
    front.until(lambda: front.client.connected)
    assert front.ask(request(1)) == echo((5, 6, 7), 8)


@pytest.mark.usefixtures("impatient")
def test_a_step_that_never_returns(join: Join, capsys: pytest.CaptureFixture[str]) -> None:
    front = join(hang_after_tokens=20)
    front.client.submit([request(1, max_tokens=500)])
    assert 0.9 < front.until(lambda: front.ended(1)) < 4
    advice = "if it was only slow, lower limits.max_num_tokens, or raise ROUNDHOUSE_HANG_SECONDS"
    assert advice in capsys.readouterr().out
    assert front.tokens(1) == echo((5, 6, 7), 20)
    assert "send the request again" in error_of(front, 1)
    front.until(lambda: front.client.connected)
    assert front.ask(request(2)) == echo((5, 6, 7), 8)


@pytest.mark.usefixtures("impatient")
def test_silence_counts_only_while_the_keeper_itself_runs(join: Join) -> None:
    """A container that is frozen, or a machine that sleeps, stops both sides: that is no hang."""
    front = join()
    engine = front.engine()
    engine.suspend()
    time.sleep(2)  # and no poll: the front is stopped too
    front.poll()
    engine.resume()
    front.poll(0.5)
    assert front.ask(request(1)) == echo((5, 6, 7), 8)
    assert front.client.restarts == 0
    engine.suspend()
    assert 0.9 < front.until(lambda: front.client.restarts == 1) < 4


def test_the_keeper_dies_and_another_front_takes_over(join: Join) -> None:
    first, second = join("first"), join("second")
    engine = second.engine()
    second.client.submit([request(1, max_tokens=100)])
    first.close()
    second.until(lambda: second.ended(1))
    assert second.tokens(1) == echo((5, 6, 7), 100)
    assert second.engine() == engine
    engine.kill()
    second.until(lambda: second.client.restarts == 1)
    second.until(lambda: second.client.connected)
    assert second.ask(request(2)) == echo((5, 6, 7), 8)


def test_the_keeper_and_the_engine_die_together(join: Join) -> None:
    """Nobody is left who saw it; the front that takes over must not take it for a failure of the deployment."""
    first, second = join("first"), join("second")
    engine = second.engine()
    engine.suspend()
    first.close()
    engine.kill()
    second.until(lambda: not second.client.connected)
    second.until(lambda: second.client.connected)
    assert second.ask(request(1)) == echo((5, 6, 7), 8)
    second.engine().kill()
    second.until(lambda: second.client.restarts == 1)
    second.until(lambda: second.client.connected)
    assert second.ask(request(2)) == echo((5, 6, 7), 8)


def test_a_full_disk_delays_the_restart(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    front = join()
    write = runtime.write_private

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runtime, "write_private", full)
    front.engine().kill()
    front.until(lambda: front.client.restarts >= 2)
    front.client.submit([request(1)])
    front.until(lambda: front.ended(1))
    assert "not running" in error_of(front, 1)
    monkeypatch.setattr(runtime, "write_private", write)
    front.until(lambda: front.client.connected)
    assert front.ask(request(2)) == echo((5, 6, 7), 8)


def test_a_disk_that_is_full_from_the_start(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runtime, "write_private", full)
    with pytest.raises(EngineError, match="No space left"):
        join()


def test_failures_in_a_row_end_the_server(
    server: subprocess.Popen[bytes], join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_FAILURES", 2)
    front = join(crash_after_tokens=5)
    for id in (1, 2):
        front.until(lambda: front.client.connected)
        front.client.submit([request(id, max_tokens=50)])
        front.until(lambda id=id: front.ended(id))
    front.poll(0.2)
    assert server.wait(timeout=5) == -signal.SIGTERM


def test_a_hanging_engine_does_not_outlive_its_server(server: subprocess.Popen[bytes], join: Join) -> None:
    front = join(hang_after_tokens=5)
    engine = front.engine()
    front.client.submit([request(1, max_tokens=50)])
    front.until(lambda: len(front.tokens(1)) == 5)
    server.kill()
    try:
        engine.wait(timeout=15)
    except psutil.TimeoutExpired:
        pytest.fail("it is still there")
    assert not front.folder.exists()


class TestDeadlines:
    def test_a_request_that_expires_in_the_queue_is_not_computed(self, join: Join) -> None:
        front = join()
        soon = time.monotonic_ns() + 300_000_000
        front.client.submit([request(id, max_tokens=500) for id in range(1, 9)])  # all slots
        front.client.submit([request(9, deadline_ns=soon)])
        front.until(lambda: front.ended(9))
        last = front.got[9][-1]
        assert last.finish_reason is FinishReason.TIMEOUT
        assert not front.tokens(9)
        assert last.perf is not None
        assert last.perf.first_scheduled_ns == 0
        assert time.monotonic_ns() - soon < 200_000_000

    def test_a_request_that_expires_while_it_runs_keeps_what_it_has(self, join: Join) -> None:
        front = join()
        front.client.submit([request(1, max_tokens=500, deadline_ns=time.monotonic_ns() + 300_000_000)])
        front.until(lambda: front.ended(1))
        assert front.got[1][-1].finish_reason is FinishReason.TIMEOUT
        assert 20 < len(front.tokens(1)) < 100
        assert front.tokens(1) == echo((5, 6, 7), len(front.tokens(1)))


def test_the_monitor_takes_a_silent_engine_for_busy(server: subprocess.Popen[bytes], join: Join) -> None:
    """A step may take seconds; a drain must not end meanwhile."""
    front = join()
    monitor = EngineMonitor(server.pid)
    front.until(monitor.idle)
    engine = front.engine()
    engine.suspend()
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        monitor.idle()
        time.sleep(0.05)
    assert not monitor.idle()
    engine.resume()
    front.until(monitor.idle)
    engine.kill()
    engine.wait(timeout=5)
    front.until(monitor.idle, 3)  # between its end and the restart there is none
    monitor.close()
