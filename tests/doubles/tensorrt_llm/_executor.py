"""The Executor: in-flight batching in a thread of its own, as the binding's, over tokens that are really computed.

What it refuses, it refuses where the binding does: arguments when they are bound, an engine when it is loaded, a
request with an error response. `Executor.lockstep = True` makes iterations run only inside `await_responses`, so that
tests that count them are exact; a real executor that happens to be slow looks the same.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from tensorrt_llm._library import LIBRARY
from tensorrt_llm._model import JSON, Model, Vocabulary
from tensorrt_llm._nanobind import Overloads
from tensorrt_llm._surface import EXECUTOR, SURFACE

from roundhouse.engine.base import EngineError, RequestError
from roundhouse.engine.embedded.config import EmbeddedConfig
from roundhouse.engine.protocol import FinishReason, Output, Perf, Sampling
from roundhouse.engine.protocol import Request as EmbeddedRequest

M = LIBRARY.members
Finish: Any = M["FinishReason"]
GuideType: Any = M["GuidedDecodingParams.GuideType"]
REASONS = {
    FinishReason.STOP: Finish.END_ID,
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.CANCELLED: Finish.CANCELLED,
    FinishReason.TIMEOUT: Finish.TIMED_OUT,
}
DRAFT_TOKENS_EXTERNAL = 2


class Response(M["Response"]):  # type: ignore[misc]
    """One of an error and a result; asking for the other one raises, as in the binding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_error"] = self._arguments.get("error_msg")

    def has_error(self) -> bool:
        return self._error is not None

    def clear_context_logits(self) -> None:
        pass

    def clear_generation_logits(self) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        error = super().__getattribute__("__dict__").get("_error")
        if name == "result" and error is not None:
            raise RuntimeError("cannot get the result of a response that has an error")
        if name == "error_msg" and error is None:
            raise RuntimeError("cannot get the error of a response that has none")
        return super().__getattribute__(name)


class KvCacheRetentionConfig(M["KvCacheRetentionConfig"]):  # type: ignore[misc]
    """Sorts its ranges; none may reach into the next."""

    TokenRangeRetentionConfig = M["KvCacheRetentionConfig.TokenRangeRetentionConfig"]

    @wraps(M["KvCacheRetentionConfig"].__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_range_retention_configs = sorted(self.token_range_retention_configs, key=lambda r: r.token_start)
        for each, following in pairwise(self.token_range_retention_configs):
            if each.token_end is None:
                raise ValueError("Invalid use of end indicator.")
            if each.token_end > following.token_start:
                raise ValueError("Token ranges must be non-overlapping.")


@dataclass
class Engine:
    """What the engine folder says. `rank0.engine` of a stand-in's engine is JSON: which model, and how it behaves.

    iteration_seconds: at least so long takes each iteration. free_kv_tokens: what KV cache the whole free memory holds.
    end_id_in_output: whether an end id is among the tokens. corrupt_reuse: answers over reused blocks are wrong.
    """

    folder: Path
    config: dict[str, Any]
    model: str
    iteration_seconds: float = 0.0
    free_kv_tokens: int = 65536
    end_id_in_output: bool = False
    corrupt_reuse: bool = False

    @classmethod
    def read(cls, folder: Path) -> Engine:
        config = json.loads((folder / "config.json").read_text())
        world = config["pretrained_config"]["mapping"]["world_size"]
        try:
            ranks = [json.loads((folder / f"rank{rank}.engine").read_text()) for rank in range(world)]
        except FileNotFoundError as error:
            raise RuntimeError(f"[TensorRT-LLM][ERROR] Error opening engine file: {error.filename}") from error
        except ValueError as error:
            raise RuntimeError("[TensorRT-LLM][ERROR] Failed to deserialize cuda engine") from error
        if config["version"] != SURFACE["version"]:
            raise RuntimeError("[TensorRT-LLM][ERROR] serialization version tag of the engine does not match")
        known = {key: value for key, value in ranks[0].items() if key in cls.__dataclass_fields__}
        return cls(folder, config, **known)

    @property
    def build(self) -> dict[str, Any]:
        return self.config["build_config"]

    @property
    def plugins(self) -> dict[str, Any]:
        return self.build["plugin_config"]

    @property
    def world_size(self) -> int:
        return self.config["pretrained_config"]["mapping"]["world_size"]


@dataclass
class Live:
    """A request on its way. `drafts`: those still to be compared; `held`: tokens of the step that compares them."""

    number: int
    request: Any
    drafts: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stopped: bool = False  # a stop word has ended it
    checked: bool = False  # its draft tokens have been
    proposed: int = 0
    accepted: int = 0
    iterations: int = 0


def _members(cls: type) -> type:
    """Bind the arguments of each method as the surface says, before the method gets them by name."""
    for name, described in EXECUTOR["classes"]["Executor"]["methods"].items():
        if name not in ("__enter__", "__exit__"):
            setattr(cls, name, _bound(name, described["overloads"], getattr(cls, name)))
    return cls


def _bound(name: str, specs: list[Any], method: Any) -> Any:
    overloads = Overloads(name, specs, LIBRARY)

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, **overloads.bind(args, kwargs))

    return call


