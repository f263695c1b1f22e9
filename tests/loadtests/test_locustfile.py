"""The locust command as users type it, against a real server."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.loadtests.conftest import LOADED, SHORT, scenario_file
from tests.server.client import metrics, until
from tests.server.conftest import Server, free_ports, write_deployment

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests/locustfile.py")]


@dataclass
class Result:
    code: int
    output: str
    summary: dict[str, Any]
    verdicts: list[dict[str, Any]]


def locust(folder: Path, scenario: Path, host: str, *options: str, deployment: Path) -> Result:
    summary = folder / "summary.json"
    command = [*LOCUST, "--headless", "-u", "4", "-r", "4", "-t", "1s", "--host", host, "--summary", str(summary)]
    command += ["--scenario", str(scenario), "--deployment", str(deployment), "--prompts", "100", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(summary.read_text()) if summary.exists() else {"summary": {}, "verdicts": []}
    return Result(done.returncode, done.stdout + done.stderr, report["summary"], report["verdicts"])


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "run_stats.csv").open(newline="") as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("client", ["grpc", "http"])
def test_streaming_users(loaded: Server, short: Path, tmp_path: Path, client: str) -> None:
    host = loaded.grpc_url if client == "grpc" else loaded.http_url
    prefix = str(tmp_path / "run")
    result = locust(
        tmp_path, short, host, "--client", client, "-t", "3s", "--csv", prefix, "--html", f"{prefix}.html",
        deployment=loaded.deployment,
    )  # fmt: skip
    assert result.code == 0, result.output
    finished = result.summary["finished"]
    assert finished > 4
    assert result.summary["seconds"] > 2, "start-up is no part of the run time"
    assert result.summary["failed"] == 0
    assert result.summary["ttft_ms"]["p50"] < result.summary["e2e_ms"]["p50"]
    assert result.summary["tpot_ms"]["p50"] > 4, "200 tokens a second a stream: 5 ms each"
    assert "SLO TTFT p95" in result.output
    assert all(verdict["met"] for verdict in result.verdicts)
    found = rows(tmp_path)
    for row in ("TTFT", "ITL", "TPOT", "end to end", "tokens/s (a rate, not ms)", "Aggregated"):
        ours, requests_ = int(found[row]["Request Count"]), int(found["request"]["Request Count"])
        assert 0 < ours == requests_, f"{row}: one entry a request, and no part in Aggregated"
    assert "TTFT" in (tmp_path / "run.html").read_text()


def test_unary_users_have_no_first_token(loaded: Server, short: Path, tmp_path: Path) -> None:
    result = locust(tmp_path, short, loaded.http_url, "--client", "unary", deployment=loaded.deployment)
    assert result.code == 0, result.output
    assert result.summary["finished"] > 4
    assert result.summary["ttft_ms"] == {}
    assert result.summary["tokens_per_response"] == SHORT["answer"]
    assert "not judged" in result.output


def test_a_missed_objective_is_an_exit_code(loaded: Server, short: Path, tmp_path: Path) -> None:
    strict = write_deployment(tmp_path, {**LOADED, "slo": {"ttft_ms": 0.01, "itl_ms": 5000}})
    result = locust(tmp_path, short, loaded.grpc_url, "-t", "3s", deployment=strict)
    assert result.code == 1
    assert [verdict["met"] for verdict in result.verdicts] == [False, True]
    assert "SLO TTFT p95" in result.output
    assert "MISSED" in result.output
    assert result.summary["goodput"] == 0


@pytest.mark.parametrize("client", ["grpc", "http"])
def test_failures_carry_the_servers_message(loaded: Server, short: Path, tmp_path: Path, client: str) -> None:
    host = loaded.grpc_url if client == "grpc" else loaded.http_url
    result = locust(tmp_path, short, host, "--client", client, "--model", "nobody", deployment=loaded.deployment)
    assert result.code == 1
    assert "unknown model" in result.output
    assert any("unknown model" in message for message in result.summary["errors"])
    assert not any(verdict["met"] for verdict in result.verdicts)


def test_several_processes_in_an_open_loop(loaded: Server, short: Path, tmp_path: Path) -> None:
    result = locust(
        tmp_path, short, loaded.grpc_url, "--processes", "2", "--rate", "20", "-u", "40", "-r", "40", "-t", "3s",
        deployment=loaded.deployment,
    )  # fmt: skip
    assert result.code == 0, result.output
    assert 20 <= result.summary["requests"] <= 90, "20 a second in all, not 20 for each process"


def test_aborts_reach_the_server(loaded: Server, tmp_path: Path) -> None:
    scenario = scenario_file(tmp_path, {"kind": "closed", "streams": 4}, answer=1500, abort={"share": 1, "after": 3})
    before = cancelled(loaded)
    result = locust(tmp_path, scenario, loaded.grpc_url, "--model", "tensorrt_llm_bls", deployment=loaded.deployment)
    assert result.summary["failed"] == 0
    assert result.summary["aborted"] > 4
    until(lambda: cancelled(loaded) - before >= result.summary["aborted"] - 4, 20, "cancelled in the engine")


def cancelled(server: Server) -> float:
    return sum(value for name, value in metrics(server).items() if name.startswith("roundhouse_cancelled_total"))


def test_the_web_ui_shows_a_ramp(loaded: Server, tmp_path: Path) -> None:
    scenario = scenario_file(tmp_path, {"kind": "ramp", "streams": [1, 3]})
    (port,) = free_ports(1)
    command = [*LOCUST, "--host", loaded.grpc_url, "--web-host", "127.0.0.1", "--web-port", str(port), "--autostart"]
    command += ["--scenario", str(scenario), "--deployment", str(loaded.deployment), "--prompts", "20", "-t", "8s"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        def get(path: str) -> Any:
            return requests.get(f"http://127.0.0.1:{port}{path}", timeout=10).json()

        def shown() -> bool:
            try:
                names = {row["name"] for row in get("/stats/requests")["stats"]}
                return {"TTFT", "ITL", "TPOT", "request"} <= names and bool(get("/slo")["verdicts"])
            except requests.ConnectionError:
                return False

        until(shown, 60, "the rows of the web UI")
        assert get("/slo")["summary"]["finished"] > 0
        until(lambda: get("/stats/requests")["user_count"] == 3, 60, "the second step of the ramp")
    finally:
        process.terminate()
        process.wait(timeout=30)


PIECE: dict[str, Any] = {"choices": [{"text": "two tokens "}]}


class Completions(BaseHTTPRequestHandler):
    """What an OpenAI-style server answers: chunks, then the usage."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream"]
        assert body["stream_options"]["include_usage"]
        if body["model"] != "known":
            error = json.dumps({"error": {"message": "no such model here", "type": "NotFoundError"}}).encode()
            self.send_response(404)
            self.send_header("Content-Length", str(len(error)))
            self.end_headers()
            self.wfile.write(error)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.answer(body)

    def answer(self, body: dict[str, Any]) -> None:
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
        self.events([PIECE] * (body["max_tokens"] // 2) + [usage])
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def events(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def answering(handler: type[Completions]) -> Iterator[str]:
    """Its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def completions() -> Iterator[str]:
    with answering(Completions) as url:
        yield url


@pytest.mark.parametrize(("model", "code"), [("known", 0), ("other", 1)])
def test_openai_users(completions: str, short: Path, tmp_path: Path, model: str, code: int) -> None:
    result = locust(
        tmp_path, short, completions, "--client", "openai", "--model", model,
        deployment=write_deployment(tmp_path, LOADED),
    )  # fmt: skip
    assert result.code == code, result.output
    if model == "known":
        assert result.summary["finished"] > 4
        assert result.summary["failed"] == 0
        assert result.summary["tokens_per_response"] == pytest.approx(2, abs=0.1)
    else:
        assert list(result.summary["errors"]) == ["HTTP 404: no such model here"]


@pytest.mark.parametrize("pieces", [0, 3])
@pytest.mark.parametrize("slo", [True, False])
def test_a_server_that_hangs_is_no_success(short: Path, tmp_path: Path, pieces: int, slo: bool) -> None:
    """It answers 12 requests, none of them if nothing is promised; then it says nothing more, or after some tokens."""
    over = threading.Event()
    numbers = itertools.count(0 if slo else 12)

    class Hangs(Completions):
        def answer(self, body: dict[str, Any]) -> None:
            if next(numbers) < 12:
                super().answer(body)
                return
            self.events([PIECE] * pieces)
            over.wait(30)
            self.close_connection = True

    deployment = {**LOADED, "slo": {"ttft_ms": 500, "itl_ms": 20}}
    if not slo:
        del deployment["slo"]
    with answering(Hangs) as url:
        result = locust(
            tmp_path, short, url, "--client", "openai", "--model", "known", "-t", "3s",
            deployment=write_deployment(tmp_path, deployment),
        )  # fmt: skip
        over.set()
    said = "no end in time" if pieces else "no first token"
    assert result.summary["requests"] == (16 if slo else 4)
    assert result.summary["seconds"] > 2, "up to the end of the test"
    if slo:
        assert result.code == 1, result.output
        assert result.summary["errors"] == {f"{said} by the end of the test": 4}
        assert not any(verdict["met"] for verdict in result.verdicts)
    else:
        assert result.code == (0 if pieces else 1), result.output
        assert result.summary["aborted"] == 4


def test_processes_share_the_prefixes_of_a_scenario(tmp_path: Path) -> None:
    prompts: list[str] = []

    class Notes(Completions):
        def answer(self, body: dict[str, Any]) -> None:
            prompts.append(body["prompt"])
            time.sleep(0.1)
            super().answer(body)

    prefix = {"tokens": 40, "groups": 2}
    scenario = scenario_file(tmp_path, {"kind": "closed", "streams": 4}, shared_prefix=prefix)
    with answering(Notes) as url:
        result = locust(
            tmp_path, scenario, url, "--client", "openai", "--model", "known", "--processes", "2",
            deployment=write_deployment(tmp_path, LOADED),
        )  # fmt: skip
    assert result.code == 0, result.output
    assert len({prompt[:60] for prompt in prompts}) == 2
    assert len(set(prompts)) == len(prompts) > 8, "each of them sends other sessions"


def test_what_is_wrong_is_said_at_the_start(tmp_path: Path) -> None:
    deployment = write_deployment(tmp_path, LOADED)
    long = scenario_file(tmp_path, {"kind": "closed", "streams": 1}, prompt=2000, answer=100)
    result = locust(tmp_path, long, "localhost:1", deployment=deployment)
    assert result.code != 0
    assert "2100 tokens" in result.output
    assert "limits.max_seq_len 2048" in result.output


def test_a_test_that_finished_nothing_is_no_success(loaded: Server, short: Path, tmp_path: Path) -> None:
    result = locust(tmp_path, short, loaded.grpc_url, "--rate", "0.0001", deployment=loaded.deployment)
    assert result.code == 1
    assert "no request was finished" in result.output
