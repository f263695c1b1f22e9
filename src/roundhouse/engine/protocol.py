"""The messages between the front processes and the engine process, all of them.

One engine process serves many front processes (the Python models inside Triton). Each message is a small frozen struct,
encoded with msgpack. Per engine step a front gets ONE `Outputs` message with the new tokens of all its streams.

Times are `time.monotonic_ns()` values: on Linux that clock is the same in every process of a host.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import TypeVar

import msgspec

PROTOCOL_VERSION = 1


class ErrorCode(StrEnum):
    """Why a request was refused or failed. Each maps to one Triton status (gRPC and HTTP follow from it)."""

    INVALID_ARGUMENT = "invalid_argument"
    UNSUPPORTED = "unsupported"
    UNAVAILABLE = "unavailable"
    QUEUE_FULL = "queue_full"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words where it has one."""

    STOP = "stop"  # an end id or a stop word
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"  # cancelled by its front
    TIMEOUT = "timeout"  # its deadline passed


class Feature(StrEnum):
    """What a request may ask for beyond plain sampling. An engine lists those that it lacks, each with the reason."""

    TEMPERATURE = "temperature"
    TOP_K = "top_k"
    TOP_P = "top_p"
    REPETITION_PENALTY = "repetition_penalty"
    PRESENCE_PENALTY = "presence_penalty"
    FREQUENCY_PENALTY = "frequency_penalty"
    MIN_TOKENS = "min_tokens"
    SEED = "seed"
    LOG_PROBS = "log_probs"
    TOP_LOG_PROBS = "top_log_probs"
    BAD_WORDS = "bad_words"
    LOGIT_BIAS = "logit_bias"
    PRIORITY = "priority"
    CACHE_SALT = "cache_salt"
    BEAM_SEARCH = "beam_search"
    GUIDED_DECODING = "guided_decoding"
    LORA = "lora"
    LORA_WEIGHTS = "lora_weights"
    CONTEXT_LOGITS = "context_logits"
    GENERATION_LOGITS = "generation_logits"
    DRAFT_TOKENS = "draft_tokens"
    RETENTION = "retention"
    LOOKAHEAD = "lookahead"


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. The defaults are the model's plain distribution, sampled at temperature 1.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens; 1 is greedy.
        top_p: 1 keeps all tokens; 0 < top_p <= 1.
        repetition_penalty: > 0; 1 is none; counts prompt and generated tokens.
        presence_penalty, frequency_penalty: 0 is none; count generated tokens only.
        min_tokens: end ids are masked until this many tokens are generated.
        seed: unsigned 64 bits; None draws a fresh one.
        bad_words: token id sequences that must not be generated.
        logit_bias: token id -> value added to its logit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    seed: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: dict[int, float] = {}

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1


class Guide(msgspec.Struct, frozen=True):
    """Guided decoding. `kind` is json, json_schema, regex or ebnf_grammar; `text` is empty for json."""

    kind: str
    text: str = ""


class RetentionRange(msgspec.Struct, frozen=True, array_like=True):
    """Prompt tokens from `start` up to `end` (-1: all the rest). `priority`: 0 to 100; `duration_ms`: -1 for ever."""

    start: int
    end: int
    priority: int
    duration_ms: int = -1


class Retention(msgspec.Struct, frozen=True, array_like=True):
    """How long cached KV blocks are kept: those of the lowest priority go first; 35 is normal.

    `decode_priority` and `decode_duration_ms` are for the blocks of the answer; -1 for ever.
    """

    ranges: tuple[RetentionRange, ...] = ()
    decode_priority: int = 35
    decode_duration_ms: int = -1


class LoraWeights(msgspec.Struct, frozen=True, array_like=True):
    """An adapter that a request brings; the engine keeps it, and later requests name it by `lora_id` alone.

    weights: float16 `[rows, columns]`, the bytes of its rows one after another. config: int32 `[rows, 3]`: module,
    layer, adapter size of each row.
    """

    weights: bytes
    config: tuple[tuple[int, int, int], ...]


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence to generate.

    Attributes:
        id: unique among the live requests of the front that submits it.
        prompt: token ids, at least one.
        max_tokens: new tokens at most, >= 1.
        end_ids: generation ends after one of these ids; the id itself is part of the output.
        log_probs: report the log probability of each generated token.
        top_log_probs: report so many of the likeliest tokens beside each; needs log_probs.
        priority: higher is scheduled earlier; 0 is normal.
        cache_salt: prompts share KV blocks only within one salt.
        lora_id: of a LoRA adapter of the deployment; 0 is none.
        draft_tokens: a guess at the answer's first tokens, which the engine checks in one step.
        lora_weights: of the adapter, if the engine is to learn it from this request.
        arrival_ns: when the front got it.
        deadline_ns: dropped with FinishReason.TIMEOUT after it; 0 is never.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    end_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    log_probs: bool = False
    top_log_probs: int = 0
    priority: int = 0
    cache_salt: str = ""
    guide: Guide | None = None
    lora_id: int = 0
    draft_tokens: tuple[int, ...] = ()
    retention: Retention | None = None
    lora_weights: LoraWeights | None = None
    arrival_ns: int = 0
    deadline_ns: int = 0

    def samples(self, count: int) -> Iterator[Request]:
        """One request for each sample. A given seed counts up, so that the samples differ, the same each time."""
        seed = self.sampling.seed
        for index in range(count):
            if index == 0 or seed is None:
                yield self
            else:
                sampling = msgspec.structs.replace(self.sampling, seed=(seed + index) % 2**64)
                yield msgspec.structs.replace(self, sampling=sampling)


