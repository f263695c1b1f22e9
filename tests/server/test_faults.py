"""What happens when clients, the engine or the server go away."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from tritonclient.utils import InferenceServerException

from tests.server import client
from tests.server.client import ask, gauge, generate, metrics, opened, until
from tests.server.conftest import Start

pytestmark = pytest.mark.server
LONG = {"text_input": "copy: " + "word " * 20, "max_tokens": 4000, "stream": True, "end_id": 1048576}
SLOW = {"kind": "synthetic", "tokens_per_second_per_sequence": 100}
LIMITS = {"max_batch_size": 64, "max_seq_len": 8192, "queue": 16}


def idle(server: Any) -> bool:
    return gauge(server, "active") == 0 and gauge(server, "used") == 0


@pytest.mark.parametrize(("model", "seconds"), [("tensorrt_llm_bls", 1.0), ("tensorrt_llm", 1.0), ("ensemble", 3.0)])
def test_a_client_that_goes_away_frees_its_slot(synthetic: Any, model: str, seconds: float) -> None:
    inputs = dict(LONG)
    if model == "tensorrt_llm":
        inputs = {"input_ids": [7] * 20, "input_lengths": 20, "request_output_len": 4000, "streaming": True}
    with opened(synthetic, model, inputs) as stream:
        next(stream.replies())
        until(lambda: gauge(synthetic, "active") == 1, 2, "the gauge")
    until(lambda: idle(synthetic), seconds + 0.5, "idle")  # gauges are up to 0.5 s old


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
def test_an_http_client_that_goes_away_frees_its_slot(synthetic: Any, model: str) -> None:
    url = f"{synthetic.http_url}/v2/models/{model}/generate_stream"
    with requests.post(url, json={**LONG, "end_id": 1048576}, stream=True, timeout=30) as response:
        next(response.iter_lines())
    until(lambda: idle(synthetic), 3.5, "idle")


def test_fifty_disconnects_leave_nothing_behind_and_sigterm_drains(start: Start) -> None:
    server = start({"engine": SLOW, "limits": LIMITS})
    for model in ("ensemble", "tensorrt_llm_bls"):
        for _ in range(50):
            with opened(server, model, LONG) as stream:
                next(stream.replies())
        until(lambda: idle(server), 3.5, f"idle after disconnects of {model}")
    replies: list[client.Reply] = []

    def live() -> None:
        with opened(server, "ensemble", {**LONG, "max_tokens": 200}) as stream:
            replies.extend(stream.replies())

    thread = threading.Thread(target=live)
    thread.start()
    until(lambda: replies, 5, "the first token of the live stream")
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    refused = False
    try:
        refused = generate(server, "ensemble", text_input="x", max_tokens=1).status_code != 200
    except requests.ConnectionError:
        refused = True
    thread.join(timeout=20)
    ended = time.monotonic()
    assert server.process.wait(timeout=20) == 0
    assert time.monotonic() - ended < 5
    assert refused
    assert replies[-1].error is None
    assert replies[-1].final
    assert len(replies) > 150  # 200 tokens, one by one


def test_the_engine_killed_under_32_streams_comes_back(start: Start, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    server = start({"engine": SLOW, "limits": LIMITS}, "--ready-file", str(ready))
    until(ready.exists, 5, "the ready file")
    ended: list[tuple[float, Any]] = []
    begun = threading.Barrier(33)

    def live(model: str) -> None:
        with opened(server, model, LONG) as stream:
            replies = stream.replies()
            next(replies)
            begun.wait(timeout=20)
            last = list(replies)[-1]
            ended.append((last.at, last.error))

    threads = [
        threading.Thread(target=live, args=("ensemble" if number % 2 else "tensorrt_llm_bls",)) for number in range(32)
    ]
    for thread in threads:
        thread.start()
    begun.wait(timeout=20)
    until(lambda: gauge(server, "active") == 32, 3, "32 active requests")
    killed = time.monotonic()
    engine = server.engine()
    engine.suspend()  # so that it takes a moment to be noticed, and to be started again
    engine.kill()
    until(lambda: not ready.exists(), 2, "the end of the ready file")
    for thread in threads:
        thread.join(timeout=10)
    assert len(ended) == 32
    assert all(error is not None and "started again" in str(error) for _, error in ended)
    assert max(at for at, _ in ended) - killed < 2
    until(lambda: generate(server, "ensemble", text_input="x", max_tokens=1).status_code == 200, 10, "the engine")
    until(ready.exists, 5, "the ready file again")
    assert metrics_sum(server, "roundhouse_engine_restarts_total") >= 1
    assert metrics_sum(server, "roundhouse_failed_total") >= 32


def metrics_sum(server: Any, name: str) -> float:
    until(lambda: any(key.startswith(name) for key in metrics(server)), 3, name)
    time.sleep(0.6)  # counters are published twice a second
    return sum(value for key, value in metrics(server).items() if key.startswith(name))


def test_past_the_queue_requests_are_refused_at_once(start: Start) -> None:
    limits = {"max_batch_size": 2, "max_seq_len": 8192, "queue": 2}
    server = start({"engine": SLOW, "limits": limits})
    streams = [opened(server, "tensorrt_llm_bls", LONG) for _ in range(4)]
    entered = [stream.__enter__() for stream in streams]
    try:
        next(entered[0].replies())
        until(lambda: gauge(server, "waiting") == 2, 3, "a full queue")
        for model in ("tensorrt_llm_bls", "ensemble"):
            begun = time.monotonic()
            with pytest.raises(InferenceServerException, match="Exceeds maximum queue size of 2") as caught:
                ask(server, model, text_input="x", max_tokens=1)
            assert time.monotonic() - begun < 1
            assert caught.value.status() in (None, "StatusCode.UNAVAILABLE")  # a stream's errors carry text only
            reply = generate(server, model, text_input="x", max_tokens=1)
            assert reply.status_code >= 400
            assert "Exceeds maximum queue size of 2" in reply.json()["error"]
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    until(lambda: idle(server), 2, "idle")


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
def test_more_sequences_than_queue_and_engine_hold_are_refused_as_one(synthetic: Any, model: str) -> None:
    with opened(synthetic, model, {"text_input": "x", "max_tokens": 1, "num_return_sequences": 100}) as stream:
        reply = stream.queue.get(timeout=10)
    assert "Exceeds maximum queue size of 16" in str(reply.error)
    assert "100 sequences" in str(reply.error)


def test_an_engine_that_cannot_load_fails_the_start_with_its_reason(tmp_path: Any) -> None:
    import subprocess
    import sys

    from tests.server.conftest import free_ports, write_deployment

    path = write_deployment(tmp_path, {"engine": {"kind": "synthetic", "fail_load": "no such luck"}})
    http, grpc, metrics_port = map(str, free_ports(3))
    command = [sys.executable, "-m", "roundhouse.cli", "serve", str(path), "--http-port", http, "--grpc-port", grpc]
    done = subprocess.run([*command, "--metrics-port", metrics_port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no such luck" in done.stderr
