"""What every engine checks before it takes a request. Messages name the field, the value, the limit, the way out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import EngineInfo, ErrorCode, Feature, Request, Retention, Sampling

MAX_SEED = 2**64 - 1
MAX_TOP_LOG_PROBS = 20  # OpenAI's, and what vLLM allows unless told otherwise
PRIORITIES = range(101)


def check(request: Request, info: EngineInfo) -> None:
    """Raises RequestError if `request` can never run on the engine that `info` describes."""
    _check_lengths(request, info)
    _check_ids("prompt", request.prompt, info)
    _check_sampling(request.sampling, info)
    _check_top_log_probs(request)
    _check_ids("draft_tokens", request.draft_tokens, info)
    if request.retention is not None:
        _check_retention(request.retention)
    for feature in _needs(request):
        if feature in info.lacks:
            raise RequestError(ErrorCode.UNSUPPORTED, f"{feature.value}: {info.lacks[feature]}")


def _check_lengths(request: Request, info: EngineInfo) -> None:
    prompt = len(request.prompt)
    if not prompt:
        _refuse("prompt: has 0 tokens; it needs at least 1")
    if request.max_tokens < 1:
        _refuse(f"max_tokens: {request.max_tokens} is not allowed; it must be at least 1")
    if prompt + request.max_tokens > info.max_seq_len:
        if prompt < info.max_seq_len:
            way_out = f"ask for at most {info.max_seq_len - prompt} tokens"
        elif request.max_tokens < info.max_seq_len:
            way_out = f"shorten the prompt to {info.max_seq_len - request.max_tokens} tokens or less"
        else:
            way_out = "shorten the prompt, and ask for fewer max_tokens"
        _refuse(
            f"prompt + max_tokens: {prompt} + {request.max_tokens} tokens exceed max_seq_len {info.max_seq_len}; "
            f"{way_out}"
        )
    pool = info.max_blocks * info.tokens_per_block
    if prompt + request.max_tokens > pool:
        _refuse(
            f"prompt + max_tokens: {prompt} + {request.max_tokens} tokens exceed the KV cache of {pool} tokens; "
            "ask for fewer tokens, or enlarge kv_cache.tokens of the deployment"
        )


def _check_ids(field: str, ids: Iterable[int], info: EngineInfo) -> None:
    for token in ids:
        if not 0 <= token < info.vocab_size:
            _refuse(f"{field}: token id {token} is not in the vocabulary; allowed are 0 to {info.vocab_size - 1}")


def _check_sampling(sampling: Sampling, info: EngineInfo) -> None:
    _check_number("temperature", sampling.temperature, sampling.temperature >= 0, "0 (greedy) or more")
    _check_number("top_k", sampling.top_k, sampling.top_k >= 0, "0 (all tokens) or more")
    _check_number("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "more than 0 and at most 1")
    _check_number("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0, "more than 0")
    _check_number("presence_penalty", sampling.presence_penalty, True, "finite")
    _check_number("frequency_penalty", sampling.frequency_penalty, True, "finite")
    _check_number("min_tokens", sampling.min_tokens, sampling.min_tokens >= 0, "0 or more")
    if sampling.seed is not None:
        _check_number("seed", sampling.seed, 0 <= sampling.seed <= MAX_SEED, f"0 to {MAX_SEED}")
    for word in sampling.bad_words:
        if not word:
            _refuse("bad_words: one of them has 0 tokens; each needs at least 1")
        _check_ids("bad_words", word, info)
    _check_ids("logit_bias", sampling.logit_bias, info)
    for token, bias in sampling.logit_bias.items():
        _check_number(f"logit_bias of token {token}", bias, True, "finite")


def _check_top_log_probs(request: Request) -> None:
    allowed = 0 <= request.top_log_probs <= MAX_TOP_LOG_PROBS
    _check_number("top_log_probs", request.top_log_probs, allowed, f"0 to {MAX_TOP_LOG_PROBS}")
    if request.top_log_probs and not request.log_probs:
        _refuse("top_log_probs: needs log_probs")


def _check_retention(retention: Retention) -> None:
    for each in retention.ranges:
        _check_number("retention range start", each.start, each.start >= 0, "0 or more")
        after = each.end == -1 or each.end > each.start
        _check_number("retention range end", each.end, after, f"more than its start ({each.start}), or -1 for the rest")
        _check_number("retention range priority", each.priority, each.priority in PRIORITIES, "0 to 100")
        _check_number("retention range duration_ms", each.duration_ms, each.duration_ms >= -1, "-1 (for ever) or more")
    for each, following in pairwise(sorted(retention.ranges, key=lambda range_: range_.start)):
        if each.end == -1 or each.end > following.start:
            _refuse(
                f"retention range end: {each.end} of the range from {each.start} reaches into the one from "
                f"{following.start}; end it there, or leave one of the two out"
            )
    _check_number(
        "retention decode priority", retention.decode_priority, retention.decode_priority in PRIORITIES, "0 to 100"
    )
    duration = retention.decode_duration_ms
    _check_number("retention decode duration_ms", duration, duration >= -1, "-1 (for ever) or more")


def _check_number(field: str, value: float, allowed: bool, rule: str) -> None:
    if not (math.isfinite(value) and allowed):
        _refuse(f"{field}: {value} is not allowed; it must be {rule}")


def _needs(request: Request) -> Iterable[Feature]:
    sampling = request.sampling
    needed = {
        Feature.TEMPERATURE: sampling.temperature not in (0.0, 1.0),
        Feature.TOP_K: sampling.top_k > 1,
        Feature.TOP_P: sampling.top_p < 1,
        Feature.REPETITION_PENALTY: sampling.repetition_penalty != 1,
        Feature.PRESENCE_PENALTY: sampling.presence_penalty != 0,
        Feature.FREQUENCY_PENALTY: sampling.frequency_penalty != 0,
        Feature.MIN_TOKENS: sampling.min_tokens > 0,
        Feature.SEED: sampling.seed is not None,
        Feature.LOG_PROBS: request.log_probs,
        Feature.TOP_LOG_PROBS: request.top_log_probs > 0,
        Feature.BAD_WORDS: bool(sampling.bad_words),
        Feature.LOGIT_BIAS: bool(sampling.logit_bias),
        Feature.PRIORITY: request.priority != 0,
        Feature.CACHE_SALT: bool(request.cache_salt),
        Feature.GUIDED_DECODING: request.guide is not None,
        Feature.LORA: request.lora_id != 0,
        Feature.DRAFT_TOKENS: bool(request.draft_tokens),
        Feature.RETENTION: request.retention is not None,
        Feature.LORA_WEIGHTS: request.lora_weights is not None,
    }
    return (feature for feature, asked in needed.items() if asked)


def _refuse(message: str) -> None:
    raise RequestError(ErrorCode.INVALID_ARGUMENT, message)
