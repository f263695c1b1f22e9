"""The load of scripts/bench_gpu.py, on an engine that needs no GPU."""

from __future__ import annotations

import json
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_report
import psutil
import pytest
import yaml

from roundhouse.engine.protocol import FinishReason, Output
from tests.server.conftest import Server

pytestmark = pytest.mark.server


@pytest.fixture
def served(loaded: Server) -> list[bench_gpu.Served]:
    process = psutil.Process(loaded.process.pid)
    return [bench_gpu.Served(name, name, "grpc", loaded.grpc_url, process) for name in ("tensorrt_llm_bls", "ensemble")]


@pytest.fixture
def prompts() -> bench_gpu.Prompts:
    return bench_gpu.Prompts(list("abcdefgh"), [f" of number {number}" for number in range(64)])


def test_clients_start_together(served: list[bench_gpu.Served], prompts: bench_gpu.Prompts) -> None:
    """What they import takes seconds on two cores: what is measured must not begin with the first that is done."""
    streams, rounds = 16, 2
    run = bench_gpu.run_load(served[0], streams, rounds, prompts)
    assert len(run.answers) == streams * rounds
    assert run.server > 0
    assert run.client > 0
    first = sorted(answer.sent for answer in run.answers)[:streams]
    assert first[-1] - first[0] < 1.0


def test_what_is_served_is_loaded_in_turn(
    served: list[bench_gpu.Served], prompts: bench_gpu.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "ROUNDS", {64: 1})
    measured = list(bench_gpu.measure(served, prompts, Namespace(streams=[4], repeats=2, client_cores={0})))
    assert [(name, streams) for name, streams, _ in measured] == [("tensorrt_llm_bls", 4), ("ensemble", 4)]
    for _, _, point in measured:
        assert len(point["runs"]) == 2
        assert point["answers"] == 2 * 4
        # no stream gets more than 200 tokens a second
        assert 100 < point["tokens_per_second"] < 4 * 200
        assert point["ttft_ms"]["p50"] < point["end_to_end_ms"]["p50"]


