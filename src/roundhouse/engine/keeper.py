"""The keeper: whoever of the fronts holds the lock starts the engine process, watches it, and starts it again.

All fronts try for the lock. If the keeper's process dies, another takes over with the engine that is running.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from roundhouse.engine import runtime

BACK_OFF = 0.2  # seconds before the first restart; doubles
MAX_BACK_OFF = 10.0
MAX_FAILURES = 5  # in a row, before the server is given up
HEALTHY_SECONDS = 60.0  # after which failures are forgotten
HANG_SECONDS = float(os.environ.get("ROUNDHOUSE_HANG_SECONDS", "30"))


class Keeper:
    def __init__(self, deployment: Path, folder: Path, server_pid: int, log: Callable[[str], None]) -> None:
        self._deployment = deployment
        self._folder = folder
        self._server_pid = server_pid
        self._log = log
        self._lock = os.open(folder / runtime.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._holder = False
        self._process: subprocess.Popen[bytes] | None = None  # None: adopted from another keeper
        self._pidfd: int | None = None
        self._failures = 0
        self._started = 0.0
        self._start_at = 0.0
        self.restarts = 0
        self.was_ready = False  # an engine has been ready at some time

    def tend(self, heard: float | None) -> None:
        """Do what is due. `heard`: when the engine last said something, None while it is not ready."""
        if not self._holder and not self._take_over():
            return
        now = time.monotonic()
        if self._pidfd is None:
            if now >= self._start_at and self._failures < MAX_FAILURES:
                self._start()
            return
        if heard is not None:
            self.was_ready = True
            if now - self._started > HEALTHY_SECONDS:
                self._failures = 0
            if now - heard > HANG_SECONDS:
                self._log(f"engine: has said nothing for {HANG_SECONDS:.0f} s; it is killed and started again")
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                time.sleep(0.05)  # it may take a moment to die
        if self._ended():
            self._failed(now)

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
        os.close(self._lock)

    def _take_over(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._holder = True
        self._started = time.monotonic()
        pid = runtime.read(self._folder / runtime.PID)
        if pid and _is_host(int(pid), self._folder):
            with suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(int(pid))
        return True

    def _start(self) -> None:
        (self._folder / runtime.FAILURE).unlink(missing_ok=True)
        runtime.new_secret(self._folder)
        command = [_python(), "-m", "roundhouse.engine.host", "--deployment", str(self._deployment)]
        command += ["--folder", str(self._folder), "--server-pid", str(self._server_pid)]
        self._process = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.DEVNULL, start_new_session=True, cwd="/"
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._started = time.monotonic()
        runtime.write_private(self._folder / runtime.PID, str(self._process.pid))

    def _ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        assert self._pidfd is not None
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, 0)
            return False
        return True

    def _failed(self, now: float) -> None:
        assert self._pidfd is not None
        os.close(self._pidfd)
        code = self._process.returncode if self._process is not None else None
        self._process, self._pidfd = None, None
        how = "for an unknown reason" if code is None else f"by signal {-code}" if code < 0 else f"with code {code}"
        if not self.was_ready:
            if not (self._folder / runtime.FAILURE).exists():
                text = f"the engine process ended {how} while it was loading; its last words are in the server's log"
                runtime.write_private(self._folder / runtime.FAILURE, text)
            self._failures = MAX_FAILURES
            return
        wait = min(BACK_OFF * 2**self._failures, MAX_BACK_OFF)
        self._failures += 1
        self._start_at = now + wait
        if self._failures >= MAX_FAILURES:
            self._log(f"engine: ended {how}, {self._failures} times in a row: the server is stopped")
            os.kill(self._server_pid, signal.SIGTERM)
            return
        self.restarts += 1
        self._log(f"engine: ended {how}; it is started again in {wait:.1f} s")


def _is_host(pid: int, folder: Path) -> bool:
    with suppress(OSError):
        return str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def _python() -> str:
    """The interpreter of the engine: ROUNDHOUSE_ENGINE_PYTHON, or that of the virtual environment.

    In Triton's stub `sys.executable` is not the interpreter's.
    """
    given = os.environ.get("ROUNDHOUSE_ENGINE_PYTHON")
    if given:
        return given
    prefix = os.environ.get("VIRTUAL_ENV") or sys.prefix
    return str(Path(prefix) / "bin/python")


def _environment() -> dict[str, str]:
    """Ours, without the libraries that are meant for Triton alone."""
    environment = dict(os.environ)
    paths = environment.get("LD_LIBRARY_PATH", "").split(":")
    kept = [path for path in paths if path and "nvidia_pytriton.libs" not in path]
    environment["LD_LIBRARY_PATH"] = ":".join(kept)
    return environment