@_members
class Executor(M["Executor"]):  # type: ignore[misc]
    lockstep: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        state = self.__dict__
        arguments = self._arguments
        if "model_path" not in arguments:
            raise NotImplementedError("the stand-in loads decoder-only engines from a folder")
        if arguments["model_type"] is not M["ModelType"].DECODER_ONLY:
            raise RuntimeError("the stand-in has decoder-only engines")
        state["config"] = arguments["executor_config"]
        state["engine"] = Engine.read(Path(arguments["model_path"]))
        _check(self.engine, self.config)
        state["_lock"] = threading.Condition()
        state["_closed"] = False
        state["_failure"] = None
        state["_responses"] = deque()
        state["_live"] = {}
        state["_last"] = 0
        state["_iteration"] = 0
        state["_completed"] = 0
        state["_adapters"] = set()
        state["_stats"] = deque(maxlen=self.config.iter_stats_max_iterations)
        state["_leader"] = _rank() == 0
        if self._leader:
            state["_model"] = _load(self.engine, self.config)
            state["_thread"] = threading.Thread(target=self._run, daemon=True)
            if not self.lockstep:
                self._thread.start()

    # --- the binding's methods ------------------------------------------------------------------------

    def can_enqueue_requests(self) -> bool:
        return self._leader

    def enqueue_request(self, request: Any) -> int:
        return self.enqueue_requests([request])[0]

    def enqueue_requests(self, requests: list[Any]) -> list[int]:
        if not self._leader:
            raise RuntimeError("enqueueRequests is only for the leader")
        with self._lock:
            self._check_open()
            for request in requests:
                self._check_request(request)
            numbers = [self._accept(request) for request in requests]
            self._lock.notify_all()
        return numbers

    def await_responses(self, **given: Any) -> Any:
        timeout = given.get("timeout")
        if "ids" in given:
            return [self._await([number], timeout) for number in given["ids"]]
        return self._await([given["id"]] if "id" in given else None, timeout)

    def get_num_responses_ready(self, id: int | None) -> int:
        with self._lock:
            return sum(1 for response in self._responses if id in (None, response.request_id))

    def cancel_request(self, id: int) -> None:
        with self._lock:
            live = self._live.get(id)
            if live is None:
                return
            if live.request.streaming and live.request.output_config.return_log_probs:
                raise RuntimeError("stand-in: cancelling a streamed request with log probs can kill the process")
            self._model.cancel(id)
            self._lock.notify_all()

    def get_latest_iteration_stats(self) -> list[Any]:
        with self._lock:
            stats = list(self._stats)
            self._stats.clear()
        return stats

    def get_latest_request_stats(self) -> list[Any]:
        return []  # request_stats_max_iterations is 0 wherever we use it

    def get_latest_debug_tensors(self) -> list[Any]:
        return []

    def get_kv_cache_event_manager(self) -> None:
        return None

    def shutdown(self) -> None:
        if not self._leader:
            _wait_for(int(os.environ["STAND_IN_LEADER_PID"]))
            return
        with self._lock:
            if self._closed:
                return
            self.__dict__["_closed"] = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._model.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # --- requests ---------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the executor was shut down")
        if self._failure is not None:
            raise RuntimeError(f"the executor has failed: {self._failure}")

    def _check_request(self, request: Any) -> None:
        """What enqueuing refuses at once."""
        if not request.input_token_ids:
            raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: !mInputTokens.empty()")
        if request.max_tokens < 1:
            raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: mMaxNewTokens > 0")
        if not 0 <= request._arguments["priority"] <= 1:
            raise RuntimeError("[TensorRT-LLM][ERROR] priority must be between 0 and 1")
        retention = request.kv_cache_retention_config
        ranges = retention.token_range_retention_configs if retention is not None else []
        if any(not 0 <= each.priority <= 100 for each in ranges):
            raise RuntimeError("[TensorRT-LLM][ERROR] retention priority must be between 0 and 100")

    def _accept(self, request: Any) -> int:
        self.__dict__["_last"] += 1
        number = self._last
        live = Live(number, request)
        try:
            embedded = self._embedded(live)
            self._model.submit(embedded)
        except (RequestError, ValueError) as error:
            self._model.guides.pop(number, None)
            self._model.ignored.pop(number, None)
            text = f"[TensorRT-LLM][ERROR] {error}"
            self._responses.append(Response(request_id=number, error_msg=text, client_id=request.client_id))
        else:
            self._live[number] = live
        return number

    def _embedded(self, live: Live) -> EmbeddedRequest:
        request, number = live.request, live.number
        build = self.engine.build
        if len(request.input_token_ids) + request.max_tokens > build["max_seq_len"]:
            raise ValueError(f"prompt and max_tokens exceed max_seq_len {build['max_seq_len']}")
        sampling = request.sampling_config
        if sampling.beam_width > self.config.max_beam_width:
            raise ValueError(f"beam_width {sampling.beam_width} exceeds {self.config.max_beam_width}")
        if sampling.temperature is not None and sampling.temperature <= 0:
            raise ValueError(f"temperature {sampling.temperature} must be above 0")
        if sampling.no_repeat_ngram_size == 0:
            raise ValueError("no_repeat_ngram_size 0 triggers a bug; leave it out")
        self._take_drafts(live)
        self._take_adapter(request.lora_config)
        self._take_guide(number, request)
        prompt = list(request.input_token_ids)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._model.ignored[number] = sampling.prompt_ignore_length or 0
        greedy = sampling.top_k == 1 or (not sampling.top_k and not sampling.top_p)
        allotted = request.allotted_time_ms
        return EmbeddedRequest(
            number,
            tuple(prompt),
            request.max_tokens,
            end_ids=() if request.end_id is None else (request.end_id,),
            sampling=Sampling(
                temperature=0.0 if greedy else sampling.temperature or 1.0,
                top_k=0 if greedy else sampling.top_k or 0,
                top_p=1.0 if greedy or sampling.top_p is None else sampling.top_p,
                repetition_penalty=sampling.repetition_penalty or 1.0,
                presence_penalty=sampling.presence_penalty or 0.0,
                frequency_penalty=sampling.frequency_penalty or 0.0,
                min_tokens=sampling.min_tokens or 0,
                seed=sampling.seed or 0,  # none given: the same each time
                bad_words=tuple(tuple(word) for word in request.bad_words or ()),
                logit_bias=self._bias(request.embedding_bias),
            ),
            log_probs=bool(request.output_config.return_log_probs),
            priority=round(request._arguments["priority"] * 2**30),
            cache_salt="" if request.cache_salt_id is None else str(request.cache_salt_id),
            arrival_ns=time.monotonic_ns(),
            deadline_ns=0 if allotted is None else time.monotonic_ns() + int(allotted.total_seconds() * 1e9),
        )

    def _bias(self, tensor: Any) -> dict[int, float]:
        if tensor is None:
            return {}
        vocab = self.engine.config["pretrained_config"]["vocab_size"]
        ranks = self.engine.world_size
        if tuple(tensor.shape) != (-(-vocab // ranks) * ranks,):
            raise ValueError(f"embedding_bias has shape {tuple(tensor.shape)}; it must have the vocabulary's")
        values = tensor.float().numpy()
        return {int(token): float(values[token]) for token in np.flatnonzero(values)}

    def _take_drafts(self, live: Live) -> None:
        drafts = live.request.external_draft_tokens_config
        if drafts is None:
            return
        build = self.engine.build
        if build["speculative_decoding_mode"] != DRAFT_TOKENS_EXTERNAL:
            raise ValueError("draft tokens need an engine of speculative_decoding_mode draft_tokens_external")
        if not 1 <= len(drafts.tokens) <= build["max_draft_len"]:
            raise ValueError(f"{len(drafts.tokens)} draft tokens; 1 to {build['max_draft_len']} are allowed")
        if not self.config.kv_cache_config.enable_block_reuse:
            raise ValueError("KV cache block reuse must be enabled for speculative decoding target model")
        live.drafts = list(drafts.tokens)
        live.proposed = len(live.drafts)

    def _take_adapter(self, lora: Any) -> None:
        if lora is None:
            return
        if self.engine.plugins["lora_plugin"] is None:
            raise ValueError("the engine was built without the LoRA plugin")
        if lora.weights is not None:
            if lora.config is None or lora.config.shape != (lora.weights.shape[0], 3):
                raise ValueError("LoRA config must have a row of 3 for each row of the weights")
            self._adapters.add(lora.task_id)
        elif lora.task_id not in self._adapters:
            raise ValueError(f"LoRA task {lora.task_id} not found in cache. Please send LoRA weights with request")

    def _take_guide(self, number: int, request: Any) -> None:
        guide = request.guided_decoding_params
        if guide is None:
            return
        if self._model.vocabulary is None:
            raise ValueError("Guided decoding is not enabled: no guided_decoding_config")
        if guide.guide_type is GuideType.JSON:
            self._model.guides[number] = JSON
        elif guide.guide_type is GuideType.REGEX:
            self._model.guides[number] = guide.guide
        else:
            raise ValueError(f"the stand-in has no grammar compiler for {guide.guide_type.name}; regex and json it can")

    # --- iterations -------------------------------------------------------------------------------------

    def _await(self, numbers: list[int] | None, timeout: timedelta | None) -> list[Any]:
        deadline = None if timeout is None else time.monotonic() + int(timeout.total_seconds() * 1000) / 1000
        with self._lock:
            while True:
                self._check_open()
                taken = [r for r in self._responses if numbers is None or r.request_id in numbers]
                if taken:
                    for response in taken:
                        self._responses.remove(response)
                    return taken
                if self.lockstep and self._model.unfinished():
                    self._iterate()
                    continue
                if self.lockstep and timeout is None:
                    raise RuntimeError("stand-in: would wait for ever")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return []
                self._lock.wait(left)

    def _run(self) -> None:
        torch.set_num_threads(1)  # both count for the calling thread
        numba.set_num_threads(1)
        pause = self.engine.iteration_seconds
        while True:
            with self._lock:
                while not self._closed and not self._model.unfinished():
                    self._lock.wait()
                if self._closed:
                    return
                started = time.monotonic()
                try:
                    self._iterate()
                except Exception as error:
                    self.__dict__["_failure"] = error
                self._lock.notify_all()
                if self._failure is not None:
                    return
            time.sleep(max(pause - (time.monotonic() - started), 0.0))

    def _iterate(self) -> None:
        started = time.monotonic()
        for output in self._model.step():
            self._take(self._live[output.id], output)
        self.__dict__["_iteration"] += 1
        self._stats.append(self._iteration_stats((time.monotonic() - started) * 1000))

    def _take(self, live: Live, output: Output) -> None:
        if output.error is not None:
            del self._live[live.number]
            text = f"[TensorRT-LLM][ERROR] {output.error.message}"
            self._responses.append(Response(live.number, text, live.request.client_id))
            return
        live.iterations += 1
        if not live.stopped and not live.checked:
            tokens = output.tokens
            ended = output.finish_reason is FinishReason.STOP and tokens and tokens[-1] == live.request.end_id
            if ended and not self.engine.end_id_in_output:
                tokens = tokens[:-1]
            tokens = self._corrupted(live, tokens)
            live.log_probs += (output.log_probs or [])[: len(tokens)]
            self._hold(live, tokens)
            if not output.last and self._at_stop_word(live):
                live.stopped = True
                self._model.cancel(live.number)
        if output.last:
            del self._live[live.number]
            self.__dict__["_completed"] += 1
        if output.last or (live.request.streaming and live.held and not live.proposed and not live.stopped):
            self._respond(live, output)

    def _corrupted(self, live: Live, tokens: list[int]) -> list[int]:
        sequence = self._model._scheduler._live.get(live.number)
        if not self.engine.corrupt_reuse or sequence is None or not sequence.reused_tokens:
            return tokens
        return [(token + 1) % self._model.info.vocab_size for token in tokens]

    def _hold(self, live: Live, tokens: list[int]) -> None:
        """Compare with the draft tokens: all that one step accepts travels in one response."""
        for token in tokens:
            live.held.append(token)
            live.tokens.append(token)
            if live.drafts:
                accepted = live.drafts.pop(0) == token
                live.accepted += accepted
                if not accepted:
                    live.drafts.clear()
                    self._check_done(live)
                    return
            elif live.proposed:
                self._check_done(live)
                return

    def _check_done(self, live: Live) -> None:
        """A request with draft tokens ends after the one step that checks them."""
        live.checked = True
        self._model.cancel(live.number)

    def _at_stop_word(self, live: Live) -> bool:
        return any(live.tokens[-len(word) :] == list(word) for word in live.request.stop_words or ())

    def _respond(self, live: Live, output: Output) -> None:
        request = live.request
        tokens, live.held = live.held, []
        if not request.streaming:
            tokens = live.tokens
            if not request.output_config.exclude_input_from_output:
                tokens = [*request.input_token_ids, *tokens]
        elif request.return_all_generated_tokens:
            tokens = live.tokens
        reason = Finish.NOT_FINISHED if output.finish_reason is None else REASONS[output.finish_reason]
        result = M["Result"]()
        result.is_final = result.is_sequence_final = output.last
        result.output_token_ids = [list(tokens)]
        if live.stopped:
            reason = Finish.STOP_WORDS
        elif live.checked and reason is Finish.CANCELLED:
            reason = Finish.NOT_FINISHED
        result.finish_reasons = [reason]
        result.decoding_iter = live.iterations
        result.avg_decoded_tokens_per_iter = len(live.tokens) / live.iterations
        if request.output_config.return_log_probs:
            result.log_probs = [list(live.log_probs)]  # all so far, in each response
            result.cum_log_probs = [sum(live.log_probs)]
        if request.output_config.return_perf_metrics and output.perf is not None:
            result.request_perf_metrics = _perf_metrics(live, output.perf)
        self._responses.append(Response(live.number, result, request.client_id))

    def _iteration_stats(self, milliseconds: float) -> Any:
        now = self._model.stats()
        stats = IterationStats()
        stats.timestamp = time.strftime("%m-%d-%Y %H:%M:%S.000000")
        stats.iter = self._iteration
        stats.iter_latency_ms = milliseconds
        stats.num_active_requests = now.active
        stats.num_queued_requests = now.waiting
        stats.num_completed_requests = self._completed
        stats.max_num_active_requests = now.max_active
        stats.cpu_mem_usage = now.memory_cpu_bytes // 2**20  # the field is an int: kept small
        stats.kv_cache_stats = _filled(
            "KvCacheStats",
            max_num_blocks=now.blocks_max,
            free_num_blocks=now.blocks_max - now.blocks_used,
            used_num_blocks=now.blocks_used,
            tokens_per_block=now.tokens_per_block,
            reused_blocks=now.blocks_reused,
        )
        stats.inflight_batching_stats = _filled(
            "InflightBatchingStats",
            num_scheduled_requests=now.active,
            num_context_requests=now.context,
            num_gen_requests=now.generation,
            num_paused_requests=now.paused,
            num_ctx_tokens=now.context_tokens,
            avg_num_decoded_tokens_per_iter=1.0,
        )
        return stats


class IterationStats(M["IterationStats"]):  # type: ignore[misc]
    def to_json_str(self) -> str:
        keys = EXECUTOR["stats_json_keys"]
        return json.dumps(
            {
                **_json(self, keys["IterationStats"]),
                "kvCacheStats": _json(self.kv_cache_stats, keys["kvCacheStats"]),
                "inflightBatchingStats": _json(self.inflight_batching_stats, keys["inflightBatchingStats"]),
            }
        )


def _json(value: Any, keys: list[str]) -> dict[str, Any]:
    names = {name.replace("_", "").lower(): name for name in value.__dict__}
    plain = {key: value.__dict__.get(names.get(key.lower(), "")) for key in keys}
    return {key: found for key, found in plain.items() if isinstance(found, int | float | str)}


def _filled(name: str, **fields: Any) -> Any:
    made = M[name]()
    for field_name, value in fields.items():
        setattr(made, field_name, value)
    return made


def _perf_metrics(live: Live, perf: Perf) -> Any:
    def at(nanoseconds: int) -> timedelta:
        return timedelta(microseconds=-(-nanoseconds // 1000))

    total = perf.new_blocks + perf.reused_blocks
    return _filled(
        "RequestPerfMetrics",
        timing_metrics=_filled(
            "RequestPerfMetrics.TimingMetrics",
            arrival_time=at(perf.arrival_ns),
            first_scheduled_time=at(perf.first_scheduled_ns),
            first_token_time=at(perf.first_token_ns),
            last_token_time=at(perf.last_token_ns),
        ),
        kv_cache_metrics=_filled(
            "RequestPerfMetrics.KvCacheMetrics",
            num_total_allocated_blocks=perf.new_blocks,
            num_new_allocated_blocks=perf.new_blocks,
            num_reused_blocks=perf.reused_blocks,
            num_missed_blocks=perf.new_blocks,
            kv_cache_hit_rate=perf.reused_blocks / total if total else 0.0,
        ),
        speculative_decoding=_filled(
            "RequestPerfMetrics.SpeculativeDecodingMetrics",
            acceptance_rate=live.accepted / live.proposed if live.proposed else 0.0,
            total_accepted_draft_tokens=live.accepted,
            total_draft_tokens=live.proposed,
        ),
    )


# --- loading --------------------------------------------------------------------------------------------


def _rank() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


def _check(engine: Engine, config: Any) -> None:
    """What loading refuses."""
    build, plugins = engine.build, engine.plugins
    if config.batching_type.name == "STATIC":
        raise RuntimeError("Static batching type is deprecated")
    for name, most in (("max_batch_size", build["max_batch_size"]), ("max_num_tokens", build["max_num_tokens"])):
        if (getattr(config, name) or 0) > most:
            raise RuntimeError(f"[TensorRT-LLM][ERROR] {name} {getattr(config, name)} exceeds the engine's {most}")
    if config.max_beam_width > build["max_beam_width"]:
        raise RuntimeError("[TensorRT-LLM][ERROR] max_beam_width exceeds the engine's")
    if config.enable_chunked_context and not plugins["use_paged_context_fmha"]:
        raise RuntimeError("[TensorRT-LLM][ERROR] chunked context needs paged context FMHA")
    if not plugins["remove_input_padding"] or str(build["kv_cache_type"]).upper() != "PAGED":
        raise RuntimeError("TrtGptModelInflightBatching requires packed input and paged KV cache.")
    cache = config.kv_cache_config
    if cache.free_gpu_memory_fraction is not None and not 0 < cache.free_gpu_memory_fraction < 1:
        raise RuntimeError("[TensorRT-LLM][ERROR] free_gpu_memory_fraction must be between 0 and 1")
    _check_ranks(engine, config.parallel_config)


def _check_ranks(engine: Engine, parallel: Any) -> None:
    orchestrated = parallel is not None and parallel.communication_mode.name == "ORCHESTRATOR"
    if orchestrated and parallel.orchestrator_config is None:
        raise RuntimeError("[TensorRT-LLM][ERROR] OrchestratorConfig must be set in orchestrator mode")
    if orchestrated:
        worker = parallel.orchestrator_config.worker_executable_path
        if parallel.orchestrator_config.spawn_processes and not Path(worker).is_file():
            raise RuntimeError(f"[TensorRT-LLM][ERROR] cannot spawn {worker!r}")
        return
    size = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if size != engine.world_size:
        raise RuntimeError(
            f"[TensorRT-LLM][ERROR] With communicationMode kLEADER, MPI worldSize {size} is expected to be equal to "
            f"tensorParallelism*pipelineParallelism {engine.world_size}"
        )


def _load(engine: Engine, config: Any) -> Model:
    build, cache = engine.build, config.kv_cache_config
    tokens = int(engine.free_kv_tokens * (cache.free_gpu_memory_fraction or 0.9))
    if cache.max_tokens is not None:
        tokens = min(tokens, cache.max_tokens)
    guided = config.guided_decoding_config
    vocabulary = None
    if guided is not None:
        vocabulary = Vocabulary(guided.encoded_vocab, guided.tokenizer_str, guided.stop_token_ids)
    try:
        return Model(
            EmbeddedConfig(
                model=engine.model,
                max_batch_size=config.max_batch_size or build["max_batch_size"],
                max_seq_len=build["max_seq_len"],
                max_num_tokens=config.max_num_tokens or build["max_num_tokens"],
                chunked_prefill=config.enable_chunked_context,
                tokens_per_block=engine.plugins["tokens_per_block"],
                kv_tokens=tokens,
                reuse=cache.enable_block_reuse and engine.plugins["use_paged_context_fmha"],
                threads=1,  # tests share their machine
            ),
            vocabulary,
        )
    except EngineError as error:
        raise RuntimeError(f"[TensorRT-LLM][ERROR] {error}") from error


def _wait_for(pid: int) -> None:
    """Until the process has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([pidfd], [], [])
    os.close(pidfd)
