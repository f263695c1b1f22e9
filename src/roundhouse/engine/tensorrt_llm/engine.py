"""TensorRT-LLM's Executor behind the engine interface.

The Executor batches in threads of its own. A step here is one call that takes all responses it has ready: mostly those
of one iteration. Each of our requests is one request there, or several in a row (see rounds.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import tensorrt_llm
import tensorrt_llm.bindings.executor as trtllm

from roundhouse.engine import checks
from roundhouse.engine.base import Engine, RequestError
from roundhouse.engine.protocol import (
    EngineInfo,
    Error,
    ErrorCode,
    Feature,
    FinishReason,
    Output,
    Request,
    Stats,
)
from roundhouse.engine.tensorrt_llm import requests, rounds, trial
from roundhouse.engine.tensorrt_llm.config import TensorrtLlmConfig, draft_config, target_config
from roundhouse.engine.tensorrt_llm.rounds import Round
from roundhouse.engine.tensorrt_llm.sequence import Sequence, gained, with_end
from roundhouse.trtllm.engine_folder import SpeculativeMode

LACKS = {
    Feature.BEAM_SEARCH: "engines are compiled for one beam here; ask for several sequences instead",
    Feature.CONTEXT_LOGITS: "a row of logits is as long as the vocabulary, and none is passed on; "
    "ask for return_log_probs",
    Feature.GENERATION_LOGITS: "a row of logits is as long as the vocabulary, and none is passed on; "
    "ask for return_log_probs",
    Feature.TOP_LOG_PROBS: "the executor reports the chosen token's log probability only; ask for return_log_probs",
    Feature.LOOKAHEAD: "engines are not compiled for lookahead decoding; leave it out",
}
NO_LORA = "the engine was compiled without a LoRA plugin; merge the adapter into the checkpoint, or compile with one"
NO_DRAFTS = "the engine was compiled without room for draft tokens; see `speculative` of the deployment"
NO_RETENTION = "kv_cache.reuse of the deployment is off, so no block is kept"
NO_TOKENIZER = "guided decoding needs the model's tokenizer; set model.tokenizer of the deployment"
REASONS = {
    trtllm.FinishReason.END_ID: FinishReason.STOP,
    trtllm.FinishReason.STOP_WORDS: FinishReason.STOP,
    trtllm.FinishReason.LENGTH: FinishReason.LENGTH,
    trtllm.FinishReason.TIMED_OUT: FinishReason.TIMEOUT,
    trtllm.FinishReason.CANCELLED: FinishReason.CANCELLED,
}
REFUSALS = (RuntimeError, ValueError)  # of the executor, and of the constructors of what it is given
WAIT = timedelta(milliseconds=2)  # the longest that a new request waits for a step to end; the executor counts in ms
NO_WAIT = timedelta(0)
NEVER = 2**63 - 1
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Totals:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class TensorrtLlmEngine(Engine):
    def __init__(self, config: TensorrtLlmConfig) -> None:
        self._config = config
        drafting = config.drafting
        self._draft: Any = None
        if drafting is not None:
            self._draft = trial.load(drafting.engine.path, draft_config(config, drafting))
        self._target = trial.load(config.engine.path, target_config(config))
        if not self._target.can_enqueue_requests():
            self._target.shutdown()  # this rank works until the leader ends
            sys.exit(0)
        self._live: dict[int, Sequence] = {}  # by our ids
        self._at_target: dict[int, Sequence] = {}  # by the executors' ids
        self._at_draft: dict[int, Sequence] = {}
        self._ready: list[Output] = []  # Outputs that were decided between steps
        self._next_deadline = NEVER
        self._totals = Totals()
        self._newest = trial.warm_up(self._target, config.engine.path)
        self.info = self._describe(self._newest)
        if config.reuse and config.tokenizer is not None and config.engine.kv_cache_quant_algo == "FP8":
            trial.check_reuse(self._target, config.engine.path, config.tokenizer, self.info.max_seq_len)

    def _describe(self, stats: Any) -> EngineInfo:
        config, engine = self._config, self._config.engine
        lacks = dict(LACKS)
        if not engine.lora:
            lacks[Feature.LORA] = lacks[Feature.LORA_WEIGHTS] = NO_LORA
        if engine.speculative_mode is not SpeculativeMode.DRAFT_TOKENS_EXTERNAL:
            lacks[Feature.DRAFT_TOKENS] = NO_DRAFTS
        if not config.reuse:
            lacks[Feature.RETENTION] = NO_RETENTION
        if config.tokenizer is None:
            lacks[Feature.GUIDED_DECODING] = NO_TOKENIZER
        return EngineInfo(
            engine="tensorrt_llm",
            version=tensorrt_llm.__version__,
            model=str(engine.path),
            vocab_size=engine.vocab_size,
            max_seq_len=config.seq_len,
            max_batch_size=config.max_batch_size,
            max_queue=config.max_queue,
            tokens_per_block=stats.kv_cache_stats.tokens_per_block,
            max_blocks=stats.kv_cache_stats.max_num_blocks,
            lacks=lacks,
        )

    # --- in -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        checks.check(request, self.info)
        requests.check(request)
        most = self._config.engine.max_draft_len
        if len(request.draft_tokens) > most:
            raise RequestError(
                ErrorCode.INVALID_ARGUMENT,
                f"draft_tokens: {len(request.draft_tokens)} are more than the {most} that the engine can check at "
                "once; send fewer",
            )
        sequence = Sequence(request, rounds.end_ids(request, self.info.vocab_size))
        self._live[request.id] = sequence
        if len({word[0] for word in request.sampling.bad_words if len(word) == 1}) == self.info.vocab_size:
            self._fail(sequence, "bad_words: they forbid every token of the vocabulary; allow some")
            return
        try:
            self._start(sequence)
        except Exception as error:
            del self._live[request.id]
            if not isinstance(error, REFUSALS):
                raise
            message = f"the executor refuses the request: {_line(error)}"
            raise RequestError(ErrorCode.INVALID_ARGUMENT, message) from error
        self._totals.prompt_tokens += len(request.prompt)
        if request.deadline_ns:
            self._next_deadline = min(self._next_deadline, request.deadline_ns)

    def _start(self, sequence: Sequence) -> None:
        """Enqueue the next round."""
        request, drafting = sequence.request, self._config.drafting
        proposed = 0
        if drafting is not None and len(self._live) <= drafting.max_batch_size and rounds.draftable(request):
            proposed = drafting.draft_tokens
        sequence.part = rounds.next_round(request, sequence.ends, len(sequence.generated), drafts=proposed)
        sequence.drafts = []
        sequence.reported = 0
        sequence.proposing = sequence.part.drafts > 0
        if sequence.proposing:
            made = requests.draft_request(request, sequence.generated, sequence.part, sequence.end_id, self._logits)
            sequence.executor_id = self._draft.enqueue_request(made)
            self._at_draft[sequence.executor_id] = sequence
        else:
            self._ask_target(sequence)

    def _go_on(self, sequence: Sequence, step: Callable[[Sequence], None]) -> None:
        """Take the next step of a request that was accepted; what fails there ends this one alone."""
        try:
            step(sequence)
        except Exception as error:
            self._fail(sequence, f"the executor refuses to go on: {_line(error)}")

    def _ask_target(self, sequence: Sequence) -> None:
        made = requests.executor_request(
            sequence.request, sequence.generated, sequence.part, sequence.end_id, self._logits, sequence.drafts
        )
        sequence.executor_id = self._target.enqueue_request(made)
        self._at_target[sequence.executor_id] = sequence

    @property
    def _logits(self) -> int:
        """Columns of the logits: the vocabulary, filled up so that the ranks can share it."""
        ranks = self._config.engine.tensor_parallel
        return -(-self.info.vocab_size // ranks) * ranks

    def cancel(self, request_id: int) -> None:
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._end(sequence, FinishReason.CANCELLED)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence that the executor would go on with.

        Its slot is free with the executor's final response, and so the last Output waits for that. But to cancel a
        streamed request with log probabilities can kill the process (NVIDIA/TensorRT-LLM#10810): that one is left to
        run out, unheard.
        """
        if sequence.ending is not None or sequence.told:
            return
        sequence.ending = reason
        if sequence.request.log_probs:
            sequence.told = True
            self._ready.append(Output(sequence.request.id, [], [], reason, sequence.perf(self.info.tokens_per_block)))
        else:
            (self._draft if sequence.proposing else self._target).cancel_request(sequence.executor_id)

    def _fail(self, sequence: Sequence, message: str, code: ErrorCode = ErrorCode.INTERNAL) -> None:
        sequence.told = True
        self._ready.append(Output(sequence.request.id, [], error=Error(code, message)))
        del self._live[sequence.request.id]

    def _expire(self, now: int) -> None:
        self._next_deadline = NEVER
        for sequence in self._live.values():
            deadline = sequence.request.deadline_ns
            if deadline and now > deadline:
                self._end(sequence, FinishReason.TIMEOUT)
            elif deadline:
                self._next_deadline = min(self._next_deadline, deadline)

    # --- a step -------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        if time.monotonic_ns() > self._next_deadline:
            self._expire(time.monotonic_ns())
        for response in self._responses():
            sequence = self._at_target.get(response.request_id)
            if sequence is not None:
                self._take(sequence, response)
        outputs, self._ready = self._ready, []
        return outputs

    def _responses(self) -> list[Any]:
        """What the target has ready; the draft model's proposals are taken on the way.

        It waits where there is something to wait for: with few sequences, as drafting wants it, that is one executor.
        """
        wait = NO_WAIT if self._ready else WAIT
        if self._at_draft:
            for response in self._draft.await_responses(timeout=NO_WAIT if self._at_target else wait):
                self._take_proposal(self._at_draft.pop(response.request_id), response)
        return list(self._target.await_responses(timeout=wait)) if self._at_target else []

    def _take_proposal(self, sequence: Sequence, response: Any) -> None:
        sequence.proposing = False
        if sequence.ending is not None:
            self._finish(sequence, sequence.ending)
            return
        if response.has_error():
            self._fail(sequence, f"the draft model has failed: {_line(response.error_msg)}")
            return
        tokens = list(response.result.output_token_ids[0])
        if response.result.finish_reasons[0] == trtllm.FinishReason.END_ID:
            tokens = with_end([], tokens, sequence.end_id)
        sequence.drafts = tokens[: sequence.part.drafts]
        if not sequence.drafts:  # nothing to check: the target goes on alone
            sequence.part = Round(1, min(sequence.part.min_tokens, 1))
        self._go_on(sequence, self._ask_target)

    def _take(self, sequence: Sequence, response: Any) -> None:
        final = response.has_error() or response.result.is_final
        if final:
            del self._at_target[sequence.executor_id]
        if sequence.told:  # nobody listens
            if final:
                del self._live[sequence.request.id]
        elif response.has_error():
            self._take_error(sequence, response.error_msg)
        else:
            self._take_result(sequence, response.result)

    def _take_result(self, sequence: Sequence, result: Any) -> None:
        request, final = sequence.request, result.is_final
        tokens, log_probs = gained(sequence, result)
        if final:
            sequence.add_metrics(result.request_perf_metrics)
        if sequence.ending is not None:
            if final:
                self._finish(sequence, sequence.ending)
            return
        reason = REASONS.get(result.finish_reasons[0])
        if result.finish_reasons[0] == trtllm.FinishReason.END_ID and not request.log_probs:
            tokens = with_end(sequence.generated, tokens, sequence.end_id)
        cut = rounds.up_to_end(tokens, sequence.ends[1:])
        if cut is not None:
            tokens, log_probs, reason = cut, log_probs[: len(cut)], FinishReason.STOP
        self._count(sequence, tokens)
        if final and (reason not in (None, FinishReason.LENGTH) or _is_full(sequence)):
            self._finish(sequence, reason or FinishReason.LENGTH, tokens, log_probs)
            return
        if tokens:
            self._ready.append(Output(request.id, tokens, log_probs if request.log_probs else None))
        if cut is not None:
            self._end(sequence, FinishReason.STOP)
        elif final:
            self._go_on(sequence, self._start)

    def _count(self, sequence: Sequence, tokens: list[int]) -> None:
        if sequence.drafts:
            accepted = rounds.accepted(sequence.drafts, tokens)
            sequence.draft_tokens += len(sequence.drafts)
            sequence.accepted_draft_tokens += accepted
            self._totals.draft_tokens += len(sequence.drafts)
            self._totals.accepted_draft_tokens += accepted
        if tokens:
            sequence.last_token_ns = time.monotonic_ns()
            sequence.first_token_ns = sequence.first_token_ns or sequence.last_token_ns
        sequence.generated += tokens
        self._totals.generated_tokens += len(tokens)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        tokens: Iterable[int] = (),
        log_probs: Iterable[float] = (),
    ) -> None:
        request = sequence.request
        del self._live[request.id]
        values = list(log_probs) if request.log_probs else None
        self._ready.append(Output(request.id, list(tokens), values, reason, sequence.perf(self.info.tokens_per_block)))

    def _take_error(self, sequence: Sequence, message: str) -> None:
        request = sequence.request
        if sequence.ending is not None:
            self._finish(sequence, sequence.ending)
        elif request.guide is not None or request.lora_id:
            field = "lora_task_id" if request.lora_id else "guide"
            self._fail(sequence, f"{field}: {_line(message)}", ErrorCode.INVALID_ARGUMENT)
        else:
            self._fail(sequence, f"the executor has failed the request: {_line(message)}")

    # --- figures ------------------------------------------------------------------------------------

    def unfinished(self) -> int:
        return len(self._live) + sum(1 for output in self._ready if output.id not in self._live)

    def stats(self) -> Stats:
        """The executor's newest iteration. It reports none while it is idle, so its last one says nothing then."""
        for each in self._target.get_latest_iteration_stats():
            self._newest = each
        batch, blocks, totals = self._newest.inflight_batching_stats, self._newest.kv_cache_stats, self._totals
        busy = bool(self._at_target)
        active = min((batch.num_scheduled_requests if busy else 0) + len(self._at_draft), len(self._live))
        return Stats(
            timestamp_ns=time.monotonic_ns(),
            steps=self._newest.iter,
            active=active,
            waiting=len(self._live) - active,
            context=min(batch.num_context_requests, active) if busy else 0,
            generation=min(batch.num_gen_requests, active) if busy else 0,
            paused=batch.num_paused_requests if busy else 0,
            max_active=self.info.max_batch_size,
            context_tokens=batch.num_ctx_tokens if busy else 0,
            blocks_max=blocks.max_num_blocks,
            blocks_used=blocks.used_num_blocks if busy else 0,
            tokens_per_block=blocks.tokens_per_block,
            blocks_reused=blocks.reused_blocks,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            draft_tokens=totals.draft_tokens,
            accepted_draft_tokens=totals.accepted_draft_tokens,
            memory_cpu_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
            memory_gpu_bytes=self._newest.gpu_mem_usage,
            memory_pinned_bytes=self._newest.pinned_mem_usage,
        )

    def close(self) -> None:
        self._target.shutdown()
        if self._draft is not None:
            self._draft.shutdown()


def _is_full(sequence: Sequence) -> bool:
    """Whether no round is to follow. A client's own draft tokens get one check, and that is the answer."""
    return len(sequence.generated) >= sequence.request.max_tokens or bool(sequence.request.draft_tokens)


def _line(message: object) -> str:
    """The executor's messages may have a stack trace in their later lines."""
    return next(iter(str(message).strip().splitlines()), "it gives no reason")