class Perf(msgspec.Struct, frozen=True, array_like=True):
    """What one finished sequence cost. Blocks are KV blocks; times are monotonic nanoseconds, 0 for never."""

    arrival_ns: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    new_blocks: int = 0
    reused_blocks: int = 0
    reused_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class Error(msgspec.Struct, frozen=True, array_like=True):
    code: ErrorCode
    message: str


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence gained in one engine step.

    A sequence's last Output carries `finish_reason` and `perf`, or `error`; exactly one such Output ends each submitted
    request, a cancelled one too. `log_probs` has one value a token (natural logarithm), or is None if not asked for;
    `top_log_probs` has a list a token, of token ids and values, likeliest first.
    """

    id: int
    tokens: list[int]
    log_probs: list[float] | None = None
    finish_reason: FinishReason | None = None
    perf: Perf | None = None
    error: Error | None = None
    top_log_probs: list[list[tuple[int, float]]] | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class EngineInfo(msgspec.Struct, frozen=True):
    """What a loaded engine is and allows. Sent to each front when it connects.

    Attributes:
        lacks: feature -> one sentence why this engine cannot do it. A request that needs it is refused with that text.
        max_seq_len: prompt and generated tokens together.
        max_batch_size: sequences that generate at the same time.
        max_queue: sequences that may wait beyond those.
    """

    engine: str
    version: str
    model: str
    vocab_size: int
    max_seq_len: int
    max_batch_size: int
    max_queue: int
    tokens_per_block: int
    max_blocks: int
    lacks: dict[Feature, str] = {}


class Stats(msgspec.Struct, frozen=True, omit_defaults=True):
    """A snapshot of the engine. Gauges unless called a total (counted since the engine started)."""

    timestamp_ns: int = 0
    steps: int = 0  # total
    active: int = 0  # requests that hold a slot, in prefill or in decode
    waiting: int = 0
    context: int = 0  # active requests in prefill
    generation: int = 0  # active requests in decode
    paused: int = 0
    max_active: int = 0
    context_tokens: int = 0  # prompt tokens in the last step
    blocks_max: int = 0
    blocks_used: int = 0  # held by live sequences; cached blocks that may be evicted count as free
    tokens_per_block: int = 0
    blocks_reused: int = 0  # total
    prompt_tokens: int = 0  # total
    generated_tokens: int = 0  # total
    draft_tokens: int = 0  # total
    accepted_draft_tokens: int = 0  # total
    memory_cpu_bytes: int = 0
    memory_gpu_bytes: int = 0
    memory_pinned_bytes: int = 0


# --- front -> engine --------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a front. `secret` comes from the private socket folder; `pid` lets the engine see it die."""

    version: int
    secret: str
    front: str
    pid: int


class Submit(msgspec.Struct, frozen=True, tag=True):
    requests: list[Request]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    ids: list[int]


# --- engine -> front --------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo
    pid: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The answer to a Hello that is not accepted, or to a message that could not be read."""

    message: str


class Outputs(msgspec.Struct, frozen=True, tag=True):
    outputs: list[Output]


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """Sent to every front several times a second."""

    stats: Stats


ToEngine = Hello | Submit | Cancel
ToFront = Welcome | Refused | Outputs | EngineStats

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def encode(message: ToEngine | ToFront) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Raises msgspec.DecodeError (or its subclass ValidationError) if `data` is no message to an engine."""
    return decoded(data, _to_engine)


def decode_to_front(data: bytes) -> ToFront:
    """Raises msgspec.DecodeError (or its subclass ValidationError) if `data` is no message to a front."""
    return decoded(data, _to_front)


def decoded(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Raises msgspec.DecodeError, also for text that is not UTF-8, of which msgspec says so in another way."""
    try:
        return decoder.decode(data)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from None
