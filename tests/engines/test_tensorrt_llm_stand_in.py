"""The stand-in of TensorRT-LLM's Executor: it refuses what the binding refuses, and what it computes is right."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.engines import DOUBLES, write_engine
from tests.engines.conftest import prompt, use_stand_in

use_stand_in()
import tensorrt_llm.bindings.executor as trtllm  # noqa: E402
from tensorrt_llm.bindings.executor import kv_cache  # noqa: E402

SURFACE = json.loads((DOUBLES / "trtllm_executor.json").read_text())["executor"]
MINUTE = timedelta(seconds=60)
NO_TIME = timedelta(0)


def found(name: str) -> Any:
    value: Any = trtllm
    if name.startswith("kv_cache."):
        return getattr(kv_cache, name.removeprefix("kv_cache."))
    for part in name.split("."):
        value = getattr(value, part)
    return value


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SURFACE["classes"], *SURFACE["enums"]])
def test_every_class_and_enum_of_the_surface_is_there(name: str) -> None:
    member = found(name)
    if name in SURFACE["enums"]:
        assert {each.name for each in member} == set(SURFACE["enums"][name])


def test_every_method_of_the_executor_is_there() -> None:
    described = SURFACE["classes"]["Executor"]
    assert all(callable(getattr(trtllm.Executor, name)) for name in described["methods"])
    assert not any(hasattr(trtllm.Executor, name) for name in described["absent"])


WRONG: dict[str, Callable[[], Any]] = {
    "unknown keyword": lambda: trtllm.KvCacheConfig(dtype="fp8"),
    "missing argument": lambda: trtllm.DynamicBatchConfig(True, True),
    "None for a bool": lambda: trtllm.Request([1], 2, streaming=None),
    "None for a number": lambda: trtllm.Request([1], 2, priority=None),
    "positional beyond the positional ones": lambda: trtllm.SamplingConfig(1, 5),
    "number for text": lambda: trtllm.GuidedDecodingParams(trtllm.GuidedDecodingParams.GuideType.REGEX, 5),
    "number for a time span": lambda: trtllm.KvCacheRetentionConfig([], 35, 500),
    "text for tokens": lambda: trtllm.Request("hello", 2),
    "float for a token": lambda: trtllm.Request([1.0], 2),
    "number for a bool": lambda: trtllm.OutputConfig(return_log_probs=1),
    "negative seed": lambda: trtllm.SamplingConfig(seed=-1),
    "too large a token": lambda: trtllm.Request([2**31], 2),
    "enum of another kind": lambda: trtllm.SchedulerConfig(trtllm.BatchingType.INFLIGHT),
    "list for a tensor": lambda: trtllm.Request([1], 2, embedding_bias=[0.0]),
    "constructor without any": lambda: trtllm.IterationStats(iter=1),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise_as_the_binding_does(case: str) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        WRONG[case]()


def test_retention_ranges_must_not_overlap() -> None:
    def kept(*ranges: tuple[int, int | None]) -> list[int]:
        make = trtllm.KvCacheRetentionConfig.TokenRangeRetentionConfig
        made = trtllm.KvCacheRetentionConfig([make(start, end, 50) for start, end in ranges])
        return [each.token_start for each in made.token_range_retention_configs]

    assert kept((50, 100), (30, 50), (100, None)) == [30, 50, 100]
    with pytest.raises(ValueError, match="Token ranges must be non-overlapping"):
        kept((50, 100), (30, 51))
    with pytest.raises(ValueError, match="Invalid use of end indicator"):
        kept((30, 50), (0, None))


def test_defaults_and_properties() -> None:
    config = trtllm.ExecutorConfig()
    assert config.enable_chunked_context is False
    assert config.kv_cache_config.enable_block_reuse is True
    config.max_batch_size = 4
    with pytest.raises(TypeError):
        config.max_batch_size = "4"
    config.anything = 1  # this class takes attributes of one's own
    with pytest.raises(AttributeError):
        trtllm.SamplingConfig().anything = 1
    with pytest.raises(AttributeError):
        trtllm.SchedulerConfig().context_chunking_policy = None
    one = trtllm.Request([1], 2, priority=0.7, type=trtllm.RequestType.REQUEST_TYPE_CONTEXT_ONLY)
    assert one.request_type is trtllm.RequestType.REQUEST_TYPE_CONTEXT_ONLY
    assert not hasattr(one, "priority")


# --- an executor ----------------------------------------------------------------------------------------------------


class Executors:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.made = folder, model, []  # type: ignore[var-annotated]

    def __call__(self, *, config: dict[str, Any] | None = None, **engine: Any) -> Any:
        changes = {"tokens_per_block": 16, "max_seq_len": 256, **engine}
        path = write_engine(self.folder / str(len(self.made)), self.model, **changes)
        settings = {"max_batch_size": 4, "enable_chunked_context": True, **(config or {})}
        made = trtllm.Executor(path, trtllm.ModelType.DECODER_ONLY, trtllm.ExecutorConfig(**settings))
        self.made.append(made)
        return made


@pytest.fixture(params=[True, False], ids=["lockstep", "threaded"])
def make(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, random_model: Path
) -> Iterator[Executors]:
    monkeypatch.setattr(trtllm.Executor, "lockstep", request.param)
    executors = Executors(tmp_path, random_model)
    yield executors
    for executor in executors.made:
        executor.shutdown()


def asking(number: int, max_tokens: int = 8, **fields: Any) -> Any:
    output = trtllm.OutputConfig(exclude_input_from_output=True, return_perf_metrics=True)
    return trtllm.Request(list(prompt(number)), max_tokens, **{"output_config": output, **fields})


def responses(executor: Any, number: int) -> list[Any]:
    """All of one request, up to its final one."""
    gathered: list[Any] = []
    while not gathered or not (gathered[-1].has_error() or gathered[-1].result.is_final):
        gathered += executor.await_responses(id=number, timeout=MINUTE)
    return gathered


def tokens(executor: Any, one: Any) -> list[int]:
    return [t for each in responses(executor, executor.enqueue_request(one)) for t in each.result.output_token_ids[0]]


def test_streamed_tokens_are_the_new_ones_and_whole_answers_echo_unless_told_not_to(make: Executors) -> None:
    executor = make()
    streamed = responses(executor, executor.enqueue_request(asking(1, streaming=True)))
    whole = tokens(executor, asking(1))
    assert [t for each in streamed for t in each.result.output_token_ids[0]] == whole
    assert len(streamed) >= 8
    assert tokens(executor, asking(1, output_config=trtllm.OutputConfig())) == [*prompt(1), *whole]


def test_a_batch_gives_each_its_own_answer(make: Executors) -> None:
    executor = make()
    alone = [tokens(executor, asking(i, 10)) for i in range(9)]
    numbers = executor.enqueue_requests([asking(i, 10) for i in range(9)])
    assert [responses(executor, n)[-1].result.output_token_ids[0] for n in numbers] == alone
    stats = executor.get_latest_iteration_stats()
    assert max(each.inflight_batching_stats.num_scheduled_requests for each in stats) <= 4
    assert json.loads(stats[-1].to_json_str())["kvCacheStats"]["tokensPerBlock"] == 16
    assert executor.get_latest_iteration_stats() == []


def test_blocks_are_reused_and_salts_keep_them_apart(make: Executors) -> None:
    executor = make()
    long = trtllm.Request(list(prompt(1, 50)), 4, output_config=trtllm.OutputConfig(return_perf_metrics=True))
    salted = trtllm.Request(
        list(prompt(1, 50)), 4, output_config=trtllm.OutputConfig(return_perf_metrics=True), cache_salt_id=5
    )
    reused = [
        responses(executor, executor.enqueue_request(each))[-1].result.request_perf_metrics.kv_cache_metrics
        for each in (long, long, salted, salted)
    ]
    assert [each.num_reused_blocks for each in reused] == [0, 3, 0, 3]
    assert reused[1].num_new_allocated_blocks == 1


def test_cancelling_ends_with_a_final_response(make: Executors) -> None:
    executor = make(behaviour={"iteration_seconds": 0.005})
    number = executor.enqueue_request(asking(1, 200, streaming=True))
    executor.await_responses(id=number, timeout=MINUTE)
    executor.cancel_request(number)
    executor.cancel_request(12345)
    last = responses(executor, number)[-1].result
    assert last.finish_reasons == [trtllm.FinishReason.CANCELLED]


def test_cancelling_a_stream_with_log_probs_is_the_known_pitfall(make: Executors) -> None:
    executor = make(behaviour={"iteration_seconds": 0.005})
    output = trtllm.OutputConfig(return_log_probs=True)
    number = executor.enqueue_request(asking(1, 100, streaming=True, output_config=output))
    with pytest.raises(RuntimeError, match="can kill the process"):
        executor.cancel_request(number)


def test_end_id_stop_words_and_allotted_time(make: Executors) -> None:
    executor = make(behaviour={"iteration_seconds": 0.002})
    free = tokens(executor, asking(1, 30))
    place = free.index(free[12])
    last = responses(executor, executor.enqueue_request(asking(1, 30, end_id=free[12])))[-1].result
    assert last.output_token_ids[0] == free[:place]  # without the end id
    assert last.finish_reasons == [trtllm.FinishReason.END_ID]
    stopped = responses(executor, executor.enqueue_request(asking(1, 30, stop_words=[free[3:5]])))[-1].result
    assert stopped.output_token_ids[0] == free[:5]
    assert stopped.finish_reasons == [trtllm.FinishReason.STOP_WORDS]
    timed = asking(1, 230, allotted_time_ms=timedelta(milliseconds=1))
    assert responses(executor, executor.enqueue_request(timed))[-1].result.finish_reasons[0] in (
        trtllm.FinishReason.TIMED_OUT,
        trtllm.FinishReason.LENGTH,
    )


def test_log_probs_come_for_all_tokens_so_far(make: Executors) -> None:
    executor = make()
    output = trtllm.OutputConfig(return_log_probs=True, exclude_input_from_output=True)
    streamed = responses(executor, executor.enqueue_request(asking(1, 6, streaming=True, output_config=output)))
    assert [len(each.result.log_probs[0]) for each in streamed][:6] == [1, 2, 3, 4, 5, 6]


def test_draft_tokens_are_checked_in_one_response_and_that_is_all(make: Executors) -> None:
    executor = make(speculative_decoding_mode=2, max_draft_len=4)
    free = tokens(executor, asking(1, 20))
    for right in range(5):
        drafts = [*free[:right], *[(free[right] + 1) % 256] * (4 - right)]
        asked = asking(1, 20, external_draft_tokens_config=trtllm.ExternalDraftTokensConfig(drafts))
        (only,) = responses(executor, executor.enqueue_request(asked))
        assert only.result.output_token_ids[0] == free[: right + 1]
        metrics = only.result.request_perf_metrics.speculative_decoding
        assert (metrics.total_draft_tokens, metrics.total_accepted_draft_tokens) == (4, right)


def test_two_executors_draft_for_each_other(make: Executors) -> None:
    """As examples of TensorRT-LLM do it: propose, check, append."""
    draft, target = make(), make(speculative_decoding_mode=2, max_draft_len=4)
    expected = tokens(target, asking(1, 24))
    answer: list[int] = []
    while len(answer) < 24:
        proposal = tokens(draft, trtllm.Request([*prompt(1), *answer], 4, output_config=asking(1).output_config))
        checked = trtllm.Request(
            [*prompt(1), *answer],
            min(5, 24 - len(answer)),
            output_config=asking(1).output_config,
            external_draft_tokens_config=trtllm.ExternalDraftTokensConfig(proposal),
        )
        answer += tokens(target, checked)
    assert answer[:24] == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "draft tokens without room": (
        {"external_draft_tokens_config": trtllm.ExternalDraftTokensConfig([3])}, "speculative_decoding_mode",
    ),
    "too long": ({"max_tokens": 250}, "max_seq_len 256"),
    "two beams": ({"sampling_config": trtllm.SamplingConfig(2)}, "beam_width 2"),
    "temperature 0": ({"sampling_config": trtllm.SamplingConfig(temperature=0.0)}, "temperature"),
    "no_repeat_ngram_size 0": ({"sampling_config": trtllm.SamplingConfig(no_repeat_ngram_size=0)}, "bug"),
    "an unknown adapter": ({"lora_config": trtllm.LoraConfig(3)}, "LoRA"),
    "a guide": (
        {"guided_decoding_params": trtllm.GuidedDecodingParams(trtllm.GuidedDecodingParams.GuideType.JSON)}, "enabled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_request_cannot_have_is_an_error_response(make: Executors, case: str) -> None:
    executor = make()
    fields, text = REFUSED[case]
    good = executor.enqueue_request(asking(2))
    (response,) = responses(executor, executor.enqueue_request(asking(1, **fields)))
    assert response.has_error()
    assert text in response.error_msg
    with pytest.raises(RuntimeError):
        response.result  # noqa: B018
    assert len(responses(executor, good)[-1].result.output_token_ids[0]) == 8


LOADS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "batch beyond the engine's": ({"max_batch_size": 17}, {}, "max_batch_size 17 exceeds"),
    "chunked context without paged attention": ({}, {"use_paged_context_fmha": False}, "paged context"),
    "padded input": ({}, {"remove_input_padding": False}, "packed input"),
    "static batching": ({"batching_type": trtllm.BatchingType.STATIC}, {}, "deprecated"),
    "another version": ({}, {"version": "1.1.0"}, "version tag"),
    "ranks without mpirun": ({}, {"ranks": 2}, "worldSize 1"),
    "an orchestrator that cannot spawn": (
        {"parallel_config": trtllm.ParallelConfig(
            communication_mode=trtllm.CommunicationMode.ORCHESTRATOR,
            orchestrator_config=trtllm.OrchestratorConfig(True, "/nowhere"))}, {}, "cannot spawn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADS)
def test_what_cannot_be_loaded_is_refused(make: Executors, case: str) -> None:
    config, engine, text = LOADS[case]
    with pytest.raises(RuntimeError, match=text):
        make(config=config, **engine)


def test_an_executor_that_was_shut_down_takes_nothing(make: Executors) -> None:
    executor = make()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        executor.enqueue_request(asking(1))


def test_requests_may_come_from_other_threads(make: Executors) -> None:
    executor = make()
    expected = {i: tokens(executor, asking(i)) for i in range(4)}
    got: dict[int, list[int]] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: tokens(executor, asking(i))})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert got == expected


def test_nothing_ready_is_an_empty_list(make: Executors) -> None:
    assert make().await_responses(timeout=NO_TIME) == []
