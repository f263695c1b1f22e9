"""How one answer is cut into executor requests. Pure functions.

Most answers are one request. Two kinds need several, each with the prompt and all that was generated before it as its
prompt; what they share with the one before comes from reused KV blocks:

- The executor knows one end id, and masks only that one before min_tokens. With several end ids, the first min_tokens
  are a request of their own, in which the other end ids are bad words.
- Speculative decoding: each round the draft model proposes tokens, and the target checks them in one step.
"""

from __future__ import annotations

from dataclasses import dataclass

from roundhouse.engine.protocol import Request


@dataclass(frozen=True, slots=True)
class Round:
    """Attributes:
    tokens: generated at most.
    min_tokens: before which the end id is masked.
    masked: end ids that are bad words in this round.
    drafts: tokens that the draft model is to propose first; then `tokens` is one more.
    """

    tokens: int
    min_tokens: int = 0
    masked: tuple[int, ...] = ()
    drafts: int = 0


def end_ids(request: Request, vocab_size: int) -> tuple[int, ...]:
    """Those that can come. The executor gets the first; the others are looked for among the new tokens."""
    return tuple(dict.fromkeys(token for token in request.end_ids if 0 <= token < vocab_size))


def next_round(request: Request, ends: tuple[int, ...], generated: int, *, drafts: int) -> Round:
    """After `generated` tokens of an answer that goes on. `drafts`: tokens to propose, 0 while nothing is drafted."""
    left = request.max_tokens - generated
    minimum = min(max(request.sampling.min_tokens - generated, 0), left)
    if minimum and len(ends) > 1:
        return Round(minimum, minimum, ends[1:])
    if drafts and left > 1:
        proposed = min(drafts, left - 1)
        return Round(proposed + 1, min(minimum, proposed + 1), drafts=proposed)
    return Round(left, minimum)


def draftable(request: Request) -> bool:
    """Whether an answer may be made in rounds of drafts without being another answer.

    A sample would be pulled towards the drafts: TensorRT-LLM draws a token, and where that is not the draft's, draws
    again from the same probabilities, since it gets no logits of the draft. A guide and an adapter are not the draft
    model's, and the target reports no log probabilities of tokens that were accepted.
    """
    return not (
        request.guide is not None
        or request.lora_id
        or request.log_probs
        or request.draft_tokens
        or not request.sampling.greedy
    )


def accepted(drafts: list[int], tokens: list[int]) -> int:
    """How many of the draft tokens the target made its own: their common beginning."""
    count = 0
    for draft, token in zip(drafts, tokens, strict=False):
        if draft != token:
            break
        count += 1
    return count


def up_to_end(tokens: list[int], ends: tuple[int, ...]) -> list[int] | None:
    """The tokens up to the first of `ends`, that one included; None if none of them is among the tokens."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return None
