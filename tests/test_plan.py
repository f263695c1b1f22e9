"""The memory planner, held to known figures of Llama 3 (FP8 weights and KV cache)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from roundhouse import deployment as deployments
from roundhouse.plan import WORKSPACE, PlanError, plan

DEPLOYMENTS = Path(__file__).resolve().parents[1] / "deployments"
COMMON = {"vocab_size": 128256, "num_key_value_heads": 8}
LLAMA_8B = {
    **COMMON,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
}
LLAMA_70B = {
    **COMMON,
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}


def load(tmp_path: Path, name: str, **changes: dict[str, Any]) -> deployments.Deployment:
    shapes = {"8B-Instruct": LLAMA_8B, "70B-Instruct": LLAMA_70B, "70B-Instruct-AWQ": LLAMA_70B}
    for folder, config in ((f"Meta-Llama-3-{size}", config) for size, config in shapes.items()):
        checkpoint = tmp_path / "checkpoints" / folder
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "config.json").write_text(json.dumps(config))
    raw = yaml.safe_load((DEPLOYMENTS / f"{name}.yaml").read_text())
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return deployments.parse(raw, source=name, base=tmp_path / "deployments")


def test_8b_on_an_80_gb_gpu_leaves_a_million_tokens(tmp_path: Path) -> None:
    result = plan(load(tmp_path, "llama-3-8b-h200", gpu={"product": "NVIDIA-H100-80GB-HBM3"}))
    assert result.weights / 1e9 == pytest.approx(9.1, abs=0.05)
    assert result.kv_bytes_per_token == 64 * 1024
    assert result.kv_tokens == pytest.approx(1.0e6, rel=0.02)
    assert result.sequences == result.kv_tokens // 8192


def test_70b_on_two_80_gb_gpus_leaves_half_a_million_tokens(tmp_path: Path) -> None:
    result = plan(load(tmp_path, "llama-3-70b-2xh100"))
    assert result.weights / 1e9 == pytest.approx(36.4, abs=0.1)
    assert result.kv_bytes_per_token == 80 * 1024
    assert result.kv_tokens == pytest.approx(0.50e6, rel=0.02)


@pytest.mark.parametrize(("name", "kv_gib"), [("llama-3-8b-h200", 60), ("llama-3-70b-2xh100", 38)])
def test_the_kv_cache_has_what_80_gb_gpus_leave(tmp_path: Path, name: str, kv_gib: int) -> None:
    result = plan(load(tmp_path, name, gpu={"product": "NVIDIA-H100-80GB-HBM3"}))
    assert result.kv_tokens * result.kv_bytes_per_token / 2**30 == pytest.approx(kv_gib, abs=1)


def test_one_gpu_holds_what_two_share(tmp_path: Path) -> None:
    one = plan(load(tmp_path, "llama-3-70b-2xh100", gpu={"product": "NVIDIA-H200", "count": 1, "tensor_parallel": 1}))
    assert one.weights / 1e9 == pytest.approx(72.7, abs=0.1)
    assert one.kv_bytes_per_token == 160 * 1024


def test_a_16_bit_kv_cache_costs_twice_as_much(tmp_path: Path) -> None:
    assert plan(load(tmp_path, "llama-3-8b-h200", precision={"kv_cache": "auto"})).kv_bytes_per_token == 128 * 1024


def test_a_compiled_draft_takes_its_own_weights_and_cache(tmp_path: Path) -> None:
    alone = plan(load(tmp_path, "llama-3-70b-2xh100"))
    drafted = plan(load(tmp_path, "llama-3-70b-2xh100-speculative"))
    assert drafted.weights - alone.weights == pytest.approx(9.1e9 / 2, rel=0.01)
    assert drafted.draft_kv == 4 * 8192 * 32 * 1024  # 4 sequences of 8,192 tokens
    assert drafted.kv_bytes_per_token == alone.kv_bytes_per_token == 80 * 1024
    taken = drafted.weights - alone.weights + drafted.draft_kv
    assert drafted.kv_tokens == pytest.approx(alone.kv_tokens - 0.9 * taken / (80 * 1024), abs=1)
    assert "draft's KV cache      1.1 GB per GPU" in drafted.lines()


def test_a_draft_of_vllm_has_16_bits_and_a_place_in_each_block(tmp_path: Path) -> None:
    """vLLM quantises the model alone: its draft is loaded as it is."""
    deployment = load(tmp_path, "llama-3-70b-2xh100-vllm")
    drafted, alone = plan(deployment), plan(deployment.model_copy(update={"speculative": None}))
    assert drafted.weights - alone.weights == pytest.approx(16.1e9 / 2, rel=0.01)
    assert drafted.kv_bytes_per_token == (80 + 32) * 1024
    assert drafted.draft_kv == 0


@pytest.mark.parametrize(("given", "share"), [(0.5, 0.5), (0.9, 0.9), (None, 0.92)])
def test_vllm_takes_a_share_of_the_whole_memory(tmp_path: Path, given: float | None, share: float) -> None:
    result = plan(load(tmp_path, "llama-3-8b-h200-vllm", engine={"memory_fraction": given}))
    cache = share * 139 * 2**30 - result.weights - WORKSPACE
    assert result.kv_tokens == int(cache / (64 * 1024))


def test_too_small_a_share_of_the_memory_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"one sequence within engine\.memory_fraction \(0\.05\)"):
        plan(load(tmp_path, "llama-3-8b-h200-vllm", engine={"memory_fraction": 0.05}))


@pytest.mark.parametrize("path", sorted(DEPLOYMENTS.glob("llama-*.yaml")), ids=lambda path: path.stem)
def test_shipped_deployments_fit(tmp_path: Path, path: Path) -> None:
    assert plan(load(tmp_path, path.stem)).sequences >= 1


def test_too_few_gpus_are_refused_with_the_number_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gpu\.tensor_parallel: 1 x NVIDIA-L40S .* 2 would do"):
        plan(load(tmp_path, "llama-3-70b-2xh100", gpu={"product": "NVIDIA-L40S", "count": 1, "tensor_parallel": 1}))


def test_too_large_a_cache_is_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    small = load(tmp_path, "llama-3-8b-l40s")
    fits = plan(small).kv_tokens
    with pytest.raises(PlanError, match=rf"kv_cache\.tokens: 9,000,000 do not fit; {fits:,} would"):
        plan(load(tmp_path, "llama-3-8b-l40s", kv_cache={"tokens": 9_000_000}))


def test_an_unknown_product_and_a_missing_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gpu\.product: 'H300' is not known"):
        plan(load(tmp_path, "llama-3-8b-h200", gpu={"product": "H300"}))
    wanted = r"^model\.path: .*config\.json cannot be read .* hf download OWNER/nowhere config\.json --local-dir /"
    with pytest.raises(PlanError, match=wanted):
        plan(load(tmp_path, "llama-3-8b-h200", model={"path": "nowhere"}))
    with pytest.raises(PlanError, match=r"^speculative\.draft_model: .*config\.json cannot be read"):
        plan(load(tmp_path, "llama-3-70b-2xh100-speculative", speculative={"draft_model": "nowhere"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": {"weights": "bfloat16"}}, "precision.kv_cache: fp8 with bfloat16 weights"),
        ({"limits": {"max_num_tokens": 8200}}, "limits.max_num_tokens: 8200 is not a multiple"),
        ({"kv_cache": {"reuse": False, "host_memory_bytes": 1}}, "kv_cache.host_memory_bytes: needs kv_cache.reuse"),
        ({"gpu": {"count": 2}}, "gpu.tensor_parallel: 1 is not gpu.count"),
        ({"engine": {"paht": "x"}}, "engine.paht: unknown key; did you mean 'path'"),
    ],
)
def test_contradictions_are_refused_by_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(deployments.DeploymentError) as refusal:
        load(tmp_path, "llama-3-8b-h200", **changes)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("precision", {"weights": "fp8"}, "precision.weights: engine transformers cannot do 'fp8'"),
        ("gpu", {"product": "NVIDIA-H200"}, "gpu: engine transformers cannot do this"),
        ("speculative", {"method": "draft_target", "draft_model": "d"}, "speculative: engine transformers cannot"),
    ],
)
def test_the_embedded_engine_refuses_what_needs_a_gpu(section: str, value: dict[str, Any], message: str) -> None:
    raw = {"model": {"path": "m"}, "engine": {"kind": "transformers"}, section: value}
    with pytest.raises(deployments.DeploymentError) as refusal:
        deployments.parse(raw, source="x", base=Path())
    assert message in str(refusal.value)
