"""From a deployment to the command lines that compile its engines. Pure: nothing is read or run here.

Two steps an engine: quantize.py (ModelOpt) turns the Hugging Face checkpoint into one of TensorRT-LLM, in 16 bits too,
so that every architecture goes one way; trtllm-build compiles it. Flags are those of TensorRT-LLM 1.2.1. What
trtllm-build would turn off in silence is turned off here in plain sight, so that the command line says what is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from roundhouse.deployment import Deployment, TensorrtLlmEngine
from roundhouse.trtllm import gate

TENSORRT_LLM = "1.2.1"  # the version that the flags are written for, and that build/Dockerfile pins
QFORMAT = {"fp8": "fp8", "int4_awq": "int4_awq"}  # of precision.weights; the others stay in 16 bits
CALIBRATION_TOKENS = 2048  # of one sample; tokenised with twice as much room
CALIBRATION_SAMPLES = 512
AWQ_SAMPLES = 32  # AWQ searches scales on each of them


@dataclass(frozen=True)
class Step:
    """One command. {model}, {checkpoint} and {engine} stand for folders, {python} and {quantize} for what runs it."""

    name: str
    command: tuple[str, ...]

    def filled(self, folders: dict[str, str]) -> list[str]:
        return [folders.get(word[1:-1], word) if word[:1] == "{" else word for word in self.command]


@dataclass(frozen=True)
class EngineBuild:
    """One engine of a deployment: where it comes from, where it goes, what must be in it, how it is made."""

    role: gate.Role
    model: str
    engine: str
    wanted: gate.Wanted
    steps: tuple[Step, ...]


def builds(deployment: Deployment) -> list[EngineBuild]:
    """The engines of a deployment: its model's, and its draft model's. Raises ValueError for other engine kinds."""
    section = deployment.engine
    if not isinstance(section, TensorrtLlmEngine):
        raise ValueError(f"engine.kind: {section.kind} has nothing to compile; only tensorrt_llm has")
    folders: dict[gate.Role, tuple[str, str]] = {"target": (deployment.model.path, section.path)}
    if (speculative := deployment.speculative) is not None:
        assert speculative.draft_engine is not None, "checked by the schema"
        folders["draft"] = (speculative.draft_model, speculative.draft_engine)
    return [_build(deployment, section, role, *paths) for role, paths in folders.items()]


def _build(deployment: Deployment, section: TensorrtLlmEngine, role: gate.Role, model: str, engine: str) -> EngineBuild:
    wanted = gate.wanted(deployment, role)
    steps = (
        Step("quantise", quantize(deployment, section)),
        Step("compile", trtllm_build(deployment, wanted)),
    )
    return EngineBuild(role, model, engine, wanted, steps)


def quantize(deployment: Deployment, section: TensorrtLlmEngine) -> tuple[str, ...]:
    """The command line of examples/quantization/quantize.py."""
    precision = deployment.precision
    assert deployment.gpu is not None, "checked by the schema"
    assert deployment.limits.max_seq_len is not None, "checked by the schema"
    tokens = min(CALIBRATION_TOKENS, deployment.limits.max_seq_len)
    flags: dict[str, str | int] = {
        "model_dir": "{model}",
        "output_dir": "{checkpoint}",
        "dtype": precision.weights if precision.weights in ("bfloat16", "float16") else "auto",
        "qformat": QFORMAT.get(precision.weights, "full_prec"),
        "tp_size": deployment.gpu.tensor_parallel,
    }
    if precision.kv_cache == "fp8":
        flags["kv_cache_dtype"] = "fp8"
    if precision.weights == "int4_awq":
        flags["awq_block_size"] = 128
    if precision.weights in QFORMAT or precision.kv_cache == "fp8":
        flags["calib_dataset"] = section.calibration
        flags["calib_size"] = AWQ_SAMPLES if precision.weights == "int4_awq" else CALIBRATION_SAMPLES
        flags["calib_max_seq_length"] = tokens
        flags["tokenizer_max_seq_length"] = 2 * tokens
    return "{python}", "{quantize}", *_words(flags)


def trtllm_build(deployment: Deployment, wanted: gate.Wanted) -> tuple[str, ...]:
    """The command line of trtllm-build. The number of ranks comes from the checkpoint; workers compile one each."""
    assert deployment.gpu is not None, "checked by the schema"
    flags: dict[str, str | int] = {
        "checkpoint_dir": "{checkpoint}",
        "output_dir": "{engine}",
        "max_batch_size": wanted.max_batch_size,
        "max_num_tokens": wanted.max_num_tokens,
        "max_seq_len": wanted.max_seq_len,
        "max_beam_width": 1,
        "kv_cache_type": "paged",
        "tokens_per_block": wanted.tokens_per_block,
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": _switch(wanted.paged_context_fmha),
        "use_fp8_context_fmha": _switch(wanted.fp8_context_fmha),
        "gemm_plugin": "disable" if deployment.precision.weights == "fp8" else "auto",  # FP8: TensorRT's own are faster
        "multiple_profiles": "enable",
        "workers": deployment.gpu.per_node,
    }
    if wanted.fusions:
        flags |= {"reduce_fusion": "enable", "user_buffer": "enable"}
    if wanted.max_draft_len:
        flags |= {"speculative_decoding_mode": "draft_tokens_external", "max_draft_len": wanted.max_draft_len}
    return "trtllm-build", *_words(flags)


def _switch(on: bool) -> str:
    return "enable" if on else "disable"


def _words(flags: dict[str, str | int]) -> list[str]:
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
