"""The keeper: whoever of the fronts holds the lock starts the engine process, watches it, and starts it again.

All fronts try for the lock. If the keeper's process dies, another takes over with the engine that is running.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from roundhouse import deployment as deployments
from roundhouse.engine import launch, runtime
from roundhouse.engine.runtime import HANG_SECONDS

BACK_OFF = 0.2  # seconds before the first restart; doubles
MAX_BACK_OFF = 10.0
MAX_FAILURES = 5  # in a row, before the server is given up
HEALTHY_SECONDS = 60.0  # after which failures are forgotten
RELOADS = 5  # loading again may take so many times as long as the first time, and HANG_SECONDS
DYING_SECONDS = 30.0  # a killed process that is still there then hangs in the kernel: only a new container helps
LONGEST_TURN = 1.0  # of the silence between two looks; what is longer was our own: stopped, or the machine slept


class Keeper:
    """Attributes:
    restarts: of the engine, by this keeper.
    was_ready: the engine has been ready at some time; until then a failure is one of the deployment, and final.
    failure: why the engine cannot be started, if so.
    """

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
        self._killed_at: float | None = None
        self._load_seconds: float | None = None  # what loading took, if it was seen from start to end
        self._heard = 0.0
        self._tended = 0.0
        self._silence = 0.0  # seconds without a sign of life, or of loading
        self.restarts = 0
        self.was_ready = False
        self.failure = ""

    def tend(self, heard: float | None) -> bool:
        """Do what is due. `heard`: when the engine last said something, None while it is not ready.

        Returns whether the engine may go on: False if it hangs and is being killed.
        """
        now = time.monotonic()
        self._listen(heard, now)
        if not self._holder and not self._take_over():
            return True
        if self._pidfd is None:
            if now >= self._start_at and self._failures < MAX_FAILURES:
                self._start(now)
            return True
        if self._ended():
            self._failed(now, self._how_it_ended())
        elif self._killed_at is not None:
            self._await_death(now)
        elif self._silence > self._patience(heard):
            self._kill(heard, now)
            return False
        elif heard is not None and now - self._started > HEALTHY_SECONDS:
            self._failures = 0
        return True

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
        os.close(self._lock)

    def _listen(self, heard: float | None, now: float) -> None:
        turn, self._tended = min(now - self._tended, LONGEST_TURN), now
        ready_again = heard is not None and not self._heard
        if heard is None and self._heard:
            self._heard, self._silence = 0.0, 0.0
        elif heard is not None and heard > self._heard:
            self._heard, self._silence = heard, 0.0
        else:
            self._silence += turn
        if ready_again and self._process is not None and self._load_seconds is None:
            self._load_seconds = now - self._started

    def _patience(self, heard: float | None) -> float:
        """Seconds of silence until the engine counts as hanging. Nobody knows how long the first loading may take."""
        if heard is not None:
            return HANG_SECONDS
        return math.inf if self._load_seconds is None else HANG_SECONDS + RELOADS * self._load_seconds

    def _take_over(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._holder = True
        self._started = time.monotonic()
        pid = runtime.read(self._folder / runtime.PID)
        if runtime.is_host(pid, self._folder):
            with suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(int(pid))
        return True

    def _start(self, now: float) -> None:
        try:
            ranks = launch.ranks(deployments.load(self._deployment))
        except deployments.DeploymentError:
            ranks = 1  # the engine process will say what is wrong
        try:
            (self._folder / runtime.FAILURE).unlink(missing_ok=True)
            runtime.new_secret(self._folder)
            command = launch.command(ranks, self._deployment, self._folder, self._server_pid)
            process = subprocess.Popen(
                command, env=launch.environment(), stdin=subprocess.DEVNULL, start_new_session=True, cwd="/"
            )
        except OSError as error:  # no such interpreter, the disk is full, or there is no room for another process
            self._failed(now, f"could not be started ({error})")
            return
        self._process, self._pidfd = process, os.pidfd_open(process.pid)
        self._started, self._silence, self._killed_at = now, 0.0, None
        try:
            runtime.write_private(self._folder / runtime.PID, str(process.pid))
        except OSError as error:
            process.kill()  # another keeper would not find it
            process.wait()
            self._failed(now, f"could not be started ({error})")

    def _kill(self, heard: float | None, now: float) -> None:
        assert self._pidfd is not None
        what, advice = "has been loading", "raise ROUNDHOUSE_HANG_SECONDS"
        if heard is not None:
            what, advice = "has said nothing", f"lower limits.max_num_tokens, or {advice}"
        self._log(
            f"engine: {what} for {self._silence:.0f} s; it is killed and started again; if it was only slow, {advice}"
        )
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._killed_at = now

    def _await_death(self, now: float) -> None:
        assert self._killed_at is not None
        if now - self._killed_at > DYING_SECONDS:
            self._log(f"engine: is still there {DYING_SECONDS:.0f} s after it was killed: the server is stopped")
            self._killed_at = math.inf
            os.kill(self._server_pid, signal.SIGTERM)

    def _ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        assert self._pidfd is not None
        return bool(select.select([self._pidfd], [], [], 0)[0])  # also if nobody reaps it

    def _how_it_ended(self) -> str:
        code = self._process.returncode if self._process is not None else None
        how = "for an unknown reason" if code is None else f"by signal {-code}" if code < 0 else f"with code {code}"
        when = "" if self.was_ready else " while it was loading; its last words are in the server's log"
        return f"ended {how}{when}"

    def _failed(self, now: float, how: str) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._process, self._pidfd, self._killed_at = None, None, None
        if not self.was_ready:
            self._fail_the_start(how)
            return
        wait = min(BACK_OFF * 2**self._failures, MAX_BACK_OFF)
        self._failures += 1
        self._start_at = now + wait
        if self._failures >= MAX_FAILURES:
            self._log(f"engine: {how}; {self._failures} times in a row something failed: the server is stopped")
            os.kill(self._server_pid, signal.SIGTERM)
            return
        self.restarts += 1
        self._log(f"engine: {how}; it is started again in {wait:.1f} s")

    def _fail_the_start(self, how: str) -> None:
        """Tell all fronts of a failure that trying again would not mend."""
        self._failures = MAX_FAILURES
        path = self._folder / runtime.FAILURE
        self.failure = runtime.read(path) or f"the engine process {how}"
        with suppress(OSError):
            runtime.write_private(path, self.failure)
