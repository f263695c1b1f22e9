"""One sequence on its way from the engine to a client: what it gained, what of it may be sent, and in which tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from roundhouse.engine.protocol import Error, ErrorCode, FinishReason, Output, Perf
from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.stop_words import StopMatcher
from roundhouse.triton.generation import Generation
from roundhouse.triton.pacing import Departure

EXPIRED = Error(
    ErrorCode.UNAVAILABLE,
    "timeout: Request timeout expired before its first token; send it again later, or allow more time",
)
Tensors = Mapping[str, npt.NDArray[Any]]


class Form(Enum):
    """What an answer is made of."""

    TEXT = "text"  # text_output: tensorrt_llm_bls
    TOKENS = "tokens"  # output_ids: tensorrt_llm, called directly
    STEP = "step"  # output_ids, with what postprocessing needs: tensorrt_llm as a step of the ensemble


class Sender(Protocol):
    """Triton's end of one client request."""

    def send(self, tensors: Tensors, *, final: bool) -> None: ...

    def fail(self, error: Error, *, final: bool) -> None: ...

    def cancelled(self) -> bool:
        """Whether the client has gone away or cancelled."""


@dataclass(eq=False)
class Job:
    """One client request: a batch of prompts, each with its samples, answered over one sender.

    A prompt that was refused is None in `generations`.
    """

    generations: list[Generation | None]
    sender: Sender
    form: Form
    arrival_ns: int
    request_id: str = ""
    deadline_ns: int = 0  # monotonic; 0 for never
    open: int = 0  # streams that have not sent their last response
    cancelled: bool = False
    streams: list[Stream] = field(default_factory=list)


class Stream:
    """Collects what one sequence gains; gives it away in chunks."""

    def __init__(
        self,
        front: int,
        id: int,
        job: Job,
        generation: Generation,
        batch_index: int,
        sequence_index: int,
        text: Detokenizer,
        stop_words: StopMatcher | None,
    ) -> None:
        self.front = front
        self.id = id
        self.job = job
        self.generation = generation
        self.batch_index = batch_index
        self.sequence_index = sequence_index
        self.queued = False
        self.unacknowledged: dict[int, Departure] = {}  # chunk -> when it was sent, in the ensemble
        self.chunks = 0
        self.textless_since: float | None = None  # tokens wait that make no text yet
        self.generated = 0
        self.stopped = False  # a stop word or an order ended it; what the engine still sends is dropped
        self.done = False  # its last response is sent, or nobody wants one
        self.finish_reason: FinishReason | None = None
        self.error: Error | None = None
        self.perf: Perf | None = None
        self._text = text
        self._pending: list[int] = []
        self._pending_log_probs: list[float] = []
        self._cum_log_prob = 0.0
        self._window: list[int] = []
        self._stop_words = stop_words

    @property
    def last(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def take(self, output: Output) -> bool:
        """Add what the sequence gained. Returns whether the engine is to be told that the answer has ended."""
        tokens, log_probs = output.tokens, output.log_probs
        end = None
        if self.stopped:
            tokens = []
        elif self._stop_words is not None and tokens:
            end = self._stop_words.find(tokens)
            if end is not None:
                tokens, self.stopped = tokens[: end + 1], True
        self._pending += tokens
        self.generated += len(tokens)
        if log_probs is not None:
            self._pending_log_probs += log_probs[: len(tokens)]
        if output.last:
            self.error, self.perf = output.error, output.perf
            self.finish_reason = FinishReason.STOP if self.stopped and output.error is None else output.finish_reason
            if self.finish_reason is FinishReason.TIMEOUT and not self.generated:
                self.error, self.finish_reason = EXPIRED, None
        return end is not None and not output.last

    def sendable(self) -> bool:
        return self.last or (self.generation.stream and bool(self._pending))

    def chunk(self, *, textless: bool = False) -> dict[str, npt.NDArray[Any]] | None:
        """The tensors of the next response with all that is pending.

        None while that makes no text, since it ends inside a character or is special tokens; unless `textless`.
        """
        tokens, last = self._pending, self.last
        body = self._body(tokens, last, textless or last)
        if body is None:
            return None
        self.chunks += 1
        self._pending = []
        return {**body, **self._extras(tokens, last)}

    def _body(self, tokens: list[int], last: bool, textless: bool) -> dict[str, npt.NDArray[Any]] | None:
        generation, form = self.generation, self.job.form
        if form is not Form.TOKENS and not textless and not self._text.chunk_text(self._window, tokens, False):
            return None
        window = self._window
        if form is not Form.TOKENS:
            self._window = self._text.next_window(window, tokens)
        ids = [*generation.request.prompt, *tokens] if generation.echo else tokens
        if form is Form.TEXT:
            text = self._text.chunk_text(window, ids, last)
            return {"text_output": np.array([text.encode()], dtype=np.object_)}
        body: dict[str, npt.NDArray[Any]] = {
            "output_ids": np.array(ids, dtype=np.int32).reshape(1, 1, -1),
            "sequence_length": np.array([[len(ids)]], dtype=np.int32),
        }
        if form is Form.STEP:
            body["chunk"] = np.array([[self.front, self.id, self.chunks + 1, last, *window]], dtype=np.int64)
        return body

    def _extras(self, tokens: list[int], last: bool) -> dict[str, npt.NDArray[Any]]:
        generation = self.generation
        extras: dict[str, npt.NDArray[Any]] = {}
        if generation.request.log_probs:
            log_probs, self._pending_log_probs = self._pending_log_probs, []
            self._cum_log_prob += sum(log_probs)
            extras["output_log_probs"] = np.array([[log_probs]], dtype=np.float32)
            extras["cum_log_probs"] = np.array([[self._cum_log_prob]], dtype=np.float32)
        if generation.count_input:
            extras["num_input_tokens"] = _one(len(generation.request.prompt), np.int32)
        if generation.count_output:
            extras["num_output_tokens"] = _one(len(tokens), np.int32)
        if len(self.job.generations) > 1:
            extras["batch_index"] = _one(self.batch_index, np.int32)
        if generation.sequences > 1:
            extras["sequence_index"] = _one(self.sequence_index, np.int32)
        if last and self.finish_reason is not None:
            extras["finish_reason"] = np.array([self.finish_reason.value.encode()], dtype=np.object_)
        if last and generation.perf_metrics and self.perf is not None:
            extras |= perf_tensors(self.perf)
        return extras


def perf_tensors(perf: Perf) -> dict[str, npt.NDArray[Any]]:
    """`return_perf_metrics`: blocks INT32 `[1, 1]`, times INT64 `[1, 1]` in monotonic nanoseconds."""
    rate = perf.accepted_draft_tokens / perf.draft_tokens if perf.draft_tokens else 0.0
    return {
        "kv_cache_alloc_new_blocks": _one(perf.new_blocks, np.int32),
        "kv_cache_reused_blocks": _one(perf.reused_blocks, np.int32),
        "kv_cache_alloc_total_blocks": _one(perf.new_blocks + perf.reused_blocks, np.int32),
        "arrival_time_ns": _one(perf.arrival_ns, np.int64),
        "first_scheduled_time_ns": _one(perf.first_scheduled_ns, np.int64),
        "first_token_time_ns": _one(perf.first_token_ns, np.int64),
        "last_token_time_ns": _one(perf.last_token_ns, np.int64),
        "acceptance_rate": _one(rate, np.float32),
        "total_accepted_draft_tokens": _one(perf.accepted_draft_tokens, np.int32),
        "total_draft_tokens": _one(perf.draft_tokens, np.int32),
    }


def _one(value: float, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.array([[value]], dtype=dtype)
