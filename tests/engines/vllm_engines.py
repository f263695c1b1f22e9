"""vLLM engines for the conformance suite, in its environment only (scripts/setup --vllm).

An engine start takes two seconds and the suite has hundreds of tests, so an engine that is idle when a test closes it
is given out again, as new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from roundhouse.engine.base import Engine

VARIANTS: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm-fp8-kv": {"kv_dtype": "fp8", "tokens_per_block": 32},  # its CPU kernels want multiples of 32
    "vllm-ngram": {"speculative": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}},
    "vllm-draft-model": {"speculative": {"method": "draft_model", "num_speculative_tokens": 3}},  # it drafts for itself
}
needs_fp8_kv = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="this CPU has neither AVX-512 nor AMX, which vLLM's FP8 KV cache needs",
)
_idle: list[tuple[object, Engine]] = []  # settings, engine


def variants() -> list[Any]:
    """As parameters of a fixture."""
    return [pytest.param(name, marks=needs_fp8_kv) if name == "vllm-fp8-kv" else name for name in VARIANTS]


def make(variant: str, model: Path, **settings: Any) -> Engine:
    from roundhouse.engine.vllm.config import VllmConfig
    from roundhouse.engine.vllm.engine import Totals, VllmEngine

    settings = {**settings, **VARIANTS[variant]}
    if variant == "vllm-draft-model":
        settings["speculative"] = {**settings["speculative"], "model": str(model)}

    class Kept(VllmEngine):
        tokens_a_step = 1 + settings.get("speculative", {}).get("num_speculative_tokens", 0)

        def close(self) -> None:
            """Never really: vLLM's shutdown takes what all engines of a process share."""
            if not self.unfinished():
                _idle.append((config, self))

    config = VllmConfig(model=model, eager=True, dtype="float32", **settings)
    for number, (other, engine) in enumerate(_idle):
        if other == config:
            del _idle[number]
            assert isinstance(engine, VllmEngine)
            engine._core.reset_prefix_cache()
            engine._totals = Totals()
            return engine
    return Kept(config)
