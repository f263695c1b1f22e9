"""Which server a front door joins, and who is let in."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from roundhouse.deployment import OpenAi
from roundhouse.engine import runtime
from roundhouse.engine.runtime import ServerRecord
from roundhouse.openai import guard
from roundhouse.openai.guard import Guard, api_keys
from roundhouse.openai.server import DoorError, find_server, same_address


@pytest.mark.parametrize(
    ("listening", "wanted", "same"),
    [
        ("127.0.0.1:8001", "127.0.0.1:8001", True),
        ("127.0.0.1:8001", "localhost:8001", True),
        ("0.0.0.0:8001", "127.0.0.1:8001", True),
        ("127.0.0.1:8001", "127.0.0.1:8002", False),
        ("10.0.0.1:8001", "127.0.0.1:8001", False),
        ("127.0.0.1:8001", "gpu-7:8001", False),
    ],
)
def test_addresses_of_this_machine_are_one(listening: str, wanted: str, same: bool) -> None:
    assert same_address(listening, wanted) is same


def test_the_server_of_a_deployment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = tmp_path / "d.yaml"
    records = {
        1: ServerRecord(str(deployment), "127.0.0.1:1", "http://m"),
        2: ServerRecord("/other.yaml", "127.0.0.1:2", "http://m"),
    }
    monkeypatch.setattr(runtime, "servers", lambda: records)
    assert find_server(deployment, None)[0] == find_server(deployment, "localhost:1")[0] == 1
    with pytest.raises(DoorError, match=r"that server runs /other.yaml"):
        find_server(deployment, "localhost:2")
    records[3] = ServerRecord(str(deployment), "127.0.0.1:3", "http://m")
    with pytest.raises(DoorError, match=r"choose one with --grpc-url: 127.0.0.1:1, 127.0.0.1:3"):
        find_server(deployment, None)
    assert find_server(deployment, "localhost:3")[0] == 3


def test_a_server_announces_itself() -> None:
    record = ServerRecord("/d.yaml", "127.0.0.1:1", "http://m")
    runtime.announce(os.getpid(), record)
    assert runtime.servers()[os.getpid()] == record
    (runtime.runtime_dir(os.getpid()) / runtime.SERVER).unlink()
    assert os.getpid() not in runtime.servers()


def test_keys_come_from_the_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guard.API_KEY, raising=False)
    assert api_keys(None) == []
    monkeypatch.setenv(guard.API_KEY, "a")
    (from_environment,) = api_keys(None)
    (tmp_path / "keys").write_text("a\nb\n")
    assert api_keys(str(tmp_path / "keys"))[0] == from_environment
    assert len(api_keys(str(tmp_path / "keys"))) == 2
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="has no API key in it"):
        api_keys(str(tmp_path / "keys"))


class Hall:
    """What the guard needs of the door."""

    def __init__(self, **section: Any) -> None:
        self.open = 0
        self.responses: list[tuple[str, int]] = []
        self.metrics = self
        self.deployment = self
        self.openai_section = OpenAi(**section)

    def responded(self, path: str, status: int) -> None:
        self.responses.append((path, status))


def test_a_client_that_leaves_before_its_answer_is_499(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        assert (await receive())["type"] == "http.disconnect"

    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{}"}]

    async def receive() -> Any:
        return messages.pop()

    hall: Any = Hall()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    with caplog.at_level(logging.INFO, "roundhouse.openai.access"):
        asyncio.run(Guard(app, hall)(scope, receive, None))  # type: ignore[arg-type]
    assert hall.responses == [("unknown", 499)]
    assert hall.open == 0
    assert " 499 " in caplog.text
