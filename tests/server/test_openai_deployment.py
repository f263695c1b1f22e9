"""A deployment that opens the front door itself: what its keys do, and what happens when a part of it ends.

One server for all tests, which the last of them ends.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from tests.server.client import until
from tests.server.conftest import Server, write_deployment
from tests.server.door import KEY, Door

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Door]]:
    """A server whose deployment opens the door itself: fast, with keys in a file, TLS and a small size limit."""
    folder = tmp_path_factory.mktemp("whole")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "keys").write_text(f"sk-other\n{KEY}\n")
    door = {"api_key_file": "keys", "tls_certificate": "cert.pem", "tls_key": "key.pem", "max_body_bytes": 20_000}
    door |= {"access_log": False, "log_prompts": True}
    deployment = {
        "engine": {"kind": "synthetic"},
        "limits": {"max_seq_len": 1024},
        "openai": {**door, "models": ["a", "b"], "workers": 2},
    }
    with Server(write_deployment(folder, deployment), folder / "server.log") as server:
        url = server.openai_url.replace("http", "https")
        door = Door(url, server.log)
        with secured(server) as session:
            until(lambda: all_ready(session, door), 30, "the door is open")
        yield server, door


def secured(server: Server) -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # a machine's own certificates would win over `verify`
    session.verify = str(server.deployment.parent / "cert.pem")
    session.headers["Authorization"] = f"Bearer {KEY}"
    return session


def test_the_deployment_opens_the_door(whole: tuple[Server, Door]) -> None:
    server, door = whole
    with secured(server) as session:
        names = [model["id"] for model in session.get(f"{door.url}/v1/models", timeout=10).json()["data"]]
        assert names == ["a", "b"]
        described = session.get(f"{door.url}/openapi.json", timeout=10).json()["components"]["schemas"]
        assert described["Completion"]["properties"]["model"]["enum"] == ["a", "b"]
        large = {"model": "a", "prompt": "a" * 30_000}
        reply = session.post(f"{door.url}/v1/completions", json=large, timeout=10)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        parts = iter([b"[" * 15_000] * 4)  # of unknown length
        assert session.post(f"{door.url}/v1/completions", data=parts, timeout=10).status_code == 413
        ask = {"model": "b", "prompt": "said aloud", "max_tokens": 2}
        assert session.post(f"{door.url}/v1/completions", json=ask, timeout=10).json()["model"] == "b"
        until(lambda: "said aloud" in server.log.read_text(), 2, "the prompt in the log")
        assert "completion_tokens=" not in server.log.read_text()
        del session.headers["Authorization"]
        assert session.get(f"{door.url}/v1/models", timeout=10).status_code == 401


def test_a_worker_that_dies_is_replaced(whole: tuple[Server, Door]) -> None:
    server, door = whole
    workers = server.processes("roundhouse.openai.worker")
    assert len(workers) == 2
    workers[0].kill()
    until(lambda: len({*server.processes("roundhouse.openai.worker")} - {*workers}) == 1, 10, "a new worker")
    with secured(server) as session:
        until(lambda: all_ready(session, door), 20, "both are ready")


def all_ready(session: requests.Session, door: Door) -> bool:
    with suppress(requests.ConnectionError):
        headers = {"Connection": "close"}  # either of the two workers, by chance
        return all(session.get(f"{door.url}/ready", headers=headers, timeout=5).ok for _ in range(20))
    return False


def test_an_engine_that_dies_is_503_until_it_is_back(whole: tuple[Server, Door]) -> None:
    server, door = whole
    body = {"model": "a", "prompt": "a b", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with secured(server) as session:
        with session.post(f"{door.url}/v1/completions", json=body, stream=True, timeout=30) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.engine().send_signal(signal.SIGKILL)
            events = [line for line in lines if line.startswith(b"data: {")]
        assert json.loads(events[-1].removeprefix(b"data: "))["error"]["type"] == "service_unavailable_error"
        reply = session.post(f"{door.url}/v1/completions", json=body, timeout=30)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert session.get(f"{door.url}/health", timeout=5).ok
        until(lambda: all_ready(session, door), 20, "ready again")
        assert session.post(f"{door.url}/v1/completions", json={**body, "stream": False}, timeout=30).ok


def test_fuzzing_finds_no_server_error(whole: tuple[Server, Door], tmp_path: Path) -> None:
    server, door = whole
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{door.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--max-examples", "25"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--generation-deterministic", "--no-color"]
    command += ["--tls-verify", str(server.deployment.parent / "cert.pem")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (tried,) = re.findall(r"(\d+) generated", done.stdout)
    assert int(tried) > 200, done.stdout


def test_sigterm_finishes_what_is_open(whole: tuple[Server, Door]) -> None:
    """The last test of this server."""
    server, door = whole
    body = {"model": "a", "prompt": "a b", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 100}
    with secured(server) as session:
        with session.post(f"{door.url}/v1/completions", json=body, stream=True, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            refused = session.post(f"{door.url}/v1/completions", json=body, timeout=10)
            assert refused.status_code == 503
            assert "stopping" in refused.json()["error"]["message"]
            received = b"\n".join(lines)
        assert received.rstrip().endswith(b"data: [DONE]")
        assert received.count(b'"finish_reason":"length"') == 100
    assert server.process.wait(timeout=30) == 0
