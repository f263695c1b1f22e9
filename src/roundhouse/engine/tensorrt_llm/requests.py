"""One of our requests in the Executor's terms."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import timedelta
from typing import Any

import tensorrt_llm.bindings.executor as trtllm
import torch

from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import ErrorCode, Guide, Request, Retention, Sampling
from roundhouse.engine.tensorrt_llm.arguments import given
from roundhouse.engine.tensorrt_llm.rounds import Round

GUIDES = {"json": "JSON", "json_schema": "JSON_SCHEMA", "regex": "REGEX", "ebnf_grammar": "EBNF_GRAMMAR"}


def check(request: Request) -> None:
    """Refuse what the executor would fail late or without a reason. Raises RequestError."""
    guide, adapter = request.guide, request.lora_weights
    if guide is not None and guide.kind not in GUIDES:
        _refuse(f"guide: kind {guide.kind!r} is unknown; allowed are {', '.join(GUIDES)}")
    if guide is not None and guide.kind == "json_schema":
        try:
            json.loads(guide.text)
        except ValueError as error:
            _refuse(f"guide: the json_schema is not JSON: {error}; correct its text")
    if adapter is not None and not request.lora_id:
        _refuse("lora_weights: the adapter has no lora_task_id; later requests name it by that")
    if adapter is not None and (not adapter.config or len(adapter.weights) % (2 * len(adapter.config))):
        _refuse(f"lora_config: has {len(adapter.config)} rows, and lora_weights cannot be divided into so many")


def executor_request(
    request: Request, generated: list[int], part: Round, end_id: int | None, vocab_size: int, drafts: list[int]
) -> Any:
    """The request for one part of an answer, of which `generated` is there already.

    Tokens are streamed, unless the target checks `drafts`: then they come together. `vocab_size`: that of the logits.
    A client's own draft tokens are checked for a sample too, and TensorRT-LLM then favours them (see rounds.py).
    """
    bad_words = [*map(list, request.sampling.bad_words), *([token] for token in part.masked)]
    checked = drafts or list(request.draft_tokens[: part.tokens - 1] if not generated else ())
    return trtllm.Request(
        [*request.prompt, *generated],
        part.tokens,
        **given(
            streaming=not drafts,
            sampling_config=_sampling_config(request, part, len(generated)),
            output_config=trtllm.OutputConfig(
                return_log_probs=request.log_probs, exclude_input_from_output=True, return_perf_metrics=True
            ),
            end_id=end_id,
            bad_words=bad_words or None,
            embedding_bias=_embedding_bias(request.sampling, vocab_size),
            priority=priority(request.priority),
            cache_salt_id=salt_id(request.cache_salt),
            guided_decoding_params=_guided_decoding_params(request.guide),
            kv_cache_retention_config=_retention_config(request.retention),
            lora_config=_lora_config(request),
            external_draft_tokens_config=trtllm.ExternalDraftTokensConfig(checked) if checked else None,
        ),
    )


def draft_request(request: Request, generated: list[int], part: Round, end_id: int | None, vocab_size: int) -> Any:
    """The draft model's guess at the next tokens: its most likely ones, by the rules of the request."""
    proposal = Round(part.drafts, min(part.min_tokens, part.drafts))
    sampling = _sampling_config(request, proposal, len(generated))
    return trtllm.Request(
        [*request.prompt, *generated],
        part.drafts,
        **given(
            sampling_config=sampling,
            output_config=trtllm.OutputConfig(exclude_input_from_output=True),
            end_id=end_id,
            bad_words=[list(word) for word in request.sampling.bad_words] or None,
            embedding_bias=_embedding_bias(request.sampling, vocab_size),
            priority=priority(request.priority),
            cache_salt_id=salt_id(request.cache_salt),
        ),
    )


def priority(ours: int) -> float:
    """Between 0 and 1, 0.5 for 0; a higher priority stays higher."""
    return 0.5 + 0.5 * ours / (1 + abs(ours))


def salt_id(salt: str) -> int | None:
    """64 bits that nobody can aim at another tenant's."""
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little") if salt else None


def _sampling_config(request: Request, part: Round, generated: int) -> Any:
    """Greedy is top_k 1: the executor has no temperature 0. Without a seed it would draw the same sample each time.

    Its presence and frequency penalties count the prompt too, unless told its length.
    """
    sampling, greedy = request.sampling, request.sampling.greedy
    counted = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else (sampling.seed + generated) % 2**64
    return trtllm.SamplingConfig(
        beam_width=1,
        **given(
            top_k=1 if greedy else sampling.top_k,
            top_p=None if greedy else sampling.top_p,
            temperature=None if greedy else sampling.temperature,
            seed=None if greedy else seed,
            min_tokens=part.min_tokens or None,
            repetition_penalty=_unless(sampling.repetition_penalty, 1.0),
            presence_penalty=_unless(sampling.presence_penalty, 0.0),
            frequency_penalty=_unless(sampling.frequency_penalty, 0.0),
            prompt_ignore_length=len(request.prompt) if counted else None,
        ),
    )


def _unless(value: float, neutral: float) -> float | None:
    return None if value == neutral else value


def _embedding_bias(sampling: Sampling, vocab_size: int) -> Any:
    if not sampling.logit_bias:
        return None
    bias = torch.zeros(vocab_size, dtype=torch.float32)
    for token, value in sampling.logit_bias.items():
        bias[token] = value
    return bias


def _guided_decoding_params(guide: Guide | None) -> Any:
    if guide is None:
        return None
    kind = getattr(trtllm.GuidedDecodingParams.GuideType, GUIDES[guide.kind])
    return trtllm.GuidedDecodingParams(kind, **given(guide=guide.text or None))


def _retention_config(retention: Retention | None) -> Any:
    if retention is None:
        return None
    make = trtllm.KvCacheRetentionConfig.TokenRangeRetentionConfig
    ranges = [
        make(each.start, None if each.end < 0 else each.end, each.priority, _milliseconds(each.duration_ms))
        for each in retention.ranges
    ]
    return trtllm.KvCacheRetentionConfig(ranges, retention.decode_priority, _milliseconds(retention.decode_duration_ms))


def _milliseconds(duration: int) -> timedelta | None:
    return None if duration < 0 else timedelta(milliseconds=duration)


def _lora_config(request: Request) -> Any:
    if not request.lora_id:
        return None
    adapter = request.lora_weights
    if adapter is None:
        return trtllm.LoraConfig(request.lora_id)
    weights = torch.frombuffer(bytearray(adapter.weights), dtype=torch.float16).reshape(len(adapter.config), -1)
    return trtllm.LoraConfig(request.lora_id, weights, torch.tensor(adapter.config, dtype=torch.int32))


def _refuse(message: str) -> None:
    raise RequestError(ErrorCode.INVALID_ARGUMENT, message)
