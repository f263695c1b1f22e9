"""One server for the load tools: it streams fast, and its objectives are easy to meet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
