"""Short notes between the Python models of one server: chunks that postprocessing has passed on, and orders to stop.

Each front has a mailbox, a ZeroMQ socket in the server's private runtime folder. Notes are best effort: one that cannot
be delivered at once is dropped.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from roundhouse.engine.protocol import decoded


class Passed(msgspec.Struct, frozen=True, tag=True):
    """postprocessing has handled chunk number `chunk` of the stream `stream`."""

    stream: int
    chunk: int


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The client of the stream `stream` has gone away: Triton tells postprocessing, but not the step before it."""

    stream: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the requests with this id: a client has sent `stop` to one of the fronts."""

    request_id: str


Note = Passed | Gone | Stop
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Note] = msgspec.msgpack.Decoder(Note)


class Mailbox:
    """Where one front gets its notes. `socket` can be polled."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / f"mailbox-{number}"
        self._path.unlink(missing_ok=True)
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self.socket.set_hwm(100_000)
        self.socket.bind(f"ipc://{self._path}")
        os.chmod(self._path, 0o600)

    def read(self) -> list[Note]:
        """All notes that have come; those that cannot be read are dropped."""
        notes = []
        try:
            while True:
                data = self.socket.recv(zmq.NOBLOCK)
                with suppress(msgspec.DecodeError):
                    notes.append(decoded(data, _decoder))
        except zmq.Again:
            return notes

    def close(self) -> None:
        self.socket.close(linger=0)
        self._path.unlink(missing_ok=True)


class Post:
    """Sends notes to mailboxes. One thread's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sockets: dict[int, zmq.Socket[bytes]] = {}

    def send(self, number: int, note: Note) -> None:
        socket = self._sockets.get(number)
        if socket is None:
            self._forget_the_dead()
            if not self._path(number).exists():
                return
            socket = zmq.Context.instance().socket(zmq.PUSH)
            socket.set_hwm(100_000)
            socket.connect(f"ipc://{self._path(number)}")
            self._sockets[number] = socket
        with suppress(zmq.Again):
            socket.send(_encoder.encode(note), zmq.NOBLOCK)

    def _path(self, number: int) -> Path:
        return self._folder / f"mailbox-{number}"

    def _forget_the_dead(self) -> None:
        for number in [number for number in self._sockets if not self._path(number).exists()]:
            self._sockets.pop(number).close(linger=0)

    def broadcast(self, note: Note) -> None:
        for path in self._folder.glob("mailbox-*"):
            self.send(int(path.name.removeprefix("mailbox-")), note)

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close(linger=0)
