"""One server for the load tools: it streams fast, and its objectives are easy to meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.server.conftest import Server, write_deployment

LOADED = {
    "engine": {"kind": "synthetic", "tokens_per_second": 4000, "tokens_per_second_per_sequence": 200},
    "limits": {"max_batch_size": 64, "max_seq_len": 2048, "queue": 64},
    "slo": {"ttft_ms": 20_000, "itl_ms": 5_000},
}


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("loaded")
    with Server(write_deployment(folder, LOADED), folder / "server.log") as server:
        yield server


SHORT = {"prompt": 24, "answer": 16}


def scenario_file(folder: Path, load: dict[str, Any], **kind: Any) -> Path:
    """One kind of request: short, but for what is said of it."""
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump({"description": "a test", "load": load, "mix": [{**SHORT, **kind}]}))
    return path


@pytest.fixture
def short(tmp_path: Path) -> Path:
    return scenario_file(tmp_path, {"kind": "closed", "streams": 4})
