"""vLLM's engine core behind the engine interface.

The core runs in this process and is stepped by its one thread. What a step gives goes to the fronts as token ids:
vLLM's detokeniser, output processor and API server take no part. With asynchronous scheduling the core keeps one step
ahead, so the GPU computes while this thread forwards the tokens of the step before.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreEventType, EngineCoreRequest
from vllm.v1.engine import FinishReason as VllmFinish
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor

from roundhouse.engine import checks
from roundhouse.engine.base import Engine, EngineError, RequestError
from roundhouse.engine.protocol import (
    EngineInfo,
    Error,
    ErrorCode,
    Feature,
    FinishReason,
    Output,
    Perf,
    Request,
    Stats,
)
from roundhouse.engine.vllm import cpu
from roundhouse.engine.vllm.attended import attend
from roundhouse.engine.vllm.config import VllmConfig, engine_arguments
from roundhouse.engine.vllm.sampling import sampling_params

LACKS = {
    Feature.LORA_WEIGHTS: "adapters are those of the deployment; name one by lora_task_id",
    Feature.BEAM_SEARCH: "vLLM's engine core samples single sequences only; ask for several sequences instead",
    Feature.CONTEXT_LOGITS: "vLLM gives log probabilities, not rows of logits",
    Feature.GENERATION_LOGITS: "vLLM gives log probabilities, not rows of logits",
    Feature.DRAFT_TOKENS: "vLLM drafts tokens itself and takes none from a request; see `speculative`",
    Feature.RETENTION: "vLLM keeps cached blocks by recency only",
    Feature.LOOKAHEAD: "vLLM has no lookahead decoding",
}
NO_BIAS = "vLLM does not apply it while it drafts tokens; leave it out, or deploy without speculation"
NO_LORA = "the deployment has no LoRA adapters; list them under engine.lora"
NO_TOKENIZER = "guided decoding needs the model's tokenizer; set model.tokenizer of the deployment"
NEVER = 2**63 - 1
PAGE = os.sysconf("SC_PAGE_SIZE")
REASONS = {VllmFinish.STOP: FinishReason.STOP, VllmFinish.LENGTH: FinishReason.LENGTH}


@dataclass(slots=True, eq=False)
class Sequence:
    """One live request. Times are monotonic nanoseconds, 0 for not yet."""

    request: Request
    generated: int = 0
    reused_tokens: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    def perf(self, tokens_per_block: int) -> Perf:
        """The last token has no keys and values yet when a sequence ends."""
        tokens = len(self.request.prompt) + self.generated - 1 if self.generated else 0
        reused = self.reused_tokens // tokens_per_block
        return Perf(
            arrival_ns=self.request.arrival_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
            new_blocks=-(-tokens // tokens_per_block) - reused if tokens else 0,
            reused_blocks=reused,
            reused_tokens=self.reused_tokens,
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
        )


@dataclass(slots=True)
class Totals:
    steps: int = 0
    blocks_reused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class VllmEngine(Engine):
    def __init__(self, config: VllmConfig) -> None:
        self._cuda = torch.cuda.is_available()
        if not self._cuda:
            cpu.mend()
        try:
            settings = EngineArgs(**engine_arguments(config)).create_engine_config()
            self._core = EngineCore(settings, Executor.get_class(settings), log_stats=True)
        except EngineError:
            raise
        except Exception as error:  # vLLM raises many kinds
            raise EngineError(f"vLLM {vllm.__version__} cannot load {config.model}: {error}") from error
        attend(self._core.model_executor, lambda: self.meanwhile())
        self._core.scheduler.make_spec_decoding_stats = self._drafted
        quantization = settings.model_config.quantization
        if config.int4_awq and "awq" not in (quantization or ""):
            raise EngineError(f"precision.weights: int4_awq, but the quantisation of {config.model} is {quantization}")
        lacks = dict(LACKS)
        if not config.tokenizer:
            lacks[Feature.GUIDED_DECODING] = NO_TOKENIZER
        if not config.lora:
            lacks[Feature.LORA] = NO_LORA
        if config.speculative:
            lacks[Feature.LOGIT_BIAS] = NO_BIAS
        self._lora = {id: LoRARequest(str(id), id, folder) for id, folder in config.lora.items()}
        self.info = EngineInfo(
            engine="vllm",
            version=vllm.__version__,
            model=str(config.model),
            vocab_size=settings.model_config.get_vocab_size(),
            max_seq_len=settings.model_config.max_model_len,
            max_batch_size=config.max_batch_size,
            max_queue=config.max_queue,
            tokens_per_block=settings.cache_config.block_size,
            max_blocks=settings.cache_config.num_gpu_blocks - 1,
            lacks=lacks,
        )
        self._live: dict[str, Sequence] = {}
        self._ready: list[Output] = []  # last Outputs that were decided between steps
        self._next_deadline = NEVER
        self._arrivals = 0
        self._totals = Totals()

    # --- in -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        checks.check(request, self.info)
        if request.lora_id and request.lora_id not in self._lora:
            known = ", ".join(map(str, self._lora))
            message = f"lora_task_id: {request.lora_id} is not an adapter of this deployment; it has {known}"
            raise RequestError(ErrorCode.INVALID_ARGUMENT, message)
        params = sampling_params(request, self.info.vocab_size)
        key = str(request.id)
        self._live[key] = Sequence(request)
        if len({word[0] for word in request.sampling.bad_words if len(word) == 1}) == self.info.vocab_size:
            self._fail(key, "bad_words: they forbid every token of the vocabulary; allow some")
            return
        self._arrivals += 1
        prepared, wave = self._core.preprocess_add_request(
            EngineCoreRequest(
                request_id=key,
                prompt_token_ids=list(request.prompt),
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=float(self._arrivals),  # only orders requests of equal priority
                lora_request=self._lora.get(request.lora_id),
                cache_salt=request.cache_salt or None,
                data_parallel_rank=None,
                priority=-request.priority,  # vLLM runs the lowest first
            )
        )
        self._core.add_request(prepared, wave)
        if request.deadline_ns:
            self._next_deadline = min(self._next_deadline, request.deadline_ns)

    def cancel(self, request_id: int) -> None:
        self._end(str(request_id), FinishReason.CANCELLED)

    def _end(self, key: str, reason: FinishReason) -> None:
        """Decide a last Output. The sequence stays live (unfinished) until `step` returns it."""
        sequence = self._live.get(key)
        if sequence is None or any(output.id == sequence.request.id for output in self._ready):
            return
        self._core.abort_requests([key])
        none: list[float] | None = [] if sequence.request.log_probs else None
        self._ready.append(Output(sequence.request.id, [], none, reason, sequence.perf(self.info.tokens_per_block)))

    def _fail(self, key: str, message: str) -> None:
        self._ready.append(Output(self._live[key].request.id, [], error=Error(ErrorCode.INTERNAL, message)))

    def _expire(self, now: int) -> None:
        self._next_deadline = NEVER
        for key, sequence in self._live.items():
            deadline = sequence.request.deadline_ns
            if deadline and now > deadline:
                self._end(key, FinishReason.TIMEOUT)
            elif deadline:
                self._next_deadline = min(self._next_deadline, deadline)

    # --- a step -------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        if time.monotonic_ns() > self._next_deadline:
            self._expire(time.monotonic_ns())
        outputs, self._ready = self._ready, []
        for output in outputs:
            del self._live[str(output.id)]
        if self._live:
            outputs += self._advance()
        if not self._live:
            self._settle()
        return outputs

    def _advance(self) -> list[Output]:
        """One engine iteration. The first call of a busy period only fills vLLM's queue of batches: go on then."""
        for _ in range(2):
            produced, executed = self._core.step_fn()
            self._core.post_step(executed)
            if produced is not None:
                break
        now = time.monotonic_ns()
        outputs: list[Output] = []
        for batch in (produced or {}).values():
            outputs += [output for each in batch.outputs if (output := self._output(each, now)) is not None]
        self._totals.steps += bool(executed)
        return outputs

    def _settle(self) -> None:
        """Take in the steps that are still under way when the last request has ended, so that its blocks come free.

        Unless another comes meanwhile.
        """
        while not self._live and (self._core.batch_queue or self._core.scheduler.has_requests()):
            _, executed = self._core.step_fn()
            self._core.post_step(executed)

    def _output(self, given: Any, now: int) -> Output | None:
        sequence = self._live.get(given.request_id)
        if sequence is None:
            return None  # cancelled while the step ran
        request, tokens = sequence.request, given.new_token_ids
        for event in given.events or ():
            if event.type is EngineCoreEventType.SCHEDULED and not sequence.first_scheduled_ns:
                sequence.first_scheduled_ns = int(event.timestamp * 1e9)
        if given.prefill_stats is not None:
            sequence.reused_tokens = given.prefill_stats.num_cached_tokens
            self._totals.blocks_reused += sequence.reused_tokens // self.info.tokens_per_block
            self._totals.prompt_tokens += len(request.prompt)
        if tokens:
            sequence.first_token_ns = sequence.first_token_ns or now
            sequence.last_token_ns = now
            sequence.generated += len(tokens)
            self._totals.generated_tokens += len(tokens)
        log_probs = _log_probs(given.new_logprobs, len(tokens)) if request.log_probs else None
        top = _top_log_probs(given.new_logprobs, len(tokens), request.top_log_probs) if request.top_log_probs else None
        if given.finish_reason is None:
            return Output(request.id, tokens, log_probs, top_log_probs=top) if tokens else None
        del self._live[given.request_id]
        reason = REASONS.get(given.finish_reason)
        if reason is None:
            message = f"vLLM ended the request with {given.finish_reason}; see the engine's log"
            return Output(request.id, tokens, log_probs, error=Error(ErrorCode.INTERNAL, message))
        perf = sequence.perf(self.info.tokens_per_block)
        return Output(request.id, tokens, log_probs, reason, perf, top_log_probs=top)

    def _drafted(
        self,
        stats: object,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> None:
        """vLLM's scheduler tells it of each sequence that had drafts in a step. It makes sums of its own of that, which
        lose what came before a sequence without any; here is told whose they were."""
        proposed = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
        self._totals.draft_tokens += proposed
        self._totals.accepted_draft_tokens += num_accepted_tokens
        if (sequence := self._live.get(request_id)) is not None:
            sequence.draft_tokens += proposed
            sequence.accepted_draft_tokens += num_accepted_tokens

    # --- figures ------------------------------------------------------------------------------------

    def unfinished(self) -> int:
        return len(self._live)

    def stats(self) -> Stats:
        scheduler, totals = self._core.scheduler, self._totals
        running = len(scheduler.running)
        decoding = sum(1 for request in scheduler.running if request.num_output_tokens)
        return Stats(
            timestamp_ns=time.monotonic_ns(),
            steps=totals.steps,
            active=running,
            waiting=len(self._live) - len(self._ready) - running,
            context=running - decoding,
            generation=decoding,
            max_active=self.info.max_batch_size,
            blocks_max=self.info.max_blocks,
            blocks_used=round(scheduler.kv_cache_manager.usage * self.info.max_blocks),
            tokens_per_block=self.info.tokens_per_block,
            blocks_reused=totals.blocks_reused,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            draft_tokens=totals.draft_tokens,
            accepted_draft_tokens=totals.accepted_draft_tokens,
            memory_cpu_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
            memory_gpu_bytes=torch.cuda.memory_reserved() if self._cuda else 0,
        )

    def close(self) -> None:
        self._core.shutdown()


def _log_probs(given: Any, count: int) -> list[float]:
    """The sampled tokens' values: the first column. Rounding may leave one a little above 0."""
    return [] if not count else [min(float(value), 0.0) for value in given.logprobs[:count, 0]]


def _top_log_probs(given: Any, count: int, width: int) -> list[list[tuple[int, float]]]:
    """The likeliest tokens: the columns after the first."""
    if not count:
        return []
    ids, values = given.logprob_token_ids[:count, 1 : width + 1], given.logprobs[:count, 1 : width + 1]
    return [
        [(int(token), min(float(value), 0.0)) for token, value in zip(*row, strict=True)]
        for row in zip(ids, values, strict=True)
    ]
