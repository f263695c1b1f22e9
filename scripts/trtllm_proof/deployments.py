"""The deployments that the proof builds and serves: the shipped little models, in each precision that the GPU has."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_model import skills

from roundhouse.trtllm.gate import FP8_CAPABILITY
from roundhouse.trtllm.toolchain import Gpu

CALIBRATION_TEXTS = 512
# The smallest head size that TensorRT-LLM's attention kernels have; the conformance suite's own model has smaller ones.
HEAD_SIZE = 32


def deployments(models: Path, folder: Path, gpu: Gpu) -> dict[str, dict[str, Any]]:
    """Name -> deployment, with absolute paths; engines go into `folder`. 8.9 and newer GPUs have FP8."""
    sixteen_bits = {"weights": "bfloat16", "kv_cache": "auto"}
    capability = tuple(int(part) for part in gpu.compute_capability.split("."))
    eight_bits = {"weights": "fp8", "kv_cache": "fp8"} if capability >= FP8_CAPABILITY else sixteen_bits
    drafting: dict[str, Any] = {
        "method": "draft_target",
        "draft_model": str(models / "tiny-draft"),
        "draft_engine": str(folder / "engines/tiny-draft"),
        "draft_tokens": 5,
        "max_batch_size": 4,
    }
    common = {
        "model": {"path": str(models / "tiny")},
        "limits": {"max_batch_size": 64, "max_seq_len": 2048, "max_num_tokens": 2048, "queue": 512},
        "kv_cache": {"free_memory_fraction": 0.3},
        "gpu": {"product": gpu.product},
    }
    engine = {"kind": "tensorrt_llm", "calibration": str(folder / "calibration")}
    chosen = {"tiny": sixteen_bits, "tiny-fp8": eight_bits, "tiny-drafted": sixteen_bits}
    if eight_bits is sixteen_bits:
        del chosen["tiny-fp8"]
    result: dict[str, dict[str, Any]] = {
        name: {**common, "engine": {**engine, "path": str(folder / f"engines/{name}")}, "precision": precision}
        for name, precision in chosen.items()
    }
    # trtllm-build adds the draft tokens to the length, which must stay within the model's
    limits = {**result["tiny-drafted"]["limits"], "max_seq_len": 2048 - drafting["draft_tokens"]}
    result["tiny-drafted"] |= {"speculative": drafting, "limits": limits}
    return result


def conformance(folder: Path, gpu: Gpu) -> dict[str, Any]:
    """For the random model that tests/engines builds, with the limits that it uses."""
    return {
        "model": {"path": str(folder / "random-model")},
        "engine": {"kind": "tensorrt_llm", "path": str(folder / "engines/conformance")},
        "precision": {"weights": "float16", "kv_cache": "auto"},
        "limits": {"max_batch_size": 8, "max_seq_len": 256, "max_num_tokens": 2048},
        "kv_cache": {"tokens_per_block": 16},
        "gpu": {"product": gpu.product},
    }


def write_calibration(folder: Path) -> None:
    """A data set for quantize.py: prompts with their answers, in a column `text`."""
    rng = random.Random(0)
    pairs = (skills.sample(rng.choice(sorted(skills.EXACT_SKILLS)), rng, "train") for _ in range(CALIBRATION_TEXTS))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for pair in pairs:
            print(json.dumps({"text": pair.prompt + pair.answer}), file=file)
