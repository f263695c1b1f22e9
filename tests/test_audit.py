"""scripts/audit tells what it found from what it could not find out; CI stops for the first only."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("tool", "code", "said"),
    [
        ("echo 'No known vulnerabilities found' >&2", 0, "bill of materials written to sbom.json"),
        ("echo 'jinja2 3.1.0 GHSA-xxxx 3.1.4'; exit 1", 1, "GHSA-xxxx"),
        ("echo 'ERROR: connection refused' >&2; exit 1", 3, "not audited"),
    ],
    ids=["clean", "vulnerable", "unreachable"],
)
def test_its_exit_code(tmp_path: Path, tool: str, code: int, said: str) -> None:
    tools = tmp_path / ".venv-audit/bin"
    tools.mkdir(parents=True)
    for name, body in {"pip-audit": tool, "cyclonedx-py": ":"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o700)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/audit", tmp_path / "scripts")
    done = subprocess.run([tmp_path / "scripts/audit"], capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


def test_ci_stops_for_a_vulnerability_only() -> None:
    ci = (ROOT / ".ci/run").read_text()
    assert "scripts/audit || [[ $? == 3 ]]" in ci
