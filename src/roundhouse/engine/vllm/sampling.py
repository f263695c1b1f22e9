"""A request's sampling in vLLM's terms."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import ErrorCode, Guide, Request

GUIDES = {"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}


def sampling_params(request: Request, vocab_size: int) -> SamplingParams:
    """Raises RequestError if vLLM's grammar backend cannot use the guide.

    Some values are set after construction: vLLM allows a narrower range there (temperature and penalties up to 2) than
    its sampler needs, and takes bad words as text only.
    """
    sampling = request.sampling
    params = SamplingParams(
        temperature=0.0 if sampling.greedy else 1.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        max_tokens=request.max_tokens,
        min_tokens=min(sampling.min_tokens, request.max_tokens),
        stop_token_ids=[token for token in request.end_ids if 0 <= token < vocab_size],
        ignore_eos=True,  # `end_ids` names every id that ends this request
        logprobs=request.top_log_probs if request.log_probs else None,
        logit_bias=sampling.logit_bias or None,
        structured_outputs=_structured(request.guide),
        detokenize=False,
        skip_clone=True,
    )
    if not sampling.greedy:
        params.temperature = sampling.temperature
    params.presence_penalty = sampling.presence_penalty
    params.frequency_penalty = sampling.frequency_penalty
    if sampling.bad_words:
        params._bad_words_token_ids = [list(word) for word in sampling.bad_words]
    if request.guide is not None:
        _check_guide(params, request.guide)
    return params


def _structured(guide: Guide | None) -> StructuredOutputsParams | None:
    if guide is None:
        return None
    if guide.kind == "json":
        return StructuredOutputsParams(json_object=True)
    field = GUIDES.get(guide.kind)
    if field is None:
        allowed = ", ".join(["json", *GUIDES])
        raise RequestError(ErrorCode.INVALID_ARGUMENT, f"guide: kind {guide.kind!r} is unknown; allowed are {allowed}")
    fields: dict[str, Any] = {field: guide.text}
    return StructuredOutputsParams(**fields)


def _check_guide(params: SamplingParams, guide: Guide) -> None:
    structured = params.structured_outputs
    try:
        validate_xgrammar_grammar(params)
    except Exception as error:  # whatever the grammar compiler raises
        reason = " ".join(str(error).split())
        raise RequestError(
            ErrorCode.INVALID_ARGUMENT, f"guide: the {guide.kind} cannot be used: {reason}; correct its text"
        ) from error
    structured._backend = "xgrammar"
