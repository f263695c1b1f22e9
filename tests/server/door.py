"""An open front door for the tests, and how to ask it something."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import requests

from tests.server.client import until
from tests.server.conftest import Server, free_ports

KEY = "sk-test"


@dataclass
class Door:
    """An open front door."""

    url: str
    log: Path

    @cached_property
    def sdk(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {KEY}", **options.pop("headers", {})}
        return requests.post(self.url + path, json=body, headers=headers, timeout=30, **options)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def ready(self) -> bool:
        with suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/ready", timeout=5).status_code == 200
        return False


@contextmanager
def opened(server: Server, log: Path) -> Iterator[Door]:
    """`roundhouse openai` in front of a running server."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "roundhouse.cli", "openai", str(server.deployment), "--port", str(port)]
    command += ["--grpc-url", server.grpc_url]
    with log.open("w") as file:
        environment = {**os.environ, "ROUNDHOUSE_API_KEY": KEY}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    door = Door(f"http://127.0.0.1:{port}", log)
    try:
        until(door.ready, 60, f"the front door is open\n{log.read_text()}")
        yield door
    finally:
        door.sdk.close()
        process.terminate()
        assert process.wait(timeout=30) == 0, log.read_text()
