"""Whether NVIDIA's aiperf drives the server unmodified and measures what we do. Where it is not installed: skipped.

python -m venv AIPERF && AIPERF/bin/pip install aiperf
ROUNDHOUSE_AIPERF=AIPERF/bin/aiperf .venv/bin/python -m pytest tests/loadtests/test_aiperf.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from roundhouse.bench.scenario import NEVER_ENDS
from tests.loadtests.conftest import scenario_file
from tests.loadtests.test_bench import bench
from tests.server.conftest import ROOT, Server

AIPERF = os.environ.get("ROUNDHOUSE_AIPERF") or shutil.which("aiperf")
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(AIPERF is None, reason="aiperf is not installed; ROUNDHOUSE_AIPERF=PATH names one"),
]
TEMPLATE = (
    '{"text_input": {{ text|tojson }}, "max_tokens": {{ max_tokens }}, "stream": true, '
    f'"exclude_input_in_output": true, "end_id": {NEVER_ENDS}}}'
)


def aiperf(server: Server, folder: Path, prompt: int, answer: int, streams: int, requests: int) -> dict[str, Any]:
    assert AIPERF is not None
    command = [AIPERF, "profile", "--model", "ensemble", "--url", server.http_url, "--endpoint-type", "template"]
    command += ["--custom-endpoint", "/v2/models/ensemble/generate_stream", "--streaming", "--ui", "none"]
    folder.mkdir()
    template = folder / "request.json"  # in a file: it splits its arguments at commas
    template.write_text(TEMPLATE)
    command += ["--extra-inputs", f"payload_template:{template}", "--extra-inputs", "response_field:text_output"]
    command += ["--tokenizer", str(ROOT / "models/tiny"), "--isl", str(prompt), "--osl", str(answer)]
    command += ["--concurrency", str(streams), "--request-count", str(requests), "--artifact-dir", str(folder)]
    # offline, it looks for the tokenizer in the hub's cache only, even if it is a folder
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.rglob("profile_export_aiperf.json")
    report: dict[str, Any] = json.loads(found.read_text())
    return report


def test_its_figures_are_ours(loaded: Server, tmp_path: Path) -> None:
    """4 streams of 5 ms a token. Its ITL is our TPOT, counted in tokens as its own tokenizer sees the text."""
    prompt, answer, streams = 32, 64, 4
    theirs = aiperf(loaded, tmp_path / "aiperf", prompt, answer, streams, 40)
    scenario = scenario_file(tmp_path, {"kind": "closed", "streams": streams}, prompt=prompt, answer=answer)
    target = f"{loaded.http_url}/ensemble"
    done, result = bench(tmp_path, target, "--scenario", str(scenario), "--deployment", str(loaded.deployment))
    assert done.returncode == 0, done.stderr
    ours = result["results"][0]["median"]
    assert theirs["request_count"]["avg"] == 40
    assert theirs["request_latency"]["p50"] == pytest.approx(ours["e2e_ms"]["p50"], rel=0.25)
    assert theirs["time_to_first_token"]["p50"] == pytest.approx(ours["ttft_ms"]["p50"], rel=0.5, abs=15)
    counted = theirs["output_sequence_length"]["avg"]
    tokens = (theirs["request_latency"]["avg"] - theirs["time_to_first_token"]["avg"]) / (answer - 1)
    assert theirs["inter_token_latency"]["avg"] * (counted - 1) / (answer - 1) == pytest.approx(tokens, rel=0.1)
    assert tokens == pytest.approx(ours["tpot_ms"]["mean"], rel=0.25)
