"""The private folder in which the processes of one server meet: the engine's socket, its secret, the keeper's lock."""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from roundhouse.engine.base import EngineError

SOCKET = "engine.sock"
SECRET = "secret"
LOCK = "engine.lock"
PID = "engine.pid"
FAILURE = "engine.failure"
OUTLIVE_SECONDS = 5.0  # for a process of a server to end by itself once the server is gone
DRAINING = "draining"  # exists once the server takes no more requests
SERVER = "server.json"  # a ServerRecord, once the server is ready


class ServerRecord(msgspec.Struct, frozen=True):
    """What others on this machine may know of a server: its deployment file, `host:port` of gRPC, its metrics page."""

    deployment: str
    grpc: str
    metrics_url: str


def announce(server_pid: int, record: ServerRecord) -> None:
    write_private(runtime_dir(server_pid) / SERVER, msgspec.json.encode(record).decode())


def servers() -> dict[int, ServerRecord]:
    """The ready servers of this user, by process id."""
    found = {}
    for path in _base().glob(f"*/{SERVER}"):
        pid, _, started = path.parent.name.partition("-")
        text = read(path)
        if text and pid.isdigit() and str(_start_of(int(pid))) == started:
            found[int(pid)] = msgspec.json.decode(text, type=ServerRecord)
    return found


MAX_SOCKET_PATH = 107  # bytes; the kernel's limit
STALE_SECONDS = 60.0  # for which a folder is left alone, whoever made it


def seconds_of(name: str, default: float) -> float:
    """What an environment variable sets, or the default. Ends the process, naming the variable, if it cannot be."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    with suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    sys.exit(f"environment variable {name}: {text!r} is not allowed; it must be a number of seconds, more than 0")


HANG_SECONDS = seconds_of("ROUNDHOUSE_HANG_SECONDS", 30.0)  # without a sign of life, or without a step


def runtime_dir(server_pid: int) -> Path:
    """The folder of the server with this process id; made if need be, readable by its owner only.

    It is named after the id and the start of the process: a container that starts again gives the same ids, and must
    not find what the one before it has left. Folders of servers that are gone are removed. Raises EngineError if the
    folder belongs to somebody else, if its path is too long for a socket, or if there is no such server.
    """
    base = _base()
    started = _start_of(server_pid)
    if started is None:
        raise EngineError(f"the server with the process id {server_pid} is gone")
    own = base / f"{server_pid}-{started}"
    if len(os.fsencode(own / "mailbox-4194304")) > MAX_SOCKET_PATH:
        raise EngineError(f"{own}: too long for the path of a socket; set TMPDIR to a shorter folder")
    for folder in (base, own):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise EngineError(f"{folder}: must be a folder that only its owner can enter; remove it and start again")
    _remove_stale(base)
    return own


def _base() -> Path:
    return Path(tempfile.gettempdir()) / f"roundhouse-{os.getuid()}"


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 in one step: readers see all of it or nothing."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    beside.replace(path)


def new_secret(folder: Path) -> None:
    write_private(folder / SECRET, secrets.token_hex(32))


def read(path: Path) -> str:
    """What is in a file; nothing if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def is_host(pid: str, folder: Path) -> bool:
    """Whether a process id, as `PID` holds it, is that of a running engine process of this folder."""
    if pid.isdigit():
        with suppress(OSError):
            return os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def alive(pid: int) -> bool:
    return _start_of(pid) is not None


def _start_of(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(status[status.rindex(b")") + 1 :].split()[19])  # field 22; the 2nd, the name, may hold anything


def _remove_stale(base: Path) -> None:
    for folder in base.iterdir():
        pid, _, started = folder.name.partition("-")
        if pid.isdigit() and str(_start_of(int(pid))) != started and not _in_use(folder):
            with suppress(OSError):
                shutil.rmtree(folder)


def _in_use(folder: Path) -> bool:
    """Whether a server that cannot be seen from here uses it: one in another container that shares this folder."""
    with suppress(OSError):
        if time.time() - folder.stat().st_mtime < STALE_SECONDS:
            return True
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
    return False


def server_of(command: Sequence[str], parent: int) -> int:
    """The process id of the Triton that has started a stub with this command line; elsewhere the parent.

    A stub whose Triton has just died has another parent: init, whom it must neither serve nor signal.
    """
    if "triton_python_backend_stub" in command[0] and len(command) > 5 and command[5].isdigit():
        return int(command[5])
    return parent


def when_gone(pid: int, seconds: float, then: Callable[[], None]) -> None:
    """Call `then`, in a thread of its own, so many seconds after the process has ended."""

    def watch() -> None:
        with suppress(ProcessLookupError):
            select.select([os.pidfd_open(pid)], [], [])
        time.sleep(seconds)
        then()

    threading.Thread(target=watch, name="end after the server", daemon=True).start()
