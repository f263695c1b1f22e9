"""The engine process's loop with engines that break their word, and with messages that no front sends."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from roundhouse.engine import host as hosting
from roundhouse.engine import runtime
from roundhouse.engine.base import Engine
from roundhouse.engine.client import Connection
from roundhouse.engine.host import Host
from roundhouse.engine.protocol import (
    Cancel,
    EngineInfo,
    EngineStats,
    ErrorCode,
    FinishReason,
    Hello,
    Output,
    Outputs,
    Refused,
    Request,
    Stats,
    Submit,
    Welcome,
    decode_to_front,
    encode,
)
from tests.engine_process.conftest import request

Step = Callable[[dict[int, Request]], list[Output]]


def well(live: dict[int, Request]) -> list[Output]:
    return [Output(id, [1], finish_reason=FinishReason.LENGTH) for id in live]


class ScriptedEngine(Engine):
    """Its steps are the test's. Requests are live until an Output ends them, or `forgets` is set."""

    def __init__(self) -> None:
        self.info = EngineInfo("scripted", "1", "none", 100, 1000, 8, 8, 16, 100)
        self.live: dict[int, Request] = {}
        self.steps = 0
        self.script: Step = well
        self.cancelled: list[int] = []

    def submit(self, request: Request) -> None:
        if request.prompt == (13,):
            raise RuntimeError("unlucky")
        self.live[request.id] = request

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        self.live.pop(request_id, None)

    def step(self) -> list[Output]:
        time.sleep(0.001)
        outputs = self.script(self.live)
        self.steps += bool(outputs)
        for output in outputs:
            if output.last:
                self.live.pop(output.id, None)
        return outputs

    def unfinished(self) -> int:
        return len(self.live)

    def stats(self) -> Stats:
        return Stats(steps=self.steps)

    def close(self) -> None:
        pass


