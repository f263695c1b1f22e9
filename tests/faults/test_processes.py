"""Clients that misbehave, servers that meet, processes that are killed or stopped at the wrong time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import requests
from tritonclient.utils import InferenceServerException

from roundhouse import serve, tritonserver
from roundhouse.bench.servers import free_ports
from tests.faults.conftest import FAST, LIMITS, Start
from tests.server.client import answer, ask, gauge, generate, until
from tests.server.conftest import Server, write_deployment

pytestmark = pytest.mark.server
LONG = {"text_input": "a b c", "max_tokens": 4000, "end_id": 1048576, "stream": True}


def command(server: Server, path: Path) -> list[str]:
    """What starts a second server on the ports of the first."""
    ports = [str(urlsplit(url).port or url.rpartition(":")[2]) for url in (server.http_url, server.metrics_url)]
    return [
        *(sys.executable, "-m", "roundhouse.cli", "serve", str(path)),
        *("--http-port", ports[0], "--metrics-port", ports[1], "--grpc-port", server.grpc_url.rpartition(":")[2]),
    ]


def test_a_second_server_on_the_same_ports_says_so(shared: Server, tmp_path: Path) -> None:
    path = write_deployment(tmp_path, {"engine": FAST, "limits": LIMITS})
    done = subprocess.run(command(shared, path), capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "already in use" in done.stderr
    assert answer(shared, "ensemble", "a b", 4)


def test_two_servers_side_by_side_share_nothing(shared: Server, start: Start) -> None:
    other = start()
    assert answer(shared, "ensemble", "left", 8) != answer(other, "ensemble", "right", 8)
    other.engine().kill()
    assert answer(shared, "ensemble", "left", 8)


def test_a_server_says_how_triton_ended(start: Start) -> None:
    server = start()
    triton = next(one for one in psutil.Process(server.process.pid).children() if one.name() == "tritonserver")
    triton.send_signal(signal.SIGSEGV)
    assert server.process.wait(timeout=30) == 1
    assert "tritonserver was ended by SIGSEGV" in server.log.read_text()


@pytest.mark.parametrize(("number", "crash"), [(11, "SIGSEGV"), (6, "SIGABRT"), (15, None)])
def test_a_triton_that_hangs_in_its_crash_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, crash: str | None
) -> None:
    """Its handler prints this line and then a stack, for which it may wait for a lock of the heap that it holds itself.
    Of SIGTERM it prints the same, and is left alone."""
    binary = tmp_path / "tritonserver"
    binary.write_text(f'#!/bin/sh\necho "Signal ({number}) received." >&2\nexec sleep 60\n')
    binary.chmod(0o700)
    monkeypatch.setattr(tritonserver, "find", lambda: tritonserver.Triton(binary, tmp_path, {"PATH": os.defpath}))
    path = write_deployment(tmp_path, {"engine": FAST, "limits": LIMITS})
    server = serve.Server(path, serve.Addresses(*free_ports(4)))
    try:
        assert server.ended(3 * serve.CRASH_SECONDS) == (crash is not None)
        assert crash is None or f"tritonserver was ended by {crash}" in server.why()
    finally:
        server.kill()


def test_thousands_of_half_open_connections(shared: Server) -> None:
    """Some say nothing, some stop in the middle of a request; all stay open while others are served."""
    http = urlsplit(shared.http_url).port or 0
    grpc = int(shared.grpc_url.rpartition(":")[2])
    with ExitStack() as stack:
        for number in range(2000):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", grpc if number % 2 else http), timeout=5))
            if number % 4 == 0:
                sock.sendall(b"POST /v2/models/ensemble/generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        started = time.monotonic()
        for model in ("ensemble", "tensorrt_llm_bls"):
            assert answer(shared, model, "a b", 8)
            assert generate(shared, model, text_input="a b", max_tokens=8).status_code == 200
        assert time.monotonic() - started < 5
    until(lambda: generate(shared, "ensemble", text_input="a", max_tokens=1).status_code == 200, 5, "an answer")


def test_a_client_that_does_not_read_holds_nobody_up(shared: Server) -> None:
    url = f"{shared.http_url}/v2/models/tensorrt_llm_bls/generate_stream"
    with ExitStack() as stack:
        for _ in range(8):
            response = stack.enter_context(requests.post(url, json=LONG, stream=True, timeout=30))
            assert response.status_code == 200  # and no byte of the answer is read
        started = time.monotonic()
        assert answer(shared, "tensorrt_llm_bls", "a b", 40)
        assert time.monotonic() - started < 2
    until(lambda: gauge(shared, "active") == 0, 5, "idle")


@pytest.mark.parametrize(
    "inputs",
    [
        {"text_input": "x" * 20_000_000, "max_tokens": 4},
        {"text_input": "x", "max_tokens": 2**31 - 1},
        {"text_input": "x", "max_tokens": 4, "stop_words": ["y" * 1_000_000]},
        {"text_input": "x", "max_tokens": 8000, "num_return_sequences": 128},
    ],
    ids=["prompt of 20 MB", "endless answer", "huge stop word", "many sequences"],
)
def test_requests_that_want_too_much_are_refused(shared: Server, inputs: dict[str, object]) -> None:
    with pytest.raises(InferenceServerException):
        ask(shared, "tensorrt_llm_bls", **inputs)
    # of many sequences some got a place in the queue, until their client's end is noticed
    until(lambda: generate(shared, "tensorrt_llm_bls", text_input="a b", max_tokens=4).status_code == 200, 5, "room")
    until(lambda: gauge(shared, "active") == 0, 5, "idle")


def test_a_hundred_million_token_ids_are_refused_before_they_become_python_integers(shared: Server) -> None:
    (front,) = [p for p in shared.processes("triton_python_backend_stub") if "/tensorrt_llm/1/" in p.cmdline()[1]]
    before = front.memory_full_info().uss
    ids = np.ones((1, 20_000_000), dtype=np.int32)
    with pytest.raises(InferenceServerException, match="max_seq_len"):
        ask(shared, "tensorrt_llm", input_ids=ids, input_lengths=20_000_000, request_output_len=4)
    assert front.memory_full_info().uss - before < 100e6


def test_everything_ends_with_a_serve_that_is_killed(start: Start) -> None:
    server = start()
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 6
    regions = [Path("/dev/shm") / p.cmdline()[2] for p in family if "triton_python_backend_stub" in p.cmdline()[0]]
    server.process.kill()
    server.process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    for region in regions:  # nobody is left who could
        region.unlink(missing_ok=True)
    assert alive == []


def test_sigterm_while_it_loads(tmp_path: Path, shared: Server) -> None:
    from tests.server.conftest import free_ports

    path = write_deployment(tmp_path, {"engine": {**FAST, "load_seconds": 60}, "limits": LIMITS})
    http, grpc, metrics = map(str, free_ports(3))
    options = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    with subprocess.Popen([sys.executable, "-m", "roundhouse.cli", "serve", str(path), *options]) as process:
        me = psutil.Process(process.pid)

        def engine_is_there() -> bool:
            with suppress(psutil.Error):  # one of them may just have ended
                return any("engine.host" in " ".join(p.cmdline()) for p in me.children(recursive=True))
            return False

        until(engine_is_there, 20, "the engine")
        family = me.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
    _, alive = psutil.wait_procs(family, timeout=8)
    assert alive == []
    # a model that was starting just then may still have started an engine: it ends as well
    until(lambda: not any(str(path) in command for command in commands()), 15, "the end of all that was started")


def commands() -> Iterator[list[str]]:
    """The command lines of all processes."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield process.cmdline()
