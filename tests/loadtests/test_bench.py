"""`roundhouse bench` as users type it, against real servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loadtests.conftest import LOADED, scenario_file
from tests.server.conftest import Server, write_deployment

pytestmark = pytest.mark.server


def bench(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    output = folder / "out"
    command = [sys.executable, "-m", "roundhouse.cli", "bench", *options, "--output", str(output), "--seconds", "1"]
    done = subprocess.run([*command, "--warm-up", "0.3"], capture_output=True, text=True, timeout=120)
    found = output / "report.json"
    return done, json.loads(found.read_text()) if found.exists() else {}


def test_protocols_of_a_running_server_side_by_side(loaded: Server, tmp_path: Path) -> None:
    scenario = scenario_file(tmp_path, {"kind": "closed", "streams": 4}, shared_prefix={"tokens": 128})
    metrics = loaded.metrics_url.rpartition(":")[2]
    done, result = bench(
        tmp_path, "--compare", f"grpc://{loaded.grpc_url}?metrics={metrics}",
        f"{loaded.http_url}/tensorrt_llm_bls?metrics={metrics}", "--deployment", str(loaded.deployment),
        "--scenario", str(scenario), "--repeats", "2", "--processes", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for cell in result["results"]:
        median = cell["median"]
        assert median["failed"] == 0
        assert median["finished"] > 10, "4 streams of 16 tokens at 200 a second"
        assert median["tpot_ms"]["p50"] == pytest.approx(5, rel=0.5)
        assert median["output_tokens_per_second"] <= 4 * 200 * 1.1, "no more than the engine makes"
        assert median["server"]["kv_reuse_percent"] > 50, "128 of 152 tokens are a prefix that all share"
        assert median["client"]["processes"] == 2
        assert median["client"]["cores"] > 0
        assert all(run["slo"]["TTFT"]["met"] for run in cell["runs"])
    assert "against the first" in done.stdout
    assert "µs a response" in done.stdout
    assert "<svg" in (tmp_path / "out/report.html").read_text()


def test_a_deployment_is_started_for_it_and_judged(tmp_path: Path) -> None:
    strict = write_deployment(tmp_path, {**LOADED, "slo": {"ttft_ms": 0.01, "itl_ms": 5000}})
    scenario = scenario_file(tmp_path, {"kind": "closed", "streams": 4})
    done, result = bench(tmp_path, str(strict), "--scenario", str(scenario), "--rate", "10", "--check-slo")
    assert done.returncode == 1
    (cell,) = result["results"]
    assert cell["level"] == "10 requests/s"
    assert cell["median"]["finished"] > 2
    assert cell["median"]["server_cores"] > 0
    assert "TTFT missed" in done.stdout
    assert "outside of its SLO" in done.stdout


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    scenario = scenario_file(tmp_path, {"kind": "closed", "streams": 2})
    done, result = bench(tmp_path, "grpc://127.0.0.1:9", "--scenario", str(scenario))
    assert done.returncode == 1
    assert result["results"][0]["median"]["finished"] == 0
    assert "requests failed: UNAVAILABLE" in done.stdout


def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = write_deployment(tmp_path, {"model": {"path": "nowhere"}, "engine": {"kind": "synthetic"}})
    done, _ = bench(tmp_path, str(broken), "--scenario", str(scenario_file(tmp_path, {"kind": "closed", "streams": 1})))
    assert done.returncode == 1
    assert "nowhere: cannot be loaded" in done.stderr
