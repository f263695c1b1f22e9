"""The private folder in which the processes of one server meet: the engine's socket, its secret, the keeper's lock."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from roundhouse.engine.base import EngineError

SOCKET = "engine.sock"
SECRET = "secret"
LOCK = "engine.lock"
PID = "engine.pid"
FAILURE = "engine.failure"
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
        text = read(path)
        if text and alive(int(path.parent.name)):
            found[int(path.parent.name)] = msgspec.json.decode(text, type=ServerRecord)
    return found


def runtime_dir(server_pid: int) -> Path:
    """The folder of the server with this process id; made if need be, readable by its owner only.

    Folders of servers that are gone are removed. Raises EngineError if the folder belongs to somebody else.
    """
    base = _base()
    for folder in (base, base / str(server_pid)):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise EngineError(f"{folder}: must be a folder that only its owner can enter; remove it and start again")
    _remove_stale(base)
    return base / str(server_pid)


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


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_stale(base: Path) -> None:
    for folder in base.iterdir():
        if folder.name.isdigit() and not alive(int(folder.name)):
            with suppress(OSError):
                shutil.rmtree(folder)
