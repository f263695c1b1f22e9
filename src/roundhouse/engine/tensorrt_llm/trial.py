"""Loading an engine, and trying it before it gets requests."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import tensorrt_llm
import tensorrt_llm.bindings.executor as trtllm

from roundhouse.engine.base import EngineError
from roundhouse.text.tokenizer import Tokenizer

SECONDS = 120  # for one answer
COUNT = " ".join(map(str, range(1, 101)))  # a few blocks of tokens
CHECKED_TOKENS = 8


def load(folder: Path, config: Any) -> Any:
    """The Executor. Raises EngineError."""
    try:
        return trtllm.Executor(folder, trtllm.ModelType.DECODER_ONLY, config)
    except RuntimeError as error:
        version = tensorrt_llm.__version__
        raise EngineError(f"engine.path: TensorRT-LLM {version} cannot load {folder}: {error}") from error


def warm_up(executor: Any, folder: Path) -> Any:
    """Generate one token, and return the statistics of that iteration: they tell how large the KV cache has become.

    Raises EngineError.
    """
    _generate(executor, folder, [0], 1)
    deadline = time.monotonic() + SECONDS
    while not (stats := executor.get_latest_iteration_stats()):
        if time.monotonic() > deadline:
            raise EngineError(f"engine.path: {folder} runs, and its executor reports no statistics")
        time.sleep(0.01)
    return stats[-1]


def check_reuse(executor: Any, folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Answers over reused blocks must be those over computed ones, which an FP8 cache has got wrong before.

    NVIDIA/TensorRT-LLM#2699. The answer is one that no rounding changes: a count goes on. Raises EngineError.
    """
    prompt = tokenizer.encode(COUNT, add_special_tokens=True)[: max_seq_len - CHECKED_TOKENS]
    computed, reusing = (_generate(executor, folder, prompt, CHECKED_TOKENS) for _ in range(2))
    if computed != reusing:
        raise EngineError(
            f"kv_cache.reuse: {folder} answers {reusing} with reused FP8 blocks, and {computed} without; set it to "
            "false, or calibrate and build again"
        )


def _generate(executor: Any, folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """The greedy answer, while there are no other requests. Raises EngineError."""
    number = executor.enqueue_request(
        trtllm.Request(
            prompt,
            max_tokens,
            sampling_config=trtllm.SamplingConfig(top_k=1),
            output_config=trtllm.OutputConfig(exclude_input_from_output=True),
        )
    )
    responses = executor.await_responses(id=number, timeout=timedelta(seconds=SECONDS))
    if not responses or responses[-1].has_error():
        reason = responses[-1].error_msg if responses else f"no answer within {SECONDS} s"
        raise EngineError(f"engine.path: {folder} cannot generate a token: {reason}")
    return list(responses[-1].result.output_token_ids[0])
