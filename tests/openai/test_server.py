"""Which server a front door joins, and who is let in."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from roundhouse.deployment import OpenAi
from roundhouse.engine import runtime
from roundhouse.engine.runtime import ServerRecord
from roundhouse.openai import guard
from roundhouse.openai.app import create
from roundhouse.openai.errors import ApiError
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
        self.refusals = 0
        self.metrics = self
        self.deployment = self
        self.openai_section = OpenAi(**section)

    def responded(self, path: str, status: int) -> None:
        self.responses.append((path, status))

    def rejected(self) -> None:
        self.refusals += 1


def visit(app: Any, path: str = "/v1/completions") -> list[dict[str, Any]]:
    """What a client of `app` is sent."""
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"model": "tiny", "prompt": "a"}'}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    asyncio.run(app(scope, receive, send))
    return sent


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


def test_a_bug_is_told_logged_and_counted_as_500(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hall):
        models = ("tiny",)
        joined = None

        def check_model(self, name: str) -> None:
            raise ZeroDivisionError("of a prompt")

    hall: Any = Broken()
    with caplog.at_level(logging.INFO, "roundhouse.openai.access"):
        start, body = visit(create(hall))
    assert start["status"] == 500
    request_id = dict(start["headers"])[b"x-request-id"].decode()
    assert json.loads(body["body"])["error"]["code"] == "internal_error"
    assert hall.responses == [("/v1/completions", 500)]
    assert hall.open == hall.refusals == 0
    bug, line = caplog.messages
    assert f"/v1/completions id={request_id} unexpected error: ZeroDivisionError at test_server.py" in bug
    assert "of a prompt" not in bug
    assert " 500 " in line


def test_a_bug_in_the_middle_of_an_answer_breaks_it_off() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise ZeroDivisionError

    hall: Any = Hall()
    with pytest.raises(ZeroDivisionError):
        visit(Guard(app, hall))
    assert hall.responses == [("unknown", 200)]


@pytest.mark.parametrize(
    ("path", "status", "answered", "refusals"),
    [
        ("/v1/completions", 400, False, 1),
        ("/v1/chat/completions", 404, False, 1),  # the model
        ("/v1/chat/completions", 422, False, 1),
        ("/v1/completions", 413, False, 1),
        ("/v1/completions", 400, True, 0),  # by the engine: counted as its answer closes
        ("/v1/completions", 405, False, 0),
        ("/v1/completions", 503, False, 0),
        ("/v1/models/x", 404, False, 0),
        ("/tokenize", 400, False, 0),
    ],
)
def test_prompts_that_the_door_refuses_are_counted(path: str, status: int, answered: bool, refusals: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if answered:
            scope["state"]["tokens"] = (1, 0)
        await ApiError(status, "no").response()(scope, receive, send)

    hall: Any = Hall()
    visit(Guard(app, hall), path)
    assert hall.refusals == refusals
