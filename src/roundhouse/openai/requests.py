"""From a checked body to what the engine is asked. Pure functions: a body, a tokenizer and the engine's limits in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from roundhouse.engine import checks
from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import EngineInfo, Guide, Request, Sampling
from roundhouse.openai.errors import ApiError, of_engine
from roundhouse.openai.schema import Chat, Completion, Generate
from roundhouse.text.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and its text where an answer has to repeat it."""

    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Ask:
    """What one body asks for: each prompt `n` times, the samples of a prompt beside each other.

    Attributes:
        requests: one for each sample; their ids are 0. prompts: the prompt of each.
        stops: stop sequences that are looked for in the text.
    """

    requests: tuple[Request, ...]
    prompts: tuple[Prompt, ...]
    stops: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    log_probs: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many samples there are."""
        return sum(len(prompt.ids) for prompt in self.prompts[:: self.n])


def completion(body: Completion, tokenizer: Tokenizer, info: EngineInfo, max_prompts: int) -> Ask:
    """Raises ApiError."""
    if body.suffix:
        raise ApiError(400, "The model does not support 'suffix'.", param="suffix", code="unsupported_parameter")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "'best_of' must equal 'n': answers are not ranked here.", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400, "'logprobs' of an echoed prompt are not offered: leave 'echo' or 'logprobs' out.", param="logprobs"
        )
    prompts = completion_prompts(body, tokenizer, info, max_prompts)
    return _ask(
        body,
        prompts,
        tokenizer,
        info,
        max_tokens=body.max_tokens or DEFAULT_COMPLETION_TOKENS,
        log_probs=body.logprobs is not None,
        top_log_probs=body.logprobs or 0,
        echo=bool(body.echo),
    )


def chat(body: Chat, prompt: Sequence[int], guide: Guide | None, tokenizer: Tokenizer, info: EngineInfo) -> Ask:
    """`prompt`: token ids of the rendered messages. Raises ApiError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "'top_logprobs' is only allowed when 'logprobs' is enabled.", param="top_logprobs")
    room = min(info.max_seq_len, info.max_blocks * info.tokens_per_block) - len(prompt)
    return _ask(
        body,
        [Prompt(tuple(prompt))],
        tokenizer,
        info,
        max_tokens=body.max_completion_tokens or body.max_tokens or max(room, 1),
        log_probs=bool(body.logprobs),
        top_log_probs=body.top_logprobs or 0,
        guide=guide,
    )


def completion_prompts(body: Completion, tokenizer: Tokenizer, info: EngineInfo, max_prompts: int) -> list[Prompt]:
    """The prompts of a body, in each of their four forms. Raises ApiError."""
    given: Any = body.prompt
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    listed: list[str | list[int]] = [given] if one else given
    if not listed:
        raise ApiError(400, "'prompt' is empty: send at least one.", param="prompt", code="invalid_value")
    if len(listed) > max_prompts:
        raise ApiError(400, f"'prompt' has {len(listed)} entries; at most {max_prompts} are allowed.", param="prompt")
    special = body.add_special_tokens is not False
    return [_prompt(one, tokenizer, info, special_tokens=special, echo=bool(body.echo)) for one in listed]


def encoded(text: str, param: str, tokenizer: Tokenizer, info: EngineInfo, *, special_tokens: bool) -> list[int]:
    """Token ids. A text that can never fit is refused before time is spent on it. Raises ApiError."""
    if len(text) > info.max_seq_len * tokenizer.longest_token:
        raise too_long(param, f"{len(text)} characters", info)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"'{param}' is not valid Unicode: half of a surrogate pair in it.", param=param) from None
    return tokenizer.encode(text, add_special_tokens=special_tokens)


def too_long(param: str, length: str, info: EngineInfo) -> ApiError:
    return ApiError(
        400,
        f"This model's maximum context length is {info.max_seq_len} tokens; '{param}' has {length}. Shorten it.",
        param=param,
        code="context_length_exceeded",
    )


def _prompt(
    given: str | list[int], tokenizer: Tokenizer, info: EngineInfo, *, special_tokens: bool, echo: bool
) -> Prompt:
    if isinstance(given, str):
        return Prompt(tuple(encoded(given, "prompt", tokenizer, info, special_tokens=special_tokens)), given)
    return Prompt(tuple(given), tokenizer.decode(given) if echo else "")


def _ask(
    body: Generate,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    info: EngineInfo,
    *,
    max_tokens: int,
    log_probs: bool,
    top_log_probs: int,
    echo: bool = False,
    guide: Guide | None = None,
) -> Ask:
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    words, ids = _stops(body, tokenizer)
    shared = Request(
        id=0,
        prompt=(),
        max_tokens=max_tokens,
        end_ids=ids if body.ignore_eos else (*tokenizer.end_ids, *ids),
        sampling=sampling(body),
        log_probs=log_probs,
        top_log_probs=top_log_probs,
        priority=-(body.priority or 0),
        cache_salt=body.cache_salt or "",
        guide=guide,
    )
    n = body.n or 1
    requests: list[Request] = []
    for prompt in prompts:
        request = msgspec.structs.replace(shared, prompt=prompt.ids)
        _check(request, info, "messages" if isinstance(body, Chat) else "prompt")
        requests += request.samples(n)
    return Ask(tuple(requests), tuple(p for p in prompts for _ in range(n)), words, n, echo, log_probs)


def sampling(body: Generate) -> Sampling:
    """Raises ApiError."""
    greedy = body.top_p == 0  # the smallest set of tokens that has any probability is the likeliest alone
    return Sampling(
        temperature=0.0 if greedy else 1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=body.top_p or 1.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        min_tokens=body.min_tokens or 0,
        seed=None if body.seed is None else body.seed % 2**64,
        logit_bias=_logit_bias(body.logit_bias or {}),
    )


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items() if bias}
    except ValueError:
        message = "Invalid key in 'logit_bias': keys are token ids, written as strings."
        raise ApiError(400, message, param="logit_bias", code="invalid_value") from None


def _stops(body: Generate, tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop sequences to look for in the text, and token ids that end an answer.

    A special token has no text in an answer: it can only be stopped at by its id.
    """
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    special = tokenizer.special_tokens
    words = tuple(word for word in given if word not in special)
    ids = [special[word] for word in given if word in special]
    return words, (*ids, *(body.stop_token_ids or ()))


def _check(request: Request, info: EngineInfo, param: str) -> None:
    if len(request.prompt) + request.max_tokens > info.max_seq_len:
        asked = f"{len(request.prompt)} tokens, and {request.max_tokens} more were asked for"
        raise too_long(param, asked, info)
    try:
        checks.check(request, info)
    except RequestError as error:
        raise of_engine(error.as_error()) from None
