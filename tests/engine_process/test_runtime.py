"""The folder in which the processes of one server meet."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from roundhouse.engine import runtime
from roundhouse.engine.base import EngineError


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_the_owners_alone_and_always_the_same() -> None:
    folder = runtime.runtime_dir(os.getpid())
    assert mode(folder) == mode(folder.parent) == 0o700
    assert runtime.runtime_dir(os.getpid()) == folder


def test_a_folder_that_others_can_enter_is_refused() -> None:
    folder = runtime.runtime_dir(os.getpid())
    folder.chmod(0o750)
    with pytest.raises(EngineError, match="only its owner"):
        runtime.runtime_dir(os.getpid())


def test_a_new_server_with_an_old_process_id_finds_nothing_of_the_old_one() -> None:
    """A container that starts again gives the same ids, and /tmp may have outlived it: `draining` lay there."""
    folder = runtime.runtime_dir(os.getpid())
    pid, _, started = folder.name.partition("-")
    before = folder.with_name(f"{pid}-{int(started) - 1}")
    before.mkdir(mode=0o700)
    (before / runtime.DRAINING).touch()
    assert not (runtime.runtime_dir(os.getpid()) / runtime.DRAINING).exists()


def test_folders_of_servers_that_are_gone_are_removed() -> None:
    base = runtime.runtime_dir(os.getpid()).parent
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    old, young, others = (base / f"{gone.pid}-{started}" for started in (1, 2, 3))
    for folder in (old, young, others):
        folder.mkdir()
        (folder / runtime.LOCK).touch()
    for folder in (old, others):
        os.utime(folder, (0, 0))
    with (others / runtime.LOCK).open() as lock:  # a server that only another container can see
        fcntl.flock(lock, fcntl.LOCK_EX)
        runtime.runtime_dir(os.getpid())
    assert not old.exists()
    assert young.exists()
    assert others.exists()


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with pytest.raises(EngineError, match="TMPDIR"):
        runtime.runtime_dir(os.getpid())


def test_there_must_be_such_a_server() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with pytest.raises(EngineError, match="is gone"):
        runtime.runtime_dir(gone.pid)


@pytest.mark.parametrize(("text", "seconds"), [(None, 30.0), ("", 30.0), (" 90.5 ", 90.5)])
def test_seconds_of_the_environment(monkeypatch: pytest.MonkeyPatch, text: str | None, seconds: float) -> None:
    monkeypatch.delenv("SOME_SECONDS", raising=False)
    if text is not None:
        monkeypatch.setenv("SOME_SECONDS", text)
    assert runtime.seconds_of("SOME_SECONDS", 30.0) == seconds


@pytest.mark.parametrize("text", ["abc", "0", "-1", "nan"])
def test_seconds_that_cannot_be_are_refused_by_name(text: str) -> None:
    """In the process that reads them first: one line, no traceback."""
    command = [sys.executable, "-c", "import roundhouse.engine.runtime"]
    environment = {**os.environ, "ROUNDHOUSE_HANG_SECONDS": text}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        f"environment variable ROUNDHOUSE_HANG_SECONDS: {text!r} is not allowed; "
        "it must be a number of seconds, more than 0\n"
    )


STUB = ["/backends/python/triton_python_backend_stub", "/models/ensemble/1/model.py", "region", "16777216", "16777216"]


@pytest.mark.parametrize(
    ("command", "server"),
    [
        ([*STUB, "4711", "/backends/python", "336", "ensemble_0_0", "DEFAULT"], 4711),
        ([*STUB, "somewhere", "4711"], 1),
        (STUB, 1),
        (["python", "-m", "pytest", "a", "b", "4711"], 1),
    ],
    ids=["a stub", "a stub of an unknown kind", "cut short", "no stub"],
)
def test_a_stub_knows_its_server_after_that_has_died(command: list[str], server: int) -> None:
    """Its parent is init then, which must not be taken for the server."""
    assert runtime.server_of(command, 1) == server
