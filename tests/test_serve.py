"""What `roundhouse serve` refuses before it starts a Triton, and how it tells that requests are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from roundhouse.cli import app
from roundhouse.serve import ReadyFile, ServeError
from tests.server.conftest import TINY, free_ports


def refused(folder: Path, *options: str, **changes: Any) -> str:
    """What it says on one line, since a terminal's width breaks it anywhere."""
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": TINY}, "engine": {"kind": "transformers"}, **changes}))
    ports = [
        f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics", "openai"), free_ports(4), strict=True)
    ]
    done = CliRunner().invoke(app, ["serve", str(path), *ports, *options])
    assert done.exit_code in (1, 2)
    return " ".join(done.output.split())


def test_ports_are_what_ports_can_be(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    both = refused(tmp_path, f"--http-port={port}", f"--grpc-port={port}")
    assert f"--http-port and --grpc-port are both {port}; choose two" in both
    assert "'--metrics-port'" in refused(tmp_path, "--metrics-port=99999")
    assert "'--drain-seconds'" in refused(tmp_path, "--drain-seconds=-1")


def test_a_model_that_is_not_there_is_told_by_its_key(tmp_path: Path) -> None:
    assert f"model.path: there is no folder {tmp_path}/nowhere" in refused(tmp_path, model={"path": "nowhere"})
    there = {"path": TINY, "tokenizer": "nowhere"}
    assert f"model.tokenizer: there is no folder {tmp_path}/nowhere" in refused(tmp_path, model=there)
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in refused(tmp_path, model={"path": "empty"})


def test_the_ready_file_is_there_while_it_is_so(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.touch()  # by a server that was killed
    file = ReadyFile(path)
    assert not path.exists()
    for ready in (True, True, False, False):
        file.set(ready)
        assert path.exists() is ready
    (tmp_path / "gone").mkdir()
    lost = ReadyFile(tmp_path / "gone/ready")
    (tmp_path / "gone").rmdir()
    lost.set(True)  # and the server goes on
    (tmp_path / "gone").mkdir()
    lost.set(True)
    assert (tmp_path / "gone/ready").exists()
    with pytest.raises(ServeError, match="name a file in a folder that exists"):
        ReadyFile(tmp_path / "nowhere/ready")
    ReadyFile(None).set(True)
