"""Command lines from deployments: each flag and value is one that TensorRT-LLM 1.2.1 takes, and says what is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundhouse import deployment as deployments
from roundhouse.trtllm.build import BuildError, dry_run
from roundhouse.trtllm.commands import TENSORRT_LLM, builds
from tests.trtllm.conftest import SPECULATIVE, deployment

ROOT = Path(__file__).resolve().parents[2]
SURFACE = json.loads((ROOT / "tests/doubles/trtllm_cli.json").read_text())
SHIPPED = [path for path in sorted((ROOT / "deployments").glob("*.yaml")) if "kind: tensorrt_llm" in path.read_text()]
LOSES_REUSE = {"kv_cache": {"reuse": False}, "scheduling": {"chunked_prefill": False}}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8, 16 bit cache": {"precision": {"weights": "fp8", "kv_cache": "auto"}},
    "bfloat16": {"precision": {"weights": "bfloat16", "kv_cache": "auto"}},
    "bfloat16, fp8 cache": {"precision": {"weights": "bfloat16", "kv_cache": "fp8"}, **LOSES_REUSE},
    "float16": {"precision": {"weights": "float16", "kv_cache": "float16"}},
    "auto": {"precision": {"weights": "auto", "kv_cache": "auto"}},
    "int4_awq": {"precision": {"weights": "int4_awq", "kv_cache": "auto"}},
    "int4_awq, fp8 cache": {"precision": {"weights": "int4_awq", "kv_cache": "fp8"}, **LOSES_REUSE},
    "two GPUs": {"gpu": {"count": 2, "tensor_parallel": 2}, "engine": {"fusions": True}},
    "drafted": {"speculative": SPECULATIVE},
}


def flags(command: tuple[str, ...]) -> dict[str, str]:
    words = command[command.index("{quantize}") + 1 :] if "{quantize}" in command else command[1:]
    assert len(words) % 2 == 0
    return dict(zip(words[::2], words[1::2], strict=True))


def assert_in_surface(tool: str, given: dict[str, str]) -> None:
    """Each flag is one that the tool has, with a value of its type and among its choices."""
    known = {flag["flag"]: flag for flag in SURFACE["cli"][tool]}
    for name, value in given.items():
        assert name in known, f"{tool} has no {name}"
        flag = known[name]
        assert flag["type"] != "flag", f"{name} takes no value"
        if flag["type"] == "int":
            assert str(int(value)) == value
        if "choices" in flag:
            assert value in flag["choices"], f"{name} {value}"


def of(changes: dict[str, Any], which: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    quantise, compile_ = builds(deployment(**changes))[which].steps
    return flags(quantise.command), flags(compile_.command)


def test_the_commands_are_written_for_the_recorded_version() -> None:
    assert SURFACE["version"] == TENSORRT_LLM


@pytest.mark.parametrize("name", VARIANTS)
def test_each_flag_is_in_the_surface(name: str) -> None:
    for each in builds(deployment(**VARIANTS[name])):
        quantise, compile_ = each.steps
        assert_in_surface("quantize.py", flags(quantise.command))
        assert_in_surface("trtllm-build", flags(compile_.command))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_deployments_have_commands_in_the_surface(path: Path) -> None:
    assert len(SHIPPED) >= 4
    found = builds(deployments.load(path))
    assert len(found) == (2 if "speculative" in path.stem else 1)
    for each in found:
        for tool, one in zip(("quantize.py", "trtllm-build"), each.steps, strict=True):
            assert_in_surface(tool, flags(one.command))


@pytest.mark.parametrize(
    ("name", "qformat", "kv", "paged", "fp8_attention", "gemm"),
    [
        ("fp8", "fp8", "fp8", "enable", "enable", "disable"),
        ("fp8, 16 bit cache", "fp8", None, "enable", "disable", "disable"),
        ("bfloat16", "full_prec", None, "enable", "disable", "auto"),
        ("bfloat16, fp8 cache", "full_prec", "fp8", "disable", "disable", "auto"),
        ("int4_awq", "int4_awq", None, "enable", "disable", "auto"),
        ("int4_awq, fp8 cache", "int4_awq", "fp8", "disable", "disable", "auto"),
    ],
)
def test_the_command_line_says_what_will_be_in_the_engine(
    name: str, qformat: str, kv: str | None, paged: str, fp8_attention: str, gemm: str
) -> None:
    quantise, compile_ = of(VARIANTS[name])
    assert (quantise["--qformat"], quantise.get("--kv_cache_dtype")) == (qformat, kv)
    assert compile_["--use_paged_context_fmha"] == paged
    assert compile_["--use_fp8_context_fmha"] == fp8_attention
    assert compile_["--gemm_plugin"] == gemm
    assert compile_["--multiple_profiles"] == compile_["--remove_input_padding"] == "enable"
    assert compile_["--kv_cache_type"] == "paged"


def test_calibration_is_asked_for_only_where_there_are_scales_to_find() -> None:
    assert "--calib_dataset" not in of(VARIANTS["bfloat16"])[0]
    assert of(VARIANTS["fp8"])[0]["--calib_size"] == "512"
    assert of(VARIANTS["int4_awq"])[0]["--calib_size"] == "32"
    folder = of({"engine": {"calibration": "../texts"}})[0]["--calib_dataset"]
    assert folder == str(Path("../texts"))
    assert of({"limits": {"max_seq_len": 512}})[0]["--calib_max_seq_length"] == "512"


def test_weights_in_16_bits_are_named_and_others_follow_the_checkpoint() -> None:
    assert of(VARIANTS["float16"])[0]["--dtype"] == "float16"
    assert of(VARIANTS["fp8"])[0]["--dtype"] == of(VARIANTS["auto"])[0]["--dtype"] == "auto"


def test_ranks_and_fusions() -> None:
    quantise, compile_ = of(VARIANTS["two GPUs"])
    assert (quantise["--tp_size"], compile_["--workers"]) == ("2", "2")
    assert compile_["--reduce_fusion"] == compile_["--user_buffer"] == "enable"
    assert "--reduce_fusion" not in of({})[1]
    quantise, compile_ = of({"gpu": {"count": 4, "tensor_parallel": 4, "nodes": 2}})
    assert (quantise["--tp_size"], compile_["--workers"]) == ("4", "2")  # a machine compiles with the GPUs that it has


def test_a_draft_is_a_smaller_engine_and_its_target_takes_draft_tokens() -> None:
    target, draft = (of(VARIANTS["drafted"], which)[1] for which in (0, 1))
    assert target["--speculative_decoding_mode"] == "draft_tokens_external"
    assert (target["--max_draft_len"], target["--max_batch_size"]) == ("5", "16")
    assert "--speculative_decoding_mode" not in draft
    assert (draft["--max_batch_size"], draft["--max_seq_len"]) == ("4", "1024")


@given(batch=st.integers(1, 512), length=st.integers(64, 32768), blocks=st.sampled_from([32, 64, 128]), data=st.data())
def test_limits_are_passed_on(batch: int, length: int, blocks: int, data: st.DataObject) -> None:
    tokens = blocks * data.draw(st.integers(-(-batch // blocks), 300))
    _, compile_ = of(
        {
            "limits": {"max_batch_size": batch, "max_seq_len": length, "max_num_tokens": tokens},
            "kv_cache": {"tokens_per_block": blocks},
        }
    )
    names = ("max_batch_size", "max_seq_len", "max_num_tokens", "tokens_per_block")
    assert [int(compile_[f"--{name}"]) for name in names] == [batch, length, tokens, blocks]


def test_a_dry_run_prints_commands_for_a_shell(tmp_path: Path) -> None:
    lines = "\n".join(dry_run(deployment(tmp_path / "a b"), examples=Path("/examples")))
    assert lines.startswith(f"# target: {tmp_path}/a b/model -> {tmp_path}/a b/engine\n")
    assert "python3 /examples/quantization/quantize.py \\\n    --model_dir" in lines
    assert f"--output_dir '{tmp_path}/a b/engine.building/engine' \\\n" in lines
    assert "{" not in lines


def test_other_engines_have_nothing_to_build() -> None:
    other = deployments.parse({"model": {"path": "m"}, "engine": {"kind": "synthetic"}}, source="x", base=Path())
    with pytest.raises(BuildError, match=r"engine\.kind: synthetic has nothing to compile"):
        dry_run(other, examples=Path())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"fusions": True}}, "engine.fusions: needs gpu.tensor_parallel of 2 or more"),
        (
            {"engine": {"fusions": True}, "gpu": {"product": "NVIDIA-L40S", "count": 2, "tensor_parallel": 2}},
            "engine.fusions: do not work on NVIDIA-L40S",
        ),
        (
            {"speculative": {**SPECULATIVE, "draft_tokens": 200}},
            "less than limits.max_batch_size x (speculative.draft_tokens + 1), which is 3216",
        ),
    ],
)
def test_what_trtllm_build_would_change_is_refused_first(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(deployments.DeploymentError) as refusal:
        deployment(**changes)
    assert message in str(refusal.value)
