"""A front's connection to the engine process, whatever becomes of that process."""

from __future__ import annotations

import os
import select
import time
import uuid
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import msgspec
import zmq

from roundhouse.engine import runtime
from roundhouse.engine.base import EngineError
from roundhouse.engine.keeper import Keeper
from roundhouse.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    EngineInfo,
    EngineStats,
    Error,
    ErrorCode,
    Hello,
    Output,
    Outputs,
    Refused,
    Request,
    Stats,
    Submit,
    ToEngine,
    Welcome,
    decode_to_front,
    encode,
)
from roundhouse.engine.runtime import runtime_dir

TEND_SECONDS = 0.05
HELLO_SECONDS = 1.0  # a Hello without an answer is said again on a new connection
PROGRESS_SECONDS = 10.0
GONE = "the engine process has ended; it is being started again: send the request again in a few seconds"
DOWN = "the engine is not running; it is being started again: send the request again in a few seconds"


class Connection:
    """One DEALER socket and the Hello on it."""

    def __init__(self, folder: Path, front: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.set_hwm(0)  # the engine decides when a front is too slow
        self.socket.connect(f"ipc://{folder / runtime.SOCKET}")
        self.said_hello = time.monotonic()
        secret = runtime.read(folder / runtime.SECRET)
        self.send(Hello(version=PROTOCOL_VERSION, secret=secret, front=front, pid=os.getpid()))

    def send(self, message: ToEngine) -> None:
        self.socket.send(encode(message), zmq.NOBLOCK)

    def receive(self) -> list[Welcome | Refused | Outputs | EngineStats]:
        """All messages that have come. One that cannot be read counts as a refusal: its engine is not ours."""
        messages: list[Welcome | Refused | Outputs | EngineStats] = []
        try:
            while True:
                messages.append(decode_to_front(self.socket.recv(zmq.NOBLOCK)))
        except zmq.Again:
            pass
        except msgspec.DecodeError as error:
            messages.append(Refused(f"sent a message that could not be read: {error}"))
        return messages

    def close(self) -> None:
        self.socket.close(linger=0)


class EngineClient:
    """Submits requests and polls for their outputs. One thread owns it; only `wake` may be called by others.

    If the engine ends, every open request ends with an error Output at once, and so does what is submitted until it is
    back. One of the clients of a server keeps the engine running (see keeper.py); `poll` is when it does so. A client
    without a deployment leaves that to others.
    """

    def __init__(self, deployment: Path | None, front: str, server_pid: int, *, log: Callable[[str], None]) -> None:
        self._front = front
        self._log = log
        self._folder = runtime_dir(server_pid)
        self._keeper = Keeper(deployment, self._folder, server_pid, log) if deployment is not None else None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._connection: Connection | None = None
        self._pidfd: int | None = None  # of the engine, once it has welcomed us
        self._heard = 0.0
        self._next_tend = 0.0
        self._open: set[int] = set()
        self._failed: list[Output] = []
        self.info: EngineInfo | None = None
        self.stats: Stats | None = None

    @property
    def restarts(self) -> int:
        """Restarts of the engine that this client has seen to."""
        return self._keeper.restarts if self._keeper is not None else 0

    @property
    def connected(self) -> bool:
        return self._pidfd is not None

    def start(self) -> EngineInfo:
        """Join the engine, or start it; returns once it is ready. Raises EngineError if it cannot be loaded."""
        started = told = time.monotonic()
        while not self.connected:
            self.poll(TEND_SECONDS)
            failure = runtime.read(self._folder / runtime.FAILURE)
            if self._keeper is not None and self._keeper.failure:
                failure = self._keeper.failure
            if failure:
                raise EngineError(failure)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                self._log(f"waiting for the engine to load: {told - started:.0f} s")
        assert self.info is not None
        return self.info

    def submit(self, requests: Sequence[Request]) -> None:
        if not self.connected or self._connection is None:
            self._failed += [Output(id=request.id, tokens=[], error=_unavailable(DOWN)) for request in requests]
            return
        self._connection.send(Submit(list(requests)))  # or none of them is open
        self._open.update(request.id for request in requests)

    def cancel(self, ids: Sequence[int]) -> None:
        live = [id for id in ids if id in self._open]
        if live and self._connection is not None:
            self._connection.send(Cancel(live))

    def poll(self, timeout: float) -> list[Output]:
        """Wait up to `timeout` seconds for something to happen; all outputs that have come."""
        if self._failed:
            timeout = 0.0
        events = dict(self._poller.poll(ceil(timeout * 1000)))
        if self._wake in events:
            os.eventfd_read(self._wake)
        outputs = self._read()
        if self._pidfd in events:
            self._lost()
        now = time.monotonic()
        if now >= self._next_tend:
            self._next_tend = now + TEND_SECONDS
            if self._keeper is not None and not self._keeper.tend(self._heard if self.connected else None):
                self._lost()
            self._connect(now)
        failed, self._failed = self._failed, []
        return outputs + failed

    def fileno(self) -> int:
        """Readable when something has come, for event loops: call `poll(0)` then, and after each submit or cancel.

        `poll` must be called every TEND_SECONDS besides.
        """
        return self._epoll.fileno()

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """`poll` also returns when something comes to this socket."""
        self._poller.register(socket, zmq.POLLIN)

    def close(self) -> None:
        self._disconnect()
        if self._keeper is not None:
            self._keeper.close()
        self._epoll.close()
        os.close(self._wake)

    def _read(self) -> list[Output]:
        outputs: list[Output] = []
        for message in self._connection.receive() if self._connection is not None else ():
            self._heard = time.monotonic()
            if isinstance(message, Outputs):
                for output in message.outputs:
                    if output.id in self._open:
                        outputs.append(output)
                        if output.last:
                            self._open.discard(output.id)
            elif isinstance(message, EngineStats):
                self.stats = message.stats
            elif isinstance(message, Welcome):
                self._welcomed(message)
            else:
                self._log(f"engine: {message.message}")
                self._lost()
                break
        return outputs

    def _welcomed(self, message: Welcome) -> None:
        if self.connected:
            return
        try:
            self._pidfd = os.pidfd_open(message.pid)
        except ProcessLookupError:
            return
        self._poller.register(self._pidfd, zmq.POLLIN)
        self.info = message.info
        if self._keeper is not None:
            self._keeper.was_ready = True

    def _connect(self, now: float) -> None:
        """Say Hello, and again if nobody answers: the engine may be a new one with a new secret."""
        if self.connected or (self._connection is not None and now - self._connection.said_hello < HELLO_SECONDS):
            return
        if not (self._folder / runtime.SOCKET).exists():
            return
        self._disconnect()
        self._connection = Connection(self._folder, self._front)
        self._poller.register(self._connection.socket, zmq.POLLIN)
        self._epoll.register(self._connection.socket.FD, select.EPOLLIN)

    def _lost(self) -> None:
        self._failed += [Output(id=id, tokens=[], error=_unavailable(GONE)) for id in sorted(self._open)]
        self._open.clear()
        self._disconnect()

    def _disconnect(self) -> None:
        self.stats = None
        if self._pidfd is not None:
            self._poller.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._connection is not None:
            self._poller.unregister(self._connection.socket)
            self._epoll.unregister(self._connection.socket.FD)
            self._connection.close()
            self._connection = None


class EngineMonitor:
    """Reads the newest stats of a server's engine, and never touches it otherwise."""

    def __init__(self, server_pid: int) -> None:
        self._folder = runtime_dir(server_pid)
        self._connection: Connection | None = None
        self._heard = 0.0
        self._stats: Stats | None = None
        self._pid = ""  # of the engine that welcomed us last

    def stats(self) -> Stats | None:
        """The newest stats; None if there is no engine, or it has said nothing for a second."""
        now = time.monotonic()
        if self._connection is None:
            if not (self._folder / runtime.SOCKET).exists():
                return None
            self._connection = Connection(self._folder, "monitor")
            self._heard = now
        for message in self._connection.receive():
            if isinstance(message, EngineStats):
                self._heard, self._stats = now, message.stats
            elif isinstance(message, Welcome):
                self._pid = str(message.pid)
        if now - self._heard > HELLO_SECONDS:
            self.close()
        return self._stats

    def serving(self) -> bool:
        """Whether there is an engine that takes requests: one that is loaded, even if it is in a long step."""
        self.stats()
        return runtime.is_host(self._pid, self._folder)

    def idle(self) -> bool:
        """Whether the engine surely has nothing to do: it says so, or there is none.

        An engine that says nothing may be in a long step.
        """
        stats = self.stats()
        if stats is not None:
            return stats.active + stats.waiting == 0
        return not runtime.is_host(runtime.read(self._folder / runtime.PID), self._folder)

    def close(self) -> None:
        self._stats = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _unavailable(message: str) -> Error:
    return Error(ErrorCode.UNAVAILABLE, message)
