"""The tensorrt_llm engine behind a real Triton: the Executor is the stand-in in tests/doubles, all else is real."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from tests.doubles.engines import DOUBLES, write_engine
from tests.server.client import answer, ask, gauge, generate, metrics, opened, until
from tests.server.conftest import ROOT, TINY, Server, free_ports, write_deployment
from tests.server.test_bad_input import CASES, ask_raw, inputs_of
from tests.server.test_contract import (  # noqa: F401  the contract, once more, on `local_cpu` below
    MODELS,
    PROMPT,
    TestAnswers,
    TestBatches,
    TestCounts,
    TestSampling,
    TestTensorrtLlm,
    TestWordsAndEnds,
)

pytestmark = pytest.mark.server
TAKEN = {"guided decoding"}  # bad input for engines that cannot do it
LONG = {"text_input": "copy: word", "max_tokens": 1900, "stream": True, "end_id": 1048576}
LIMITS = {"max_batch_size": 16, "max_seq_len": 2048, "max_num_tokens": 2048, "queue": 16}


def deployment(folder: Path, *, drafts: bool = False, **behaviour: Any) -> dict[str, Any]:
    """A deployment file's content, and the engines that it names."""
    common = {"max_seq_len": 2048, "behaviour": behaviour}
    speculative = {"speculative_decoding_mode": 2, "max_draft_len": 5} if drafts else {}
    write_engine(folder / "engine", Path(TINY), **common, **speculative)
    made: dict[str, Any] = {
        "engine": {"kind": "tensorrt_llm", "path": "engine"},
        "precision": {"weights": "fp8", "kv_cache": "fp8"},
        "limits": LIMITS,
        "gpu": {"product": "NVIDIA-H200"},
    }
    if drafts:
        draft = ROOT / "models/tiny-draft"
        write_engine(folder / "draft-engine", draft, **common)
        made["speculative"] = {"method": "draft_target", "draft_model": str(draft), "draft_engine": "draft-engine"}
    return made


@pytest.fixture
def model() -> str:
    """The engine is the same behind each model: one of them will do for the contract."""
    return "ensemble"


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(DOUBLES))
        yield patch


