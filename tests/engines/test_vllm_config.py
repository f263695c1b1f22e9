"""From a deployment to vLLM's arguments. Needs no vLLM; what vLLM makes of them is tested in its own environment."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from roundhouse import deployment as deployments
from roundhouse.deployment import VllmEngine
from roundhouse.engine.base import EngineError
from roundhouse.engine.load import load_engine
from roundhouse.engine.vllm.config import VllmConfig, engine_arguments, of_deployment

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
DRAFT = {"method": "draft_target", "draft_model": "draft", "draft_tokens": 5}


def arguments(engine: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    raw = {"model": {"path": "m"}, "engine": {"kind": "vllm", **(engine or {})}, **sections}
    parsed = deployments.parse(raw, source="x.yaml", base=Path("/base"))
    assert isinstance(parsed.engine, VllmEngine)
    return engine_arguments(of_deployment(parsed, parsed.engine))


@pytest.mark.parametrize(
    ("engine", "sections", "expected"),
    [
        ({}, {}, {"model": "/base/m", "quantization": None, "kv_cache_dtype": "auto", "speculative_config": None}),
        ({}, {"precision": {"weights": "fp8"}}, {"quantization": "fp8", "dtype": "bfloat16"}),
        ({}, {"precision": {"weights": "float16"}}, {"quantization": None, "dtype": "float16"}),
        ({}, {"precision": {"weights": "int4_awq"}}, {"quantization": None, "dtype": "auto"}),
        ({}, {"precision": {"kv_cache": "fp8"}}, {"kv_cache_dtype": "fp8"}),
        ({"fp8_kv_format": "fp8_e5m2"}, {"precision": {"kv_cache": "fp8"}}, {"kv_cache_dtype": "fp8_e5m2"}),
        ({"fp8_kv_format": "fp8_e4m3"}, {"precision": {"kv_cache": "fp8"}}, {"kv_cache_dtype": "fp8_e4m3"}),
        ({}, {"kv_cache": {"reuse": False}}, {"enable_prefix_caching": False}),
        ({}, {"kv_cache": {"tokens": 640, "tokens_per_block": 16}}, {"num_gpu_blocks_override": 41, "block_size": 16}),
        ({}, {"scheduling": {"chunked_prefill": False}}, {"enable_chunked_prefill": False}),
        ({}, {"limits": {"max_batch_size": 7, "max_num_tokens": 99}}, {"max_num_seqs": 7}),
        ({}, {"limits": {"max_batch_size": 7, "max_num_tokens": 99}}, {"max_num_batched_tokens": 99}),
        ({}, {"limits": {"max_seq_len": 4096}}, {"max_model_len": 4096}),
        ({"memory_fraction": 0.8}, {}, {"gpu_memory_utilization": 0.8}),
        ({"eager": True}, {}, {"enforce_eager": True}),
        (
            {},
            {"gpu": {"product": "NVIDIA-H200", "count": 2, "tensor_parallel": 2}},
            {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        ),
    ],
)
def test_every_key_reaches_vllm(engine: dict[str, Any], sections: dict[str, Any], expected: dict[str, Any]) -> None:
    given = arguments(engine, **sections)
    assert {key: given[key] for key in expected} == expected


def test_drafting_stops_beyond_its_batch_size() -> None:
    wanted = arguments(speculative={**DRAFT, "max_batch_size": 4}, limits={"max_batch_size": 64})["speculative_config"]
    assert wanted == {
        "method": "draft_model",
        "model": "/base/draft",
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [(1, 4, 5), (5, 64, 0)],
    }
    always = arguments(speculative={**DRAFT, "max_batch_size": 64}, limits={"max_batch_size": 64})
    assert "num_speculative_tokens_per_batch_size" not in always["speculative_config"]


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_heads_and_ngrams(method: str) -> None:
    speculative = {**DRAFT, "method": method, "max_batch_size": 64}
    assert arguments(speculative=speculative)["speculative_config"]["method"] == method
    ngram = arguments({"ngram": {"draft_tokens": 3, "match_tokens": 2}})["speculative_config"]
    matched = {"prompt_lookup_min": 2, "prompt_lookup_max": 2}
    assert ngram == {"method": "ngram", "num_speculative_tokens": 3, **matched}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_an_environment_without_vllm_is_told_what_to_do() -> None:
    with pytest.raises(EngineError) as refusal:
        load_engine(deployments.load(DEPLOYMENTS / "llama-3-8b-h200-vllm.yaml"))
    assert f"engine.kind: vllm: {sys.executable} has no module vllm; run scripts/setup --vllm" in str(refusal.value)


def test_adapters_get_room_for_the_largest_rank(tmp_path: Path) -> None:
    for name, rank in (("a", 4), ("b", 24)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    given = arguments({"lora": {1: str(tmp_path / "a"), 2: str(tmp_path / "b")}})
    assert (given["enable_lora"], given["max_lora_rank"]) == (True, 32)
    assert given["max_loras"] >= 2
    with pytest.raises(EngineError, match=r"engine.lora.3: .*adapter_config.json has no rank"):
        arguments({"lora": {3: str(tmp_path / "c")}})


def test_a_step_has_room_for_every_sequence() -> None:
    with pytest.raises(EngineError, match=r"limits.max_num_tokens: 8 is less than limits.max_batch_size"):
        engine_arguments(VllmConfig(model="m", max_batch_size=16, max_num_tokens=8))


def test_the_70b_has_the_settings_that_operators_use() -> None:
    parsed = deployments.load(DEPLOYMENTS / "llama-3-70b-2xh100-vllm.yaml")
    assert isinstance(parsed.engine, VllmEngine)
    given = engine_arguments(of_deployment(parsed, parsed.engine))
    expected = {
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 64,
        "enable_chunked_prefill": True,
        "gpu_memory_utilization": 0.92,
        "kv_cache_dtype": "fp8_e5m2",
        "enable_prefix_caching": True,
        "enforce_eager": False,
        "tensor_parallel_size": 2,
    }
    assert {key: given[key] for key in expected} == expected
    assert given["speculative_config"]["num_speculative_tokens"] == 5