class Peer:
    """A front by hand."""

    def __init__(self, folder: Path, hello: bool = True) -> None:
        self.connection = Connection(folder, "test")
        self._come: deque[Any] = deque()
        if hello:
            assert isinstance(self.receive(Welcome), Welcome)

    def receive(self, kind: type[Any], seconds: float = 5.0) -> Any:
        """The next message of this kind."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._come += self.connection.receive()
            while self._come:
                if isinstance(message := self._come.popleft(), kind):
                    return message
            time.sleep(0.002)
        raise AssertionError(f"no {kind.__name__} came")

    def ends(self, *ids: int) -> dict[int, Output]:
        """The last outputs of these requests."""
        found: dict[int, Output] = {}
        while not found.keys() >= set(ids):
            for output in self.receive(Outputs).outputs:
                assert output.id not in found, "two last outputs"
                if output.last:
                    found[output.id] = output
        return found


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runtime.new_secret(tmp_path)
    return tmp_path


@pytest.fixture
def host(engine: ScriptedEngine, folder: Path) -> Iterator[Host]:
    host = Host(engine, folder, runtime.read(folder / runtime.SECRET), os.getpid())
    thread = threading.Thread(target=host.run)
    thread.start()
    yield host
    assert thread.is_alive() or host.stuck
    host.stopping = True
    thread.join(timeout=5)
    host.close()


@pytest.fixture
def peer(host: Host, folder: Path) -> Iterator[Peer]:
    peer = Peer(folder)
    yield peer
    peer.connection.close()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (Output(0, [100]), "token id 100"),
        (Output(0, [-1]), "token id -1"),
        (Output(0, [2**70]), "token id"),
        (Output(0, [True]), "token id True"),
        (Output(0, [1, 2], log_probs=[0.0]), "1 log probabilities for 2 tokens"),
    ],
)
def test_nonsense_ends_its_own_request_only(peer: Peer, engine: ScriptedEngine, wrong: Output, named: str) -> None:
    def script(live: dict[int, Request]) -> list[Output]:
        return [
            Output(id, wrong.tokens, wrong.log_probs) if made.prompt == (1,) else well({id: made})[0]
            for id, made in list(live.items())
        ]

    engine.script = script
    peer.connection.send(Submit([request(1, prompt=(1,)), request(2)]))
    ends = peer.ends(1, 2)
    error = ends[1].error
    assert error is not None
    assert error.code is ErrorCode.INTERNAL
    assert named in error.message
    assert ends[2].error is None
    assert len(engine.cancelled) == 1


def test_requests_are_taken_in_while_a_step_waits(peer: Peer, engine: ScriptedEngine) -> None:
    """And cancelled, too."""
    seen: list[set[tuple[int, ...]]] = []  # prompts that were live within one step

    def script(live: dict[int, Request]) -> list[Output]:
        if not seen:
            peer.connection.send(Submit([request(2, prompt=(2,)), request(3, prompt=(3,))]))
            peer.connection.send(Cancel([2]))
            seen.append(set())
            deadline = time.monotonic() + 5
            while not engine.cancelled and time.monotonic() < deadline:
                engine.meanwhile()
                seen[0] |= {one.prompt for one in live.values()}
        return well(live)

    engine.script = script
    peer.connection.send(Submit([request(1, prompt=(1,))]))
    assert peer.ends(1, 3).keys() == {1, 3}
    assert {(1,), (3,)} <= seen[0]
    assert len(engine.cancelled) == 1


def test_unknown_ids_and_a_second_end_reach_nobody(peer: Peer, engine: ScriptedEngine) -> None:
    engine.script = lambda live: [Output(10**6, [1]), *well(live), *well(live), Output(10**6, [], None)]
    peer.connection.send(Submit([request(1), request(2)]))
    assert {output.finish_reason for output in peer.ends(1, 2).values()} == {FinishReason.LENGTH}


def test_a_request_that_the_engine_forgets_ends_with_an_error(peer: Peer, engine: ScriptedEngine) -> None:
    def script(live: dict[int, Request]) -> list[Output]:
        live.clear()
        return []

    engine.script = script
    peer.connection.send(Submit([request(1)]))
    assert "forgot" in str(peer.ends(1)[1].error)


def test_an_exception_while_a_request_is_taken_is_that_requests(peer: Peer, engine: ScriptedEngine) -> None:
    peer.connection.send(Submit([request(1, prompt=(13,)), request(2)]))
    ends = peer.ends(1, 2)
    assert ends[1].error is not None
    assert ends[1].error.code is ErrorCode.INTERNAL
    assert ends[2].error is None


def test_an_engine_that_steps_without_advancing_is_noticed(
    host: Host, peer: Peer, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "HANG_SECONDS", 0.5)
    time.sleep(0.7)
    assert not host.stuck  # nothing to do is no reason
    engine.script = lambda live: []
    peer.connection.send(Submit([request(1)]))
    started = time.monotonic()
    while not host.stuck:
        assert time.monotonic() - started < 3
        time.sleep(0.01)


class TestMessages:
    @pytest.mark.parametrize(
        "data", [b"", b"\x00", b"\xc1", b"\x81\xa1\x80\x00", b"\x81\xa4type\xa5Hello", b"x" * 10_000]
    )
    def test_what_cannot_be_read_is_refused(self, peer: Peer, data: bytes) -> None:
        peer.connection.socket.send(data)
        assert "could not be read" in peer.receive(Refused).message

    def test_frames_too_many_are_dropped(self, peer: Peer) -> None:
        peer.connection.socket.send_multipart([b"a", b"b", b"c"])
        peer.connection.send(Submit([request(1)]))
        peer.ends(1)

    @pytest.mark.parametrize(
        ("hello", "named"),
        [
            ({"version": 99}, "protocol version"),
            ({"secret": "wrong"}, "secret"),
            ({"secret": "\u2603"}, "secret"),
            ({"pid": 0}, "no process"),
            ({"pid": 2**40}, "no process"),
        ],
    )
    def test_a_hello_that_is_not_ours_is_refused(
        self, host: Host, folder: Path, hello: dict[str, Any], named: str
    ) -> None:
        runtime.write_private(folder / runtime.SECRET, "not this")
        peer = Peer(folder, hello=False)
        assert "secret" in peer.receive(Refused).message
        good = {"version": 1, "secret": host._secret, "front": "x", "pid": os.getpid()}
        peer.connection.send(Hello(**{**good, **hello}))
        assert named in peer.receive(Refused).message
        peer.connection.send(Submit([request(1)]))
        assert "Hello first" in peer.receive(Refused).message
        peer.connection.close()

    def test_a_second_hello_begins_anew(self, host: Host, peer: Peer, engine: ScriptedEngine) -> None:
        engine.script = lambda live: []
        peer.connection.send(Submit([request(1)]))
        peer.connection.send(Hello(version=1, secret=host._secret, front="again", pid=os.getpid()))
        peer.receive(Welcome)
        engine.script = well
        peer.connection.send(Submit([request(1)]))
        peer.ends(1)
        assert engine.cancelled == [1]

    def test_a_request_id_that_is_in_use_is_refused(self, peer: Peer, engine: ScriptedEngine) -> None:
        engine.script = lambda live: []
        peer.connection.send(Submit([request(1), request(1)]))
        assert "in use" in str(peer.ends(1)[1].error)

    def test_cancelling_what_is_not_there_does_nothing(self, peer: Peer, engine: ScriptedEngine) -> None:
        peer.connection.send(Cancel([7, -1, 2**60]))
        peer.connection.send(Submit([request(1)]))
        peer.ends(1)
        assert engine.cancelled == []


def test_a_front_that_dies_loses_its_requests(peer: Peer, folder: Path, engine: ScriptedEngine) -> None:
    engine.script = lambda live: []
    with subprocess.Popen(["sleep", "60"]) as dying:
        other = Peer(folder)
        secret = runtime.read(folder / runtime.SECRET)
        other.connection.send(Hello(version=1, secret=secret, front="dying", pid=dying.pid))
        other.receive(Welcome)
        other.connection.send(Submit([request(1)]))
        peer.connection.send(Submit([request(1)]))
        while len(engine.live) < 2:
            time.sleep(0.002)
        dying.kill()
    while len(engine.live) > 1:
        time.sleep(0.002)
    engine.script = well
    assert peer.ends(1)[1].error is None
    other.connection.close()


def test_a_front_that_does_not_read_is_dropped_and_told(
    engine: ScriptedEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "SEND_QUEUE", 100)
    secret = runtime.read(folder / runtime.SECRET)
    host = Host(engine, folder, secret, os.getpid())
    thread = threading.Thread(target=host.run)
    thread.start()
    quick = Peer(folder)
    slow: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    slow.setsockopt(zmq.RCVHWM, 1)  # unlike a front: as if its process were stopped
    slow.connect(f"ipc://{folder / runtime.SOCKET}")
    slow.send(encode(Hello(version=1, secret=secret, front="slow", pid=os.getpid())))

    def script(live: dict[int, Request]) -> list[Output]:
        """200 KB a step for the slow one: what waits in the kernel and in the queues is soon too much."""
        return [Output(id, [1] * (200_000 if made.prompt == (1,) else 1)) for id, made in live.items()]

    engine.script = script
    slow.send(encode(Submit([request(1, prompt=(1,))])))
    quick.connection.send(Submit([request(1)]))
    deadline = time.monotonic() + 20
    while (not engine.cancelled or len(engine.live) == 2) and time.monotonic() < deadline:
        quick.connection.receive()
        time.sleep(0.001)
    assert [made.prompt for made in engine.live.values()] == [(5, 6, 7)]
    engine.script = well
    assert quick.ends(1)[1].finish_reason is FinishReason.LENGTH
    while not isinstance(message := decode_to_front(slow.recv()), Refused):
        pass
    assert "did not read" in message.message
    host.stopping = True
    thread.join(timeout=5)
    slow.close(linger=0)
    quick.connection.close()
    host.close()


def test_a_socket_that_somebody_removes_is_made_again(host: Host, peer: Peer, folder: Path) -> None:
    path = folder / runtime.SOCKET
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    peer.connection.send(Submit([request(1)]))
    peer.ends(1)  # who is connected stays so
    deadline = time.monotonic() + 5
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert path.stat().st_mode & 0o777 == 0o600
    late = Peer(folder)
    late.receive(EngineStats)
    late.connection.close()
