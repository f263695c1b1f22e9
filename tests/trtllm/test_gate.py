"""The gate between an engine and its deployment: what passes, and the line that each mismatch gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roundhouse.trtllm import engine_folder, gate
from tests.trtllm.conftest import SPECULATIVE, deployment, manifest, write_engine


def found(
    folder: Path, *, version: str = "1.2.1", capability: str | None = "9.0", role: gate.Role = "target", **changes: Any
) -> list[str]:
    want = gate.wanted(deployment(**changes), role)
    return list(gate.mismatches(engine_folder.read(folder), want, version=version, compute_capability=capability))


def test_the_engine_that_was_asked_for_passes(tmp_path: Path) -> None:
    folder = write_engine(tmp_path)
    engine_folder.write_manifest(folder, manifest(folder))
    assert found(folder) == []
    gate.enforce(engine_folder.read(folder), gate.wanted(deployment()), version="1.2.1", compute_capability="9.0")


def test_an_engine_may_offer_more_than_is_asked_for(tmp_path: Path) -> None:
    assert found(write_engine(tmp_path, max_batch_size=64, max_seq_len=8192, max_num_tokens=8192)) == []
    not_needed = {"kv_cache": {"reuse": False}, "scheduling": {"chunked_prefill": False}}
    assert found(write_engine(tmp_path, use_paged_context_fmha=False), **not_needed) == []


def test_max_num_tokens_may_be_what_a_full_batch_holds(tmp_path: Path) -> None:
    small = {"limits": {"max_batch_size": 2, "max_seq_len": 512, "max_num_tokens": 8192}}
    assert found(write_engine(tmp_path, max_num_tokens=1024), **small) == []


W4A16 = {"quant_algo": "W4A16_AWQ", "use_paged_context_fmha": False, "use_fp8_context_fmha": False}
NO_FMHA = {"context_fmha": False, "use_paged_context_fmha": False, "use_fp8_context_fmha": False}


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ({"version": "1.2.0"}, "compiled by TensorRT-LLM 1.2.0, and 1.2.1 is installed"),
        ({"quant_algo": None}, "precision.weights: quant_algo is None in the engine, and FP8 is wanted"),
        ({"kv_cache_quant_algo": None}, "precision.kv_cache: kv_cache_quant_algo is None in the engine"),
        ({"kv_cache_type": "CONTINUOUS"}, "in-flight batching needs PAGED"),
        ({"remove_input_padding": False}, "needs packed input"),
        (W4A16, "and trtllm-build turns it off for quant_algo W4A16_AWQ"),
        (NO_FMHA, "context_fmha is off, which turns it off"),
        ({"kv_cache_quant_algo": "INT8", "use_paged_context_fmha": False}, "turns it off with an INT8 KV cache"),
        ({"use_paged_context_fmha": False}, "did not ask for it: build with --use_paged_context_fmha enable"),
        ({"use_fp8_context_fmha": False}, "did not ask for it: build with --use_fp8_context_fmha enable"),
        ({"kv_cache_quant_algo": None, "use_fp8_context_fmha": False}, "is on without an FP8 KV cache"),
        ({"max_batch_size": 8}, "limits.max_batch_size: the engine was compiled for 8, and 16 is wanted"),
        ({"max_seq_len": 512}, "limits.max_seq_len: the engine was compiled for 512, and 1,024 is wanted"),
        ({"max_num_tokens": 1024}, "limits.max_num_tokens: the engine was compiled for 1,024, and 2,048 is wanted"),
        ({"tokens_per_block": 64}, "kv_cache.tokens_per_block: the engine was compiled for 64, and 32 is wanted"),
        ({"world_size": 2, "tp_size": 2}, "gpu.tensor_parallel: the engine was compiled for 2 ranks"),
        ({"world_size": 2, "tp_size": 2}, "rank1.engine: missing; the engine has 2 ranks"),
    ],
)
def test_each_mismatch_is_named_with_its_cause(tmp_path: Path, engine: dict[str, Any], line: str) -> None:
    assert any(line in each for each in found(write_engine(tmp_path, **engine)))


def test_weights_of_16_bits_are_compared_by_dtype(tmp_path: Path) -> None:
    half = {"precision": {"weights": "float16", "kv_cache": "auto"}}
    folder = write_engine(tmp_path, quant_algo=None, kv_cache_quant_algo=None)
    assert found(folder, **half) == [
        "precision.weights: dtype is bfloat16 in the engine, and float16 is wanted; build again"
    ]


def test_fusions_that_were_dropped_are_named(tmp_path: Path) -> None:
    two = {"engine": {"fusions": True}, "gpu": {"count": 2, "tensor_parallel": 2}}
    folder = write_engine(tmp_path, ranks=2, world_size=2, tp_size=2, architecture="QWenForCausalLM")
    (line,) = found(folder, **two)
    assert line.startswith("engine.fusions: reduce_fusion is off in the engine")
    assert "(this is QWenForCausalLM)" in line


def test_an_old_gpu_is_the_cause_if_nothing_else_is(tmp_path: Path) -> None:
    folder = write_engine(tmp_path, use_paged_context_fmha=False, use_fp8_context_fmha=False)
    lines = found(folder, capability="8.6")
    assert len(lines) == 2
    assert all("below compute capability 8.9 (this is 8.6)" in line for line in lines)


def test_another_gpu_than_the_one_it_was_built_on_is_refused(tmp_path: Path) -> None:
    folder = write_engine(tmp_path)
    engine_folder.write_manifest(folder, manifest(folder))
    (line,) = found(folder, capability="8.9")
    assert line.startswith("compiled for compute capability 9.0 (NVIDIA H200), and these GPUs have 8.9")
    assert found(folder, capability=None) == []


def test_files_that_were_not_copied_whole_are_named(tmp_path: Path) -> None:
    folder = write_engine(tmp_path, ranks=2)
    engine_folder.write_manifest(folder, manifest(folder))
    (folder / "rank0.engine").write_bytes(b"eng")
    lines = found(folder)
    assert "rank0.engine: has 3 bytes, and 6 were built; copy the folder again" in lines
    assert any(line.startswith("rank1.engine: left over") for line in lines)


def test_a_target_needs_room_for_draft_tokens_and_a_draft_does_not(tmp_path: Path) -> None:
    drafted: dict[str, Any] = {"speculative": SPECULATIVE}
    plain = write_engine(tmp_path / "plain")
    assert any("compiled for NONE, and DRAFT_TOKENS_EXTERNAL is wanted" in line for line in found(plain, **drafted))
    few = write_engine(tmp_path / "few", speculative_decoding_mode=2, max_draft_len=3)
    assert any("speculative.draft_tokens: the engine was compiled for 3" in line for line in found(few, **drafted))
    assert found(write_engine(tmp_path / "enough", speculative_decoding_mode=2, max_draft_len=5), **drafted) == []
    assert found(write_engine(tmp_path / "draft", max_batch_size=4), role="draft", **drafted) == []


def test_refusals_are_one_line_each_with_the_folder(tmp_path: Path) -> None:
    folder = write_engine(tmp_path, version="1.0.0", max_batch_size=1)
    with pytest.raises(gate.GateError) as refusal:
        gate.enforce(engine_folder.read(folder), gate.wanted(deployment()), version="1.2.1", compute_capability=None)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{folder}: ") for line in lines)


def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(engine_folder.EngineFolderError, match=r"config\.json: cannot be read"):
        engine_folder.read(tmp_path / "nowhere")
    folder = write_engine(tmp_path)
    (folder / "config.json").write_text('{"builder_config": {}}')
    with pytest.raises(engine_folder.EngineFolderError, match=r"has no 'pretrained_config'.*not that of a TensorRT"):
        engine_folder.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(engine_folder.EngineFolderError, match="is not JSON"):
        engine_folder.read(folder)
    (write_engine(tmp_path) / "manifest.json").write_text("{}")
    with pytest.raises(engine_folder.EngineFolderError, match=r"manifest\.json: .*missing required field"):
        engine_folder.read(folder)


def test_a_checkpoint_is_known_by_names_and_contents(tmp_path: Path) -> None:
    with pytest.raises(engine_folder.EngineFolderError, match=r"config\.json: cannot be read"):
        engine_folder.checkpoint_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(engine_folder.EngineFolderError, match=r"has no \*\.safetensors"):
        engine_folder.checkpoint_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    files = engine_folder.checkpoint_files(tmp_path)
    assert files["model.safetensors"][0] == 7
    first = engine_folder.checkpoint_hash(tmp_path, files)
    assert engine_folder.checkpoint_hash(tmp_path, files) == first
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    assert engine_folder.checkpoint_hash(tmp_path, files) != first
