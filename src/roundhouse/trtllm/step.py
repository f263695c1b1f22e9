"""Running one long command: its output to a log that is kept, progress to the terminal, no child left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

PROGRESS_SECONDS = 30.0  # between two lines where there is no terminal
KILL_SECONDS = 10.0
LAST_LINES = 5
TAIL = 8192  # bytes of the log that are looked at
CAUSES = {
    "No space left on device": "the disk is full: free some space",
    "CUDA out of memory": "the GPU's memory is full: end what else runs on it, or take more GPUs",
    "Unsupported dataset": "engine.calibration: give cnn_dailymail, pileval, or a folder with a `text` column",
}


class StepError(Exception):
    """A command failed. The first line says which and why, then its last words, then where the whole log is."""


def run(name: str, command: list[str], *, cwd: Path, log: Path, console: Console, keep_open: int) -> float:
    """Run it to its end and return the seconds. `keep_open`: a file descriptor that it inherits.

    Raises StepError if it fails. If we are interrupted, it is ended first, with all that it started.
    """
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8", errors="replace") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[keep_open],
            start_new_session=True,
        )
        with _ended(process), _progress(name, log, console) as told:
            while not _over(process):
                told(time.monotonic() - started)
    seconds = time.monotonic() - started
    if process.returncode:
        raise StepError(_why(name, process.returncode, seconds, log))
    console.print(f"{name}: done in {_clock(seconds)}", highlight=False)
    return seconds


def last_words(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - TAIL))
        text = file.read().decode(errors="replace")
    # progress bars write over their line
    lines = (line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").splitlines())
    return [line for line in lines if line][-LAST_LINES:]


def _over(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended within a tenth of a second."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.1)
    return process.poll() is not None


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens inside: afterwards the process and its children are gone."""
    try:
        yield
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Progress:
    """Tells how long it takes and what the log says: on a terminal all the time, else now and then."""

    def __init__(self, name: str, log: Path, console: Console) -> None:
        self._name, self._log, self._console = name, log, console
        self._due = 0.0 if console.is_terminal else PROGRESS_SECONDS
        self.status = console.status(name)

    def __call__(self, seconds: float) -> None:
        if seconds < self._due:
            return
        line = f"{self._name}: {_clock(seconds)}  {last_words(self._log)[-1][:100]}"
        if self._console.is_terminal:
            self._due = seconds + 1.0
            self.status.update(escape(line))
        else:
            self._due = seconds + PROGRESS_SECONDS
            self._console.print(line, markup=False, highlight=False)


@contextmanager
def _progress(name: str, log: Path, console: Console) -> Iterator[_Progress]:
    progress = _Progress(name, log, console)
    with progress.status:
        yield progress


def _why(name: str, code: int, seconds: float, log: Path) -> str:
    words = last_words(log)
    how = f"was killed by signal {-code}" if code < 0 else f"failed with code {code}"
    cause = next((cause for text, cause in CAUSES.items() if any(text in word for word in words)), "")
    if code == -signal.SIGKILL and not cause:
        cause = "most likely for want of memory: give the machine, or the pod, more"
    first = f"{name}: {how} after {_clock(seconds)}" + (f"; {cause}" if cause else "")
    return "\n".join([first, *(f"    {word}" for word in words), f"whole log: {log}"])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
