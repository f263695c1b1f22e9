"""A server on the synthetic engine, whose answers can be checked, for each module of fault tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from roundhouse.bench.identity import Examiner, Mix
from roundhouse.text.tokenizer import Tokenizer
from tests.server.conftest import TINY, Server, write_deployment

Start = Callable[..., Server]
FAST = {"kind": "synthetic", "tokens_per_second_per_sequence": 400}
LIMITS = {"max_batch_size": 32, "max_seq_len": 8192, "queue": 64}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("--drain-seconds", "5", engine={...})` starts a server of the test's own."""
    with ExitStack() as stack:

        def started(*options: str, **deployment: Any) -> Server:
            path = write_deployment(tmp_path, {"engine": FAST, "limits": LIMITS, **deployment})
            return stack.enter_context(Server(path, tmp_path / "server.log", *options))

        yield started


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For faults that a server survives: they are put right again, so that the next test finds it well."""
    folder = tmp_path_factory.mktemp("faults")
    path = write_deployment(folder, {"engine": FAST, "limits": LIMITS})
    with Server(path, folder / "server.log", "--log-verbose") as server:
        yield server


@pytest.fixture
def examiner(tokenizer: Tokenizer) -> Callable[..., Examiner]:
    return lambda server, **mix: Examiner(server.grpc_url, tokenizer, Mix(**mix))