class CountsWords(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose tokens are words."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"usage": {"prompt_tokens": len(asked["prompt"].split())}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_reads_shorter_prompts_is_not_measured() -> None:
    """It would have less to do than the others."""
    whole = "of many words " * ((bench_gpu.PROMPT - 1) // 3) + "in all"
    prompts = bench_gpu.Prompts(["a ", "an "], [whole[len("of ") :]] * 4)
    with HTTPServer(("127.0.0.1", 0), CountsWords) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        one = bench_gpu.Served("vllm-rust", "model", "sse", address, psutil.Process())
        bench_gpu.check_lengths(one, prompts)
        prompts.bodies[3] += " more"
        with pytest.raises(ValueError, match="vllm-rust: a prompt of 512 tokens has 513 there"):
            bench_gpu.check_lengths(one, prompts)
        server.shutdown()


def test_the_time_to_a_first_token_is_told_by_its_parts(
    served: list[bench_gpu.Served], prompts: bench_gpu.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one stream, where nobody waits for anybody."""
    monkeypatch.setattr(bench_gpu, "ROUNDS", {1: 3, 64: 1})
    measured = list(bench_gpu.measure(served, prompts, Namespace(streams=[1, 2], repeats=1, client_cores=None)))
    alone = {name: point for name, streams, point in measured if streams == 1}
    for point in alone.values():
        parts = point["first_token_ms"]
        assert set(parts) == {"to_front", "to_engine", "in_engine", "to_client"}
        assert min(parts.values()) > 0
        assert sum(parts.values()) < 3 * point["ttft_ms"]["p95"]  # of other answers
    assert all("first_token_ms" not in point for _, streams, point in measured if streams == 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--targets", "roundhouse,vlm-4"], "--targets: unknown vlm-4"),
        (["--targets", "raw,roundhouse", "--side-by-side"], "raw has no server"),
        (["--models", "ensembel"], "--models: unknown ensembel"),
        (["--responses-per-second", "4000,1000"], "--responses-per-second: several are for --side-by-side"),
        (
            ["--side-by-side", "--targets", "roundhouse,vllm-4,vllm-rust", "--memory-fraction", "0.32"],
            "3 servers at once may have 0.94 of the GPU together; give each at most 0.31",
        ),
        (
            ["--side-by-side", "--targets", "roundhouse", "--responses-per-second", "9,8", "--memory-fraction", "0.5"],
            "2 servers at once",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", *options])
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.main()
    assert said in capsys.readouterr().err


def test_servers_of_several_paces_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed: list[dict[str, Any]] = []

    @contextmanager
    def started(command: list[str], *_: Any) -> Iterator[psutil.Process]:
        if "roundhouse.cli" in command:
            deployed.append(yaml.safe_load(Path(command[command.index("serve") + 1]).read_text()))
        yield psutil.Process()

    def measure(served: list[bench_gpu.Served], *_: Any) -> Iterator[bench_gpu.Served]:
        yield from served

    monkeypatch.setattr(bench_gpu, "started", started)
    monkeypatch.setattr(bench_gpu, "measure", measure)
    asked = {"models": ["ensemble"], "responses_per_second": [4000, 1000], "fronts": 4, "precision": "fp8"}
    args = Namespace(**asked, model=tmp_path, logs=tmp_path, memory_fraction=0.3)
    served: Any = list(bench_gpu.servers(["roundhouse", "vllm-4"], bench_gpu.Prompts([], []), args))
    assert [(one.name, one.model) for one in served] == [
        ("ensemble@4000", "ensemble"), ("ensemble@1000", "ensemble"), ("vllm-4", "vllm-4"),
    ]  # fmt: skip
    assert [one["fronts"]["responses_per_second"] for one in deployed] == [4000, 1000]
    assert "1000 responses a second" in gpu_report.title("ensemble@1000")
    assert list(gpu_report.ordered({"vllm-4": 3, "ensemble@1000": 2, "ensemble": 1}).values()) == [1, 2, 3]


def test_what_was_measured_is_kept_when_the_rest_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device time may end in the middle of a group of servers."""

    def servers(names: Any, prompts: Any, args: Any) -> Iterator[tuple[str, int, dict[str, Any]]]:
        yield "ensemble", 4, {"tokens_per_second": 7.0}
        raise RuntimeError("the server has ended")

    (tmp_path / "tokenizer_config.json").touch()
    for name, given in {"servers": servers, "make_prompts": lambda *_: None, "versions": dict}.items():
        monkeypatch.setattr(bench_gpu, name, given)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    options = ["--side-by-side", "--targets", "roundhouse", "--model", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", *options])
    bench_gpu.main()
    written = json.loads((tmp_path / "gpu-fp8-side-by-side.json").read_text())
    assert written["targets"] == {"ensemble": {"4": {"tokens_per_second": 7.0, "memory_fraction": 0.9}}}
    assert written["settings"]["fronts"] == {"preprocessing": 4, "tensorrt_llm": 4, "tensorrt_llm_bls": 4}


def test_clients_keep_to_the_cores_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[frozenset[int]] = []
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: kept.append(cores))
    bench_gpu.prepare_client(None, None)
    assert kept == []
    bench_gpu.prepare_client(None, bench_gpu.core_list("10-12,26"))
    assert kept == [{10, 11, 12, 26}]


class Stepped:
    """An engine whose every step ends one request, and that waits for it long enough. Notes when requests came in."""

    def __init__(self) -> None:
        self.live: list[int] = []
        self.meanwhile = lambda: None
        self.stepping = False
        self.came: list[str] = []

    def submit(self, request: Any) -> None:
        self.live.append(request.id)
        self.came.append("meanwhile" if self.stepping else "between steps")

    def unfinished(self) -> int:
        return len(self.live)

    def step(self) -> list[Output]:
        ended = self.live.pop(0)
        self.stepping = True
        self.meanwhile()
        self.stepping = False
        return [Output(ended, [1] * bench_gpu.ANSWER, finish_reason=FinishReason.LENGTH)]

    def close(self) -> None:
        pass


def test_the_bare_engine_gets_requests_between_its_steps_or_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roundhouse.deployment.load", lambda _: None)
    out = tmp_path / "raw.json"
    for name, when in {"raw": "between steps", "raw-attended": "meanwhile"}.items():
        engine = Stepped()
        monkeypatch.setattr("roundhouse.engine.load.load_engine", lambda _, engine=engine: engine)
        bench_gpu.step_engine("deployment.yaml", name, "4", "1", str(out))
        ((told, streams, point),) = json.loads(out.read_text())
        assert (told, streams, point["answers"]) == (name, 4, 4 * bench_gpu.rounds(4))
        first = engine.came[-point["answers"] :][:4]
        assert first == ["between steps"] * 4, "there was no step yet"
        assert set(engine.came[-point["answers"] :][4:]) == {when}
