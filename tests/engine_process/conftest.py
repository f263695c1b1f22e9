"""Engine processes without Triton: a process that stands for the server, clients that stand for its fronts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from roundhouse.engine import runtime
from roundhouse.engine.client import EngineClient
from roundhouse.engine.protocol import Output, Request, Sampling

TINY = str(Path(__file__).parents[2] / "models/tiny")
GREEDY = Sampling(temperature=0.0)


def request(id: int, prompt: tuple[int, ...] = (5, 6, 7), max_tokens: int = 8, **settings: Any) -> Request:
    return Request(id=id, prompt=prompt, max_tokens=max_tokens, sampling=GREEDY, **settings)


def echo(prompt: tuple[int, ...], count: int) -> list[int]:
    """The synthetic engine's answer."""
    return [prompt[index % len(prompt)] for index in range(count)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """The process that the engine belongs to, with a folder for temporary files of its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


class Side:
    """A client, with the outputs that it got by request."""

    def __init__(self, client: EngineClient, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []  # engine processes
        self._closed = False
        self.got: dict[int, list[Output]] = {}

    def poll(self, seconds: float = 0.0) -> None:
        """At least once."""
        deadline = time.monotonic() + seconds
        while True:
            self._notice()
            for output in self.client.poll(0.01):
                self.got.setdefault(output.id, []).append(output)
            if time.monotonic() >= deadline:
                return

    def until(self, condition: Callable[[], Any], seconds: float = 20.0) -> float:
        """Poll until the condition holds; seconds that it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, "it did not happen in time"
            self.poll()
        return time.monotonic() - started

    def ended(self, id: int) -> bool:
        return bool(self.got.get(id)) and self.got[id][-1].last

    def tokens(self, id: int) -> list[int]:
        return [token for output in self.got.get(id, []) for token in output.tokens]

    def ask(self, made: Request) -> list[int]:
        self.client.submit([made])
        self.until(lambda: self.ended(made.id))
        last = self.got[made.id][-1]
        assert last.error is None, last.error
        return self.tokens(made.id)

    def close(self) -> None:
        """As if this front died."""
        if not self._closed:
            self._closed = True
            self._notice()
            self.client.close()

    def _notice(self) -> None:
        process = self.client._keeper._process
        if process is not None and process not in self.started:
            self.started.append(process)

    def engine(self) -> psutil.Process:
        return psutil.Process(int(runtime.read(self.folder / runtime.PID)))


Join = Callable[..., Side]


@pytest.fixture
def join(server: subprocess.Popen[bytes], tmp_path: Path) -> Iterator[Join]:
    """`join("front")` connects one more client; settings of the engine count for the first one."""
    path = tmp_path / "deployment.yaml"
    sides: list[Side] = []
    with ExitStack() as stack:

        def joined(name: str = "front", **engine: Any) -> Side:
            if not path.exists():
                deployment = {
                    "model": {"path": TINY},
                    "engine": {"kind": "synthetic", "tokens_per_second_per_sequence": 200, **engine},
                    "limits": {"max_batch_size": 8, "max_seq_len": 1000, "queue": 8},
                }
                path.write_text(yaml.safe_dump(deployment))
            client = EngineClient(path, name, server.pid, log=lambda text: print(f"{name}: {text}"))
            side = Side(client, runtime.runtime_dir(server.pid))
            stack.callback(side.close)
            sides.append(side)
            client.start()
            return side

        yield joined
        server.kill()
    for process in [process for side in sides for process in side.started]:
        process.wait(timeout=20)
