"""What a deployment says about serving, and what the metrics port tells."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from roundhouse.text.tokenizer import NOT_HASTENED
from tests.server import client
from tests.server.client import answer, ask, generate, metrics, opened, until
from tests.server.conftest import ROOT, TINY, Start
from tests.text import families

pytestmark = pytest.mark.server
PROMPT = "copy: one two three ="
CPU = {"engine": {"kind": "transformers"}, "limits": {"max_seq_len": 2048, "max_batch_size": 8}}


def test_not_decoupled_serves_unary_clients(start: Start) -> None:
    server = start({**CPU, "serving": {"decoupled": False}})
    for model in ("ensemble", "tensorrt_llm_bls"):
        body = {"text_input": PROMPT, "max_tokens": 30, "exclude_input_in_output": True}
        inputs = client.grpc_inputs(server.grpc_url, model, body)
        with grpcclient.InferenceServerClient(server.grpc_url) as grpc:
            assert grpc.infer(model, inputs).as_numpy("text_output")[0].decode().strip() == "one two three"
        with httpclient.InferenceServerClient(server.http_url.removeprefix("http://")) as http:
            made = []
            for given in inputs:
                made.append(httpclient.InferInput(given.name(), [1, 1], given.datatype()))
                array = client.tensor(body[given.name()], given.datatype())
                made[-1].set_data_from_numpy(array, binary_data=False)
            assert http.infer(model, made).as_numpy("text_output")[0].strip() in ("one two three", b"one two three")
        assert generate(server, model, **body).json()["text_output"].strip() == "one two three"
        with pytest.raises(
            InferenceServerException, match=r"decoupled mode\. Set serving\.decoupled of the deployment"
        ):
            ask(server, model, text_input=PROMPT, max_tokens=4, stream=True)


def test_the_fused_model_answers_under_the_name_ensemble(start: Start) -> None:
    server = start(
        {
            **CPU,
            "serving": {"ensemble": "fused", "exclude_input_in_output": True},
            "fronts": {"tensorrt_llm_bls": 2, "tensorrt_llm": 2},
        }
    )
    assert answer(server, "ensemble", PROMPT).strip() == "one two three"
    config = requests.get(f"{server.http_url}/v2/models/ensemble/config", timeout=10).json()
    assert config["backend"] == "python"
    assert config["instance_group"][0]["count"] == 2
    reply = generate(server, "ensemble", text_input=PROMPT, max_tokens=30)
    assert reply.json()["text_output"].strip() == "one two three"  # the deployment excludes the prompt


def test_answers_are_the_same_without_kv_reuse(start: Start, local_cpu: Any) -> None:
    server = start({**CPU, "kv_cache": {"reuse": False}})
    prompt = "count from 1 to 120:"
    for _ in range(2):
        assert answer(server, "ensemble", prompt, 500) == answer(local_cpu, "ensemble", prompt, 500)
    reply = ask(server, "ensemble", text_input=prompt, max_tokens=4, return_perf_metrics=True)[-1]
    assert reply.tensors["kv_cache_reused_blocks"].item() == 0


def test_what_encodes_prompts_says_when_that_is_slow(start: Start, synthetic: Any, tmp_path: Path) -> None:
    assert NOT_HASTENED not in synthetic.log.read_text(), "fastokens knows the tokenizer of models/tiny"
    folder = tmp_path / "unigram"
    folder.mkdir()
    families.metaspace().save(str(folder / "tokenizer.json"))
    server = start(
        {"model": {"path": TINY, "tokenizer": str(folder)}, "engine": {"kind": "synthetic"}, "openai": {"workers": 1}}
    )
    for model in ("ensemble", "tensorrt_llm_bls"):
        assert generate(server, model, text_input="the dog", max_tokens=4).status_code == 200
    assert server.log.read_text().count(f"W roundhouse: {NOT_HASTENED}") == 2, "preprocessing and tensorrt_llm_bls"
    until(lambda: server.log.read_text().count(NOT_HASTENED) == 3, 30, "the front door's worker says it too")


def test_metrics_tell_what_happens(synthetic: Any) -> None:
    before = metrics(synthetic)

    def grown(prefix: str) -> float:
        now = metrics(synthetic)
        return sum(value - before.get(name, 0) for name, value in now.items() if name.startswith(prefix))

    inputs = {"text_input": "copy: word word", "max_tokens": 300, "stream": True, "end_id": 1048576}
    with opened(synthetic, "tensorrt_llm_bls", inputs) as one, opened(synthetic, "ensemble", inputs) as other:
        until(lambda: client.gauge(synthetic, "active") == 2, 3, "two active requests")
        assert client.gauge(synthetic, "scheduled") == 2
        assert client.gauge(synthetic, "generation_requests") == 2
        assert client.gauge(synthetic, "fraction") > 0
        assert client.gauge(synthetic, "tokens_per") == 32
        list(one.replies())
        list(other.replies())
    until(lambda: grown("roundhouse_requests_total") == 2, 3, "two requests counted")
    assert grown("roundhouse_generated_tokens_total") == 600
    assert grown("nv_llm_output_token_len_sum") == 600
    assert grown("nv_llm_input_token_len_count") == 2
    for name in ("time_to_first_token", "inter_token_latency", "queue", "request"):
        until(lambda name=name: grown(f"roundhouse_{name}_seconds_count") == 2, 3, name)
    mean_itl = grown("roundhouse_inter_token_latency_seconds_sum") / 2
    assert 0.004 < mean_itl < 0.02  # 200 tokens a second
    with pytest.raises(InferenceServerException):
        ask(synthetic, "tensorrt_llm_bls", text_input="", max_tokens=1)
    until(lambda: grown("roundhouse_rejected_total") == 1, 3, "a refusal counted")


def test_quickstart_streams_an_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "roundhouse.cli", "quickstart", "--once", "--prompt", "sort: 3 1 2 ="]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 2 3" in done.stdout
    assert "time to first token" in done.stdout
    assert time.monotonic() - begun < 60


def test_the_repository_loads_as_it_lies_there(tmp_path: Path) -> None:
    """Triton itself on model_repository/, without `roundhouse serve`."""
    from roundhouse import tritonserver
    from tests.server.conftest import free_ports

    triton = tritonserver.find()
    http, grpc, metrics_port = free_ports(3)
    command = [str(triton.binary), f"--model-repository={ROOT / 'model_repository'}"]
    command += [f"--backend-directory={triton.backends}", f"--http-port={http}", f"--grpc-port={grpc}"]
    command += [f"--metrics-port={metrics_port}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=triton.environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{http}/v2/models/ensemble"

        def ready() -> bool:
            try:
                return requests.get(f"{url}/ready", timeout=2).status_code == 200
            except requests.ConnectionError:
                return False

        until(ready, 60, "ready")
        body = {"text_input": PROMPT, "max_tokens": 30, "exclude_input_in_output": True}
        reply = requests.post(f"{url}/generate", data=json.dumps(body), timeout=30)
        assert reply.json()["text_output"].strip() == "one two three"
    finally:
        process.kill()
        process.wait()