@pytest.fixture(scope="module")
def local_cpu(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Under the name that the contract's tests ask for."""
    folder = tmp_path_factory.mktemp("tensorrt-llm")
    path = write_deployment(folder, deployment(folder, iteration_seconds=0.003))
    with Server(path, folder / "server.log") as server:
        yield server


@pytest.mark.parametrize(("name", "change", "named"), [case for case in CASES if case[0] not in TAKEN])
def test_bad_input_is_refused(local_cpu: Any, name: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask_raw(local_cpu, "tensorrt_llm_bls", inputs_of(change))
    assert named in str(caught.value) or "expected number of inputs" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_guide_is_kept_to(local_cpu: Any) -> None:
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "[0-9]{6}"}
    for name in MODELS:
        assert answer(local_cpu, name, "copy: word =", 20, **guide).isdigit()
    with pytest.raises(InferenceServerException, match="guide: the json_schema is not JSON"):
        ask(local_cpu, "ensemble", text_input="x", max_tokens=4, guided_decoding_guide_type="json_schema",
            guided_decoding_guide="{")  # fmt: skip


def test_retention_is_taken_and_a_wrong_one_refused(local_cpu: Any) -> None:
    given: dict[str, Any] = {"input_ids": [5, 6, 7], "input_lengths": 3, "request_output_len": 4}
    assert ask(local_cpu, "tensorrt_llm", **given, retention_decode_priority=90)
    with pytest.raises(InferenceServerException, match="retention decode priority: 101"):
        ask(local_cpu, "tensorrt_llm", **given, retention_decode_priority=101)


@pytest.mark.parametrize("name", MODELS)
def test_a_client_that_goes_away_frees_its_slot(local_cpu: Any, name: str) -> None:
    """Long before the 6 s that LONG takes."""
    with opened(local_cpu, name, LONG) as stream:
        next(stream.replies())
        until(lambda: gauge(local_cpu, "active") == 1, 3, "the gauge")
    until(lambda: gauge(local_cpu, "active") == 0 and gauge(local_cpu, "used") == 0, 3.5, "idle")


def test_the_executors_statistics_become_metrics(local_cpu: Any) -> None:
    with opened(local_cpu, "tensorrt_llm_bls", LONG) as stream:
        next(stream.replies())
        until(lambda: gauge(local_cpu, "generation_requests") == 1, 3, "a request in decode")
        assert gauge(local_cpu, "used") > 0
        assert metrics_of(local_cpu, "request_type", "max") == 16
    assert gauge(local_cpu, "tokens_per") == 32


def metrics_of(server: Any, label: str, value: str) -> float:
    return next(found for name, found in metrics(server).items() if f'{label}="{value}"' in name)


def test_the_engine_killed_under_streams_comes_back(local_cpu: Any) -> None:
    with opened(local_cpu, "ensemble", LONG) as one, opened(local_cpu, "tensorrt_llm_bls", LONG) as other:
        streams = [one.replies(), other.replies()]
        for stream in streams:
            next(stream)
        local_cpu.engine().kill()
        for stream in streams:
            assert "started again" in str(list(stream)[-1].error)
    until(lambda: generate(local_cpu, "ensemble", text_input="x", max_tokens=1).status_code == 200, 30, "the engine")


def test_drafting_gives_the_same_answers_and_counts_what_was_accepted(
    local_cpu: Any, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the variables that deployments of tensorrtllm_backend set override the file."""
    environment.setenv("DECOUPLED_MODE", "true")
    environment.setenv("MAX_BATCH_SIZE", "8")
    path = write_deployment(tmp_path, deployment(tmp_path, drafts=True))
    with Server(path, tmp_path / "server.log") as server:
        environment.delenv("MAX_BATCH_SIZE")
        for prompt in (PROMPT, "count from 1 to 40:", "tell a story about a cat:"):
            assert answer(server, "ensemble", prompt, 100) == answer(local_cpu, "ensemble", prompt, 100)
        asked = {"text_input": "count from 1 to 60:", "max_tokens": 100, "return_perf_metrics": True}
        tensors = ask(server, "tensorrt_llm_bls", **asked)[-1].tensors
        proposed, accepted = (tensors[f"total_{what}"].item() for what in ("draft_tokens", "accepted_draft_tokens"))
        assert proposed >= accepted > proposed / 3
        assert tensors["acceptance_rate"].item() == pytest.approx(accepted / proposed)
        name = "roundhouse_accepted_draft_tokens_total"
        until(lambda: sum(v for k, v in metrics(server).items() if k.startswith(name)) >= accepted, 3, "the counter")
        given = {"input_ids": [0, 9, 10, 11], "input_lengths": 4, "request_output_len": 6}
        whole = ask(server, "tensorrt_llm", **given)[0].tensors["output_ids"].reshape(-1).tolist()[4:]
        checked = ask(server, "tensorrt_llm", **given, draft_input_ids=[whole[0], whole[1], whole[2] + 1])
        assert checked[0].tensors["output_ids"].reshape(-1).tolist()[4:] == whole[:3]  # two accepted, and one more
        assert metrics_of(server, "request_type", "max") == 8


def test_an_engine_of_another_version_fails_the_start_with_its_reason(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = deployment(tmp_path)
    write_engine(tmp_path / "engine", Path(TINY), max_seq_len=2048, version="1.1.0")
    path = write_deployment(tmp_path, made)
    http, grpc, metrics_port = map(str, free_ports(3))
    command = [sys.executable, "-m", "roundhouse.cli", "serve", str(path), "--http-port", http, "--grpc-port", grpc]
    done = subprocess.run([*command, "--metrics-port", metrics_port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "compiled by TensorRT-LLM 1.1.0, and 1.2.1 is installed" in done.stderr
