"""The engine process: one engine, driven by one thread, for all fronts of a server.

    python -m roundhouse.engine.host --deployment FILE --folder FOLDER --server-pid PID

Between engine steps, and while an engine waits for its GPU, it takes the fronts' messages; after each step every front
gets one message with what its streams gained. It ends with the server. A front that dies, or that does not read, loses
its requests and nobody else's.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path

import msgspec
import zmq

from roundhouse import deployment
from roundhouse.bugs import described
from roundhouse.engine import launch, runtime
from roundhouse.engine.base import Engine, EngineError, RequestError
from roundhouse.engine.load import load_engine
from roundhouse.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    EngineStats,
    Error,
    ErrorCode,
    Hello,
    Output,
    Outputs,
    Refused,
    Request,
    Submit,
    ToFront,
    Welcome,
    decode_to_engine,
    encode,
)
from roundhouse.engine.runtime import HANG_SECONDS

LOAD_FAILED = 3  # exit code
STUCK = 4  # exit code
HEARTBEAT_SECONDS = 0.1
SEND_QUEUE = 2000  # messages that may wait for a front before it is dropped
SLICE = 256  # messages that are read between two steps


@dataclass(eq=False)
class Front:
    """A connected front.

    `ids`: its own ids -> ours. `started`: those that have had a token. `held`: outputs that it has not been sent yet.
    """

    identity: bytes
    name: str
    pidfd: int
    of_server: bool  # a process that the server has started
    ids: dict[int, int] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    held: dict[int, Output] = field(default_factory=dict)
    delivered: float = 0.0


def merged(first: Output, second: Output) -> Output:
    """Two outputs of one sequence in one. `first` is not its last."""
    log_probs = first.log_probs
    if second.log_probs is not None:
        log_probs = [*(log_probs or ()), *second.log_probs]
    top = first.top_log_probs
    if second.top_log_probs is not None:
        top = [*(top or ()), *second.top_log_probs]
    return Output(
        id=first.id,
        tokens=first.tokens + second.tokens,
        log_probs=log_probs,
        finish_reason=second.finish_reason,
        perf=second.perf,
        error=second.error,
        top_log_probs=top,
    )


class Host:
    def __init__(
        self, engine: Engine, folder: Path, secret: str, server_pid: int, responses_per_second: float = 4000
    ) -> None:
        """`responses_per_second`: what one front can send."""
        self._engine = engine
        engine.meanwhile = self._read
        self._responses_per_second = responses_per_second
        self._path = folder / runtime.SOCKET
        self._socket = bind(self._path)
        self._secret = secret
        self._fronts: dict[bytes, Front] = {}
        self._dropped: set[bytes] = set()  # fronts that still have to be told
        self._owners: dict[int, tuple[Front, int]] = {}  # our id -> front and its id
        self._last_id = 0
        self._server_pid = server_pid
        self._server = os.pidfd_open(server_pid)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._server, zmq.POLLIN)
        self._next_heartbeat = 0.0
        self._step_seconds = 0.0  # of the last step
        self._steps = 0
        self._stepped = 0.0  # when the engine last advanced, or had no reason to
        self.stopping = False
        self.stuck = False

    def run(self) -> bool:
        """Serve until the server is gone or `stopping` or `stuck` is set. Returns whether the server is gone."""
        while not (self.stopping or self.stuck):
            busy = self._engine.unfinished()
            events = dict(self._poller.poll(0 if busy else int(HEARTBEAT_SECONDS * 1000)))
            if self._server in events:
                return True
            if self._socket in events:
                self._read()
            for front in list(self._fronts.values()):
                if front.pidfd in events:
                    self._forget(front)
            if self._engine.unfinished():
                begun = time.monotonic()
                outputs = self._engine.step()
                self._step_seconds = time.monotonic() - begun
                self._deliver(outputs)
            if self._owners and not self._engine.unfinished():
                self._deliver([_mistake(ours, "forgot the request") for ours in self._owners])
            self._heartbeat()
        return False

    def close(self) -> None:
        for front in list(self._fronts.values()):
            self._forget(front)
        self._socket.close(linger=0)
        os.close(self._server)

    def _read(self) -> None:
        for _ in range(SLICE):
            try:
                identity, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                continue  # not two frames: no client of ours
            try:
                message = decode_to_engine(data)
            except msgspec.DecodeError as error:
                self._send(identity, Refused(f"the message could not be read: {error}"))
                continue
            front = self._fronts.get(identity)
            if isinstance(message, Hello):
                self._welcome(identity, message)
            elif front is None:
                self._send(identity, Refused("say Hello first"))
            elif isinstance(message, Submit):
                self._submit(front, message)
            elif isinstance(message, Cancel):
                self._cancel(front, message)

    def _welcome(self, identity: bytes, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            self._send(identity, Refused(f"protocol version {hello.version}; this engine speaks {PROTOCOL_VERSION}"))
            return
        if not compare_digest(hello.secret.encode(), self._secret.encode()):
            self._send(identity, Refused("wrong secret"))
            return
        try:
            pidfd = os.pidfd_open(hello.pid)
        except (OSError, OverflowError):
            self._send(identity, Refused(f"there is no process {hello.pid}"))
            return
        if identity in self._fronts:  # it begins anew
            self._forget(self._fronts[identity])
        self._fronts[identity] = Front(identity, hello.front, pidfd, _parent(hello.pid) == self._server_pid)
        self._poller.register(pidfd, zmq.POLLIN)
        self._send(identity, Welcome(self._engine.info, os.getpid()))

    def _submit(self, front: Front, message: Submit) -> None:
        refused = []
        info = self._engine.info
        for request in message.requests:
            error = self._accept(front, request, info.max_batch_size + info.max_queue)
            if error is not None:
                refused.append(Output(id=request.id, tokens=[], error=error))
        if refused:
            self._send(front.identity, Outputs(refused))

    def _accept(self, front: Front, request: Request, room: int) -> Error | None:
        if request.id in front.ids:
            return Error(ErrorCode.INTERNAL, f"request id {request.id} is in use")
        if self._engine.unfinished() >= room:
            return Error(
                ErrorCode.QUEUE_FULL,
                f"Exceeds maximum queue size of {self._engine.info.max_queue} waiting requests; "
                "send it again later, or raise limits.queue of the deployment",
            )
        self._last_id += 1
        try:
            self._engine.submit(msgspec.structs.replace(request, id=self._last_id))
        except RequestError as error:
            return error.as_error()
        except Exception as error:  # a bug of the engine: this request cannot be had, the others can
            print(f"engine: could not take a request: {described(error)}", file=sys.stderr, flush=True)
            self._engine.cancel(self._last_id)
            return Error(ErrorCode.INTERNAL, f"the engine could not take the request: {error}")
        front.ids[request.id] = self._last_id
        self._owners[self._last_id] = (front, request.id)
        return None

    def _cancel(self, front: Front, message: Cancel) -> None:
        for id in message.ids:
            ours = front.ids.get(id)
            if ours is not None:
                self._engine.cancel(ours)

    def _deliver(self, outputs: list[Output]) -> None:
        """Hand a step's outputs to their fronts, at once or together with those of the next steps."""
        urgent = set()
        for output in outputs:
            owner = self._owners.get(output.id)
            if owner is None:
                continue  # its front is gone, or it has had its last output
            front, id = owner
            wrong = self._what_is_wrong(output)
            if wrong:
                self._engine.cancel(output.id)
                output = _mistake(output.id, wrong)
            held = front.held.get(id)
            if held is None:
                front.held[id] = msgspec.structs.replace(output, id=id)
            else:
                front.held[id] = merged(held, output)
            if output.last:
                del self._owners[output.id], front.ids[id]
                front.started.discard(id)
                urgent.add(front)
            elif id not in front.started:
                front.started.add(id)
                urgent.add(front)
        now = time.monotonic()
        for front in list(self._fronts.values()):
            # As many steps together as come nearest to what the front can send: sooner it would only be woken in vain.
            wait = len(front.held) / self._responses_per_second - self._step_seconds / 2
            if front.held and (front in urgent or now - front.delivered >= wait):
                front.delivered = now
                theirs, front.held = list(front.held.values()), {}
                self._send(front.identity, Outputs(theirs))

    def _what_is_wrong(self, output: Output) -> str:
        """Why an output cannot be passed on; nothing if it can."""
        vocab_size = self._engine.info.vocab_size
        for token in output.tokens:
            if type(token) is not int or not 0 <= token < vocab_size:
                return f"gave the token id {token}, outside of its vocabulary of {vocab_size}"
        if output.log_probs is not None and len(output.log_probs) != len(output.tokens):
            return f"gave {len(output.log_probs)} log probabilities for {len(output.tokens)} tokens"
        return ""

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now < self._next_heartbeat:
            return
        self._next_heartbeat = now + HEARTBEAT_SECONDS
        if not self._path.exists():  # something cleans up this folder; those who are connected stay so
            bind(self._path, self._socket)
        stats = self._engine.stats()
        self._watch_steps(stats.steps, now)
        message = EngineStats(stats)
        for identity in list(self._fronts):
            self._send(identity, message)
        for identity in list(self._dropped):
            self._dropped.discard(identity)
            self._send(identity, Refused("the front did not read its messages; its requests are cancelled"))

    def _watch_steps(self, steps: int, now: float) -> None:
        """An engine whose `step` returns, but which does not advance: one that lost a worker, or its way."""
        if steps != self._steps or not self._engine.unfinished():
            self._steps, self._stepped = steps, now
        elif now - self._stepped > HANG_SECONDS:
            message = f"engine: no step in {HANG_SECONDS:.0f} s for {self._engine.unfinished()} requests: it ends"
            print(message, file=sys.stderr, flush=True)
            self.stuck = True

    def _send(self, identity: bytes, message: ToFront) -> None:
        try:
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            self._dropped.add(identity)
            if identity in self._fronts:
                self._forget(self._fronts[identity])
        except zmq.ZMQError:  # no such peer any more
            if identity in self._fronts:
                self._forget(self._fronts[identity])

    def end_fronts(self, seconds: float) -> None:
        """See to it that the server's fronts end with it.

        One that was telling Triton of its metrics waits for an answer, holding its interpreter's lock: it cannot do so
        by itself.
        """
        deadline = time.monotonic() + seconds
        for front in self._fronts.values():
            if front.of_server and not select.select([front.pidfd], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                signal.pidfd_send_signal(front.pidfd, signal.SIGKILL)

    def _forget(self, front: Front) -> None:
        del self._fronts[front.identity]
        self._poller.unregister(front.pidfd)
        os.close(front.pidfd)
        for ours in front.ids.values():
            del self._owners[ours]
            self._engine.cancel(ours)


def _mistake(id: int, what: str) -> Output:
    """The last output of a request of which the engine has given nonsense."""
    print(f"engine: {what}", file=sys.stderr, flush=True)
    return Output(id=id, tokens=[], error=Error(ErrorCode.INTERNAL, f"the engine {what}; this is a bug of the engine"))


def bind(path: Path, socket: zmq.Socket[bytes] | None = None) -> zmq.Socket[bytes]:
    """A socket at this path, or the same one once more."""
    path.unlink(missing_ok=True)
    if socket is None:
        socket = zmq.Context.instance().socket(zmq.ROUTER)
        socket.set_hwm(SEND_QUEUE)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
    socket.bind(f"ipc://{path}")
    path.chmod(0o600)
    return socket


def _parent(pid: int) -> int:
    """The process that has started this one; 0 if it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _end_after(server_pid: int, folder: Path) -> None:
    """End this process some time after the server, whatever it is doing: loading, a step that hangs, closing."""

    def end() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    runtime.when_gone(server_pid, runtime.OUTLIVE_SECONDS, end)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--deployment", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="the server's runtime folder")
    parser.add_argument("--server-pid", type=int, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server; the engine ends with it
    os.umask(0o077)
    launch.die_with_mpirun()
    _end_after(args.server_pid, args.folder)
    try:
        settings = deployment.load(args.deployment)
        engine = load_engine(settings)
    except (EngineError, deployment.DeploymentError) as error:
        runtime.write_private(args.folder / runtime.FAILURE, str(error))
        print(f"engine: cannot be loaded: {error}", file=sys.stderr, flush=True)
        return LOAD_FAILED
    except Exception as error:
        runtime.write_private(args.folder / runtime.FAILURE, f"unexpected {type(error).__name__}: {error}")
        print(f"engine: unexpected error while loading\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return LOAD_FAILED
    secret = runtime.read(args.folder / runtime.SECRET)
    host = Host(engine, args.folder, secret, args.server_pid, settings.fronts.responses_per_second)
    signal.signal(signal.SIGTERM, lambda *_: setattr(host, "stopping", True))
    server_gone = host.run()
    if host.stuck:
        os._exit(STUCK)  # closing would wait for what hangs
    if server_gone:
        host.end_fronts(runtime.OUTLIVE_SECONDS / 2)
    host.close()
    engine.close()
    if server_gone:
        shutil.rmtree(args.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
