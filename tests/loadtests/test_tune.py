"""`roundhouse tune` as users type it: real servers, a tiny budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from roundhouse import deployment as deployments
from tests.loadtests.conftest import LOADED, scenario_file
from tests.server.conftest import write_deployment

pytestmark = pytest.mark.server


def test_a_deployment_is_tuned(tmp_path: Path) -> None:
    """The start lets 1 of 8 streams run at once; the first step, half of the way to all of them."""
    start = write_deployment(tmp_path, {**LOADED, "limits": {"max_batch_size": 1, "max_seq_len": 2048}})
    scenario = scenario_file(tmp_path, {"kind": "closed", "streams": 8})
    output = tmp_path / "out"
    command = [sys.executable, "-m", "roundhouse.cli", "tune", str(start), "--scenario", str(scenario), "--trials", "2"]
    command += ["--seconds", "2", "--warm-up", "1", "--repeats", "1", "--prompts", "200", "--minutes", "0.8"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    outcome = json.loads((output / "trials.json").read_text())
    assert [trial["changed"] == {} for trial in outcome["trials"]] == [True, False]
    assert outcome["gains"][-1]["ratio"] > 2
    assert deployments.load(output / "tuned.yaml").limits.max_batch_size == 4
    assert "tuned: " in done.stdout
    assert "<svg" in (output / "report.html").read_text()
    assert "Pareto front" in (output / "pareto.svg").read_text()


def test_what_cannot_be_tuned_is_said(tmp_path: Path) -> None:
    deployment = write_deployment(tmp_path, {"engine": {"kind": "synthetic"}})
    for options, said in (
        (["--scenario", "ramp"], "7 loads: deployments are tuned for one"),
        (["--goal", "goodput"], "--goal goodput: the deployment has no slo"),
    ):
        command = [sys.executable, "-m", "roundhouse.cli", "tune", str(deployment), *options]
        done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert said in done.stderr
