"""The TensorRT-LLM engine beyond the conformance suite: what it asks of the Executor, rounds, known pitfalls."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundhouse.engine import checks
from roundhouse.engine.base import EngineError, RequestError
from roundhouse.engine.protocol import (
    ErrorCode,
    FinishReason,
    Guide,
    LoraWeights,
    Request,
    Retention,
    RetentionRange,
    Sampling,
)
from roundhouse.text.tokenizer import Tokenizer
from roundhouse.trtllm import engine_folder
from tests.doubles.engines import write_engine
from tests.engines.conftest import (
    GREEDY,
    VOCAB_SIZE,
    Answer,
    drain,
    make_embedded,
    prompt,
    request,
    run,
    run_one,
    use_stand_in,
)

use_stand_in()
import tensorrt_llm.bindings.executor as trtllm  # noqa: E402

from roundhouse.engine.tensorrt_llm import config as configs  # noqa: E402
from roundhouse.engine.tensorrt_llm import requests, rounds  # noqa: E402
from roundhouse.engine.tensorrt_llm.config import Drafting, TensorrtLlmConfig  # noqa: E402
from roundhouse.engine.tensorrt_llm.engine import TensorrtLlmEngine  # noqa: E402
from roundhouse.engine.tensorrt_llm.rounds import Round  # noqa: E402

TINY = Path(__file__).parents[2] / "models/tiny"
LIMITS: dict[str, Any] = {"max_batch_size": 8, "max_seq_len": 256, "kv_tokens": 2048, "partial_reuse": False}


class Built:
    """Engines of a test, closed after it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.engines = folder, model, []  # type: ignore[var-annotated]

    def compiled(self, name: str = "engine", model: Path | None = None, **changes: Any) -> engine_folder.EngineFolder:
        """A compiled engine of the random model, with 16 tokens a block."""
        changes = {"tokens_per_block": 16, "max_seq_len": 256, **changes}
        return engine_folder.read(write_engine(self.folder / name, model or self.model, **changes))

    def __call__(self, engine: engine_folder.EngineFolder | None = None, **settings: Any) -> TensorrtLlmEngine:
        config = TensorrtLlmConfig(engine=engine or self.compiled(), **{**LIMITS, **settings})
        self.engines.append(TensorrtLlmEngine(config))
        return self.engines[-1]

    def drafting(self, *, draft: Path | None = None, batch: int = 4, **settings: Any) -> TensorrtLlmEngine:
        """The random model, with `draft` (or itself) to draft for it."""
        target = self.compiled("target", speculative_decoding_mode=2, max_draft_len=4)
        drafter = Drafting(engine=self.compiled("draft", draft), draft_tokens=4, max_batch_size=batch)
        return self(target, drafting=drafter, **settings)


@pytest.fixture
def build(tmp_path: Path, random_model: Path) -> Iterator[Built]:
    built = Built(tmp_path, random_model)
    yield built
    for engine in built.engines:
        engine.close()


def asked(build: Built, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Any]:
    """The requests that an engine's target executor gets from now on."""
    seen: list[Any] = []
    enqueue = trtllm.Executor.enqueue_request

    def watched(self: Any, one: Any) -> int:
        seen.append(one)
        return int(enqueue(self, one))

    monkeypatch.setattr(trtllm.Executor, "enqueue_request", watched)
    return seen


# --- the executor's configuration -----------------------------------------------------------------------------------


def test_the_configuration_follows_from_the_settings(build: Built) -> None:
    config = TensorrtLlmConfig(
        engine=build.compiled(), max_batch_size=4, kv_tokens=640, reuse=True, partial_reuse=True, memory_fraction=0.5,
        host_memory_bytes=2**30, policy="max_utilization", max_num_tokens=1024,
    )  # fmt: skip
    made = configs.target_config(config)
    cache, scheduler = made.kv_cache_config, made.scheduler_config
    assert (cache.enable_block_reuse, cache.enable_partial_reuse, cache.max_tokens) == (True, True, 640)
    assert (cache.free_gpu_memory_fraction, cache.host_cache_size) == (0.5, 2**30)
    assert scheduler.capacity_scheduler_policy is trtllm.CapacitySchedulerPolicy.MAX_UTILIZATION
    assert scheduler.context_chunking_policy is trtllm.ContextChunkingPolicy.FIRST_COME_FIRST_SERVED
    assert made.enable_chunked_context is True  # the binding's own default is False
    assert (made.max_batch_size, made.max_num_tokens, made.max_beam_width) == (4, 1024, 1)
    assert made.parallel_config is None
    assert made.guided_decoding_config is None


def test_steps_are_no_larger_than_the_engine_was_compiled_for(build: Built) -> None:
    config = TensorrtLlmConfig(engine=build.compiled(max_num_tokens=64), max_num_tokens=4096)
    assert configs.target_config(config).max_num_tokens == 64


def test_ranks_are_led_or_orchestrated(build: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build.compiled(ranks=2)
    led = configs.target_config(TensorrtLlmConfig(engine=engine)).parallel_config
    assert led.communication_mode is trtllm.CommunicationMode.LEADER
    orchestrated = TensorrtLlmConfig(engine=engine, launch="orchestrator")
    with pytest.raises(EngineError, match=r"engine.launch: orchestrator starts ranks with"):
        configs.target_config(orchestrated)
    worker = tmp_path / "worker"
    worker.touch()
    monkeypatch.setattr(configs, "WORKERS", (worker,))
    made = configs.target_config(orchestrated).parallel_config
    assert made.communication_mode is trtllm.CommunicationMode.ORCHESTRATOR
    assert made.orchestrator_config.worker_executable_path == str(worker)
    assert len(run_one(build(engine, launch="orchestrator"), request(1)).tokens) == 8


def test_ranks_that_mpirun_did_not_start_are_missed(build: Built) -> None:
    with pytest.raises(EngineError, match="MPI worldSize 1 is expected to be equal"):
        build(build.compiled(ranks=2))


# --- a request ------------------------------------------------------------------------------------------------------


def converted(one: Request, generated: tuple[int, ...] = (), part: Round | None = None) -> Any:
    return requests.executor_request(one, list(generated), part or Round(one.max_tokens), 2, VOCAB_SIZE, [])


def test_only_what_was_asked_for_is_passed_on() -> None:
    made = converted(request(1))
    assert (made.streaming, made.end_id, made.max_tokens) == (True, 2, 8)
    assert made.output_config.exclude_input_from_output is True
    for name in ("bad_words", "stop_words", "embedding_bias", "cache_salt_id", "guided_decoding_params", "lora_config",
                 "kv_cache_retention_config", "external_draft_tokens_config"):  # fmt: skip
        assert getattr(made, name) is None


def test_greedy_is_top_k_1_and_a_sample_has_a_fresh_seed() -> None:
    greedy = converted(request(1)).sampling_config
    assert (greedy.top_k, greedy.temperature, greedy.seed) == (1, None, None)
    plain = [converted(request(1, sampling=Sampling())).sampling_config for _ in range(2)]
    assert (plain[0].top_k, plain[0].top_p, plain[0].temperature) == (0, 1.0, 1.0)  # neither would be greedy
    assert plain[0].seed != plain[1].seed
    assert converted(request(1, sampling=Sampling(seed=7))).sampling_config.seed == 7


@given(st.lists(st.integers(-(10**6), 10**6), min_size=2))
def test_a_higher_priority_stays_higher(ours: list[int]) -> None:
    theirs = [requests.priority(each) for each in ours]
    assert all(0 < each < 1 for each in theirs)
    assert sorted(range(len(ours)), key=ours.__getitem__) == sorted(range(len(ours)), key=theirs.__getitem__)
    assert requests.priority(0) == 0.5


def test_salts_become_numbers_of_64_bits() -> None:
    assert requests.salt_id("") is None
    ids = {requests.salt_id(str(number)) for number in range(1000)}
    assert len(ids) == 1000
    assert converted(request(1, cache_salt="x")).cache_salt_id in range(2**64)


def test_retention_comes_with_time_spans() -> None:
    retention = Retention((RetentionRange(0, 10, 100, 500), RetentionRange(10, -1, 20)), 40, 1500)
    made = converted(request(1, retention=retention)).kv_cache_retention_config
    first, rest = made.token_range_retention_configs
    assert (first.token_start, first.token_end, first.priority) == (0, 10, 100)
    assert (first.duration_ms, rest.duration_ms, rest.token_end) == (timedelta(milliseconds=500), None, None)
    assert (made.decode_retention_priority, made.decode_duration_ms) == (40, timedelta(milliseconds=1500))


def test_penalties_count_what_was_generated_and_not_the_prompt(build: Built, random_model: Path) -> None:
    """The executor would count the prompt too, unless told its length."""
    embedded = make_embedded(random_model, max_batch_size=8, max_seq_len=256, tokens_per_block=16, kv_tokens=2048)
    engine = build()
    for penalty in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        one = request(1, max_tokens=40, sampling=Sampling(temperature=0.0, **{penalty: 1.7}))
        assert run_one(engine, one).tokens == run_one(embedded, one).tokens
    embedded.close()


# --- rounds ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 6), st.integers(0, 3))
def test_rounds_add_up_to_the_answer(max_tokens: int, minimum: int, drafts: int, ends: int) -> None:
    one = request(1, max_tokens=max_tokens, sampling=Sampling(temperature=0.0, min_tokens=minimum))
    generated, count = 0, 0
    while generated < max_tokens:
        part = rounds.next_round(one, tuple(range(ends)), generated, drafts=drafts)
        assert 1 <= part.tokens <= max_tokens - generated
        assert part.min_tokens <= part.tokens
        assert part.drafts < part.tokens
        assert not (part.masked and part.drafts)
        if ends > 1 and generated < min(minimum, max_tokens):
            assert part.masked == tuple(range(1, ends))
        generated, count = generated + part.tokens, count + 1
        if not drafts:
            assert count <= 2
    assert generated == max_tokens


def test_end_ids_beyond_the_first_are_found_among_the_new_tokens(build: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stop words of the executor they would leak host memory (NVIDIA/TensorRT-LLM#5509)."""
    engine = build()
    seen = asked(build, monkeypatch)
    free = run_one(engine, request(1, max_tokens=30)).tokens
    answer = run_one(engine, request(1, max_tokens=30, end_ids=(VOCAB_SIZE - 1, free[9])))
    assert answer.tokens == free[: free.index(free[9]) + 1]
    assert answer.last.finish_reason is FinishReason.STOP
    assert all(each.stop_words is None for each in seen)


@pytest.mark.parametrize("end_id_in_output", [False, True])
def test_the_end_id_is_in_the_answer_whether_the_executor_gives_it_or_not(build: Built, end_id_in_output: bool) -> None:
    engine = build(build.compiled(behaviour={"end_id_in_output": end_id_in_output}))
    free = run_one(engine, request(1, max_tokens=30)).tokens
    place = free.index(free[12])
    assert run_one(engine, request(1, max_tokens=30, end_ids=(free[12],))).tokens == free[: place + 1]


# --- speculative decoding -------------------------------------------------------------------------------------------


def test_drafting_does_not_change_an_answer(build: Built) -> None:
    plain, drafted = build(), build.drafting()
    for one in (
        request(1, max_tokens=50),
        request(2, max_tokens=1),
        request(3, max_tokens=2),
        request(
            4, max_tokens=30, sampling=Sampling(temperature=0.0, presence_penalty=0.8, min_tokens=5), end_ids=(7, 9)
        ),
        request(5, max_tokens=30, sampling=Sampling(temperature=0.0, bad_words=((9,), (3, 4)), logit_bias={8: 2.0})),
    ):
        expected, answer = run_one(plain, one), run_one(drafted, one)
        assert answer.tokens == expected.tokens
        assert answer.last.finish_reason is expected.last.finish_reason
    stats = drafted.stats()
    assert stats.draft_tokens >= stats.accepted_draft_tokens > 30
    assert (drafted.unfinished(), stats.active, stats.blocks_used) == (0, 0, 0)


def test_what_was_accepted_is_reported(build: Built) -> None:
    engine = build.drafting()  # the model drafts for itself: everything is accepted
    perf = run_one(engine, request(1, max_tokens=50)).last.perf
    assert perf is not None
    assert perf.draft_tokens == perf.accepted_draft_tokens == 40  # ten rounds of four, and one token more each
    assert perf.arrival_ns <= perf.first_scheduled_ns <= perf.first_token_ns <= perf.last_token_ns
    assert perf.new_blocks == 5  # of 69 tokens that have keys and values
    assert perf.reused_blocks == 0  # rounds reuse each other's blocks; that is not a cached prefix


def test_an_end_id_that_the_draft_foresees_ends_the_answer(build: Built) -> None:
    engine = build.drafting()
    free = run_one(engine, request(1, max_tokens=30)).tokens
    for place in (3, 10, 11, 12, 13, 14):
        end = free[place]
        answer = run_one(engine, request(1, max_tokens=30, end_ids=(end,)))
        assert answer.tokens == free[: free.index(end) + 1]
        assert answer.last.finish_reason is FinishReason.STOP


def test_a_large_batch_drafts_nothing(build: Built) -> None:
    engine = build.drafting(batch=2)
    answers = run(engine, *(request(i, max_tokens=20) for i in range(6)))
    perfs = [answers[i].last.perf for i in range(6)]
    drafted = [perf.draft_tokens for perf in perfs if perf is not None]
    assert drafted[2:] == [0, 0, 0, 0]  # there were too many when they came
    assert all(count <= 4 for count in drafted[:2])  # there were, when their second round came
    assert all(len(answer.tokens) == 20 for answer in answers.values())


@pytest.mark.parametrize(
    "fields",
    [{"log_probs": True}, {"sampling": Sampling(seed=3)}, {"sampling": Sampling()}, {"sampling": Sampling(top_k=5)}],
)
def test_what_drafting_would_change_is_not_drafted(build: Built, fields: dict[str, Any]) -> None:
    perf = run_one(build.drafting(), request(1, max_tokens=20, **fields)).last.perf
    assert perf is not None
    assert perf.draft_tokens == 0


@pytest.mark.parametrize("steps", range(5))
def test_cancel_between_proposal_and_check(build: Built, steps: int) -> None:
    engine = build.drafting()
    engine.submit(request(1, max_tokens=100))
    answers: dict[int, Answer] = {}
    for _ in range(steps):
        for output in engine.step():
            answers.setdefault(output.id, Answer()).add(output)
    engine.cancel(1)
    assert drain(engine, answers)[1].last.finish_reason is FinishReason.CANCELLED
    assert len(run_one(engine, request(2)).tokens) == 8


def test_a_clients_own_draft_tokens_get_one_check(build: Built) -> None:
    engine = build(build.compiled(speculative_decoding_mode=2, max_draft_len=4))
    free = run_one(engine, request(1, max_tokens=20)).tokens
    for right in range(5):
        drafts = tuple(free[:right]) + ((free[right] + 1) % VOCAB_SIZE,) * (4 - right)
        answer = run_one(engine, request(1, max_tokens=5, draft_tokens=drafts))
        assert answer.tokens == free[: right + 1]
    with pytest.raises(RequestError, match="draft_tokens: 5 are more than the 4"):
        engine.submit(request(1, draft_tokens=(3,) * 5))


# --- guides, adapters -----------------------------------------------------------------------------------------------


def test_guides_are_kept_to_and_bad_ones_fail_alone(build: Built) -> None:
    tokenizer = Tokenizer.load(TINY)
    compiled = build.compiled(model=TINY, quant_algo=None, kv_cache_quant_algo=None)
    engine = build(compiled, tokenizer=tokenizer)
    one = request(1, max_tokens=12, end_ids=tokenizer.end_ids, guide=Guide("regex", "[0-9]{4}"))
    assert tokenizer.decode(run_one(engine, one).tokens).isdigit()
    answers = run(engine, request(2), request(3, guide=Guide("ebnf_grammar", "nonsense")))
    assert len(answers[2].tokens) == 8
    error = answers[3].last.error
    assert error is not None
    assert error.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(RequestError, match="json_schema is not JSON"):
        engine.submit(request(4, guide=Guide("json_schema", "{")))


def test_an_adapter_is_sent_once_and_then_named(build: Built) -> None:
    engine = build(build.compiled(lora_plugin="auto"))
    unknown = run_one(engine, request(1, lora_id=7)).last.error
    assert unknown is not None
    assert "lora_task_id: " in unknown.message
    assert unknown.code is ErrorCode.INVALID_ARGUMENT
    weights = LoraWeights(bytes(2 * 8 * 2), ((0, 0, 8), (1, 0, 8)))
    for one in (request(2, lora_id=7, lora_weights=weights), request(3, lora_id=7)):
        assert len(run_one(engine, one).tokens) == 8


# --- pitfalls -------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_with_log_probs_runs_out_unheard(build: Built) -> None:
    """To cancel it in the executor can kill the process (NVIDIA/TensorRT-LLM#10810); the stand-in raises."""
    engine = build()
    engine.submit(request(1, max_tokens=60, log_probs=True))
    for _ in range(3):
        engine.step()
    engine.cancel(1)
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.CANCELLED
    assert engine.unfinished() == 1  # it holds its slot still
    assert engine.stats().active == 1
    while engine.unfinished():
        assert engine.step() == []
    assert engine.stats().blocks_used == 0


def test_log_probs_are_those_of_the_new_tokens(build: Built, random_model: Path) -> None:
    """The executor reports those of all tokens so far each time."""
    embedded = make_embedded(random_model, max_batch_size=8, max_seq_len=256, tokens_per_block=16, kv_tokens=2048)
    one = request(1, max_tokens=20, log_probs=True)
    assert run_one(build(), one).log_probs == pytest.approx(run_one(embedded, one).log_probs, abs=1e-4)
    embedded.close()


@pytest.mark.parametrize("drafting", [False, True])
def test_what_the_executor_refuses_ends_alone(build: Built, monkeypatch: pytest.MonkeyPatch, drafting: bool) -> None:
    """If our checks let something through, then neither the process nor another request pays for it."""
    engine = build.drafting() if drafting else build()
    monkeypatch.setattr(checks, "check", lambda *_: None)
    wrong = request(2, retention=Retention((RetentionRange(0, 10, 50), RetentionRange(5, 20, 50))))
    engine.submit(request(1, max_tokens=20))
    if drafting:  # the target gets it later, from `step`
        engine.submit(wrong)
    else:
        with pytest.raises(RequestError, match="refuses the request: Token ranges must be non-overlapping"):
            engine.submit(wrong)
    answers = drain(engine)
    assert len(answers[1].tokens) == 20
    if drafting:
        error = answers[2].last.error
        assert error is not None
        assert error.message == "the executor refuses to go on: Token ranges must be non-overlapping."
    assert (engine.stats().active, engine.stats().blocks_used) == (0, 0)


def test_a_request_that_trips_over_a_bug_of_ours_leaves_no_trace(build: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    with monkeypatch.context() as patch:
        patch.setattr(requests, "executor_request", lambda *_: trtllm.Request("text", 1))
        with pytest.raises(TypeError):  # which the engine process reports as a bug
            engine.submit(request(1))
    assert engine.unfinished() == 0
    assert len(run_one(engine, request(1)).tokens) == 8


def test_wrong_answers_over_reused_fp8_blocks_fail_the_start(build: Built) -> None:
    tokenizer = Tokenizer.load(TINY)
    for corrupt in (False, True):
        name = f"corrupt-{corrupt}"
        engine = build.compiled(name, TINY, max_seq_len=1024, behaviour={"corrupt_reuse": corrupt})
        settings: dict[str, Any] = {"tokenizer": tokenizer, "max_seq_len": 1024}
        if not corrupt:
            build(engine, **settings)
            continue
        with pytest.raises(EngineError, match=r"^kv_cache.reuse: .* with reused FP8 blocks"):
            build(engine, **settings)
        build(engine, **settings, reuse=False)


def test_an_engine_that_cannot_be_read_fails_with_its_reason(build: Built, tmp_path: Path) -> None:
    engine = build.compiled()
    (engine.path / "rank0.engine").write_bytes(b"\0")
    with pytest.raises(EngineError, match=r"engine.path: TensorRT-LLM 1\.2\.1 cannot load"):
        build(engine)


def test_greedy_settings_do_not_leak_between_rounds() -> None:
    part = Round(3, 3, masked=(9, 11))
    made = converted(request(1, sampling=GREEDY), generated=(5, 6), part=part)
    assert made.input_token_ids == [*prompt(1), 5, 6]
    assert made.bad_words == [[9], [11]]
    assert (made.max_tokens, made.sampling_config.min_tokens) == (3, 3)


@pytest.mark.parametrize("drafting", [False, True])
def test_a_storm_over_an_executor_that_runs_on_its_own(
    build: Built, monkeypatch: pytest.MonkeyPatch, drafting: bool
) -> None:
    """Responses come when they come: late for a cancel, early for the next step, several for one request."""
    monkeypatch.setattr(trtllm.Executor, "lockstep", False)
    engine = build.drafting(batch=6) if drafting else build()
    chance = random.Random(7)
    answers: dict[int, Answer] = {}
    expected: dict[int, int] = {}
    cancelled: set[int] = set()
    for _ in range(60):
        for _ in range(chance.randrange(3)):
            key = len(expected)
            expected[key] = chance.randrange(1, 40)
            asked_for = {"max_tokens": expected[key], "log_probs": chance.random() < 0.2, "end_ids": (VOCAB_SIZE,)}
            engine.submit(request(key, prompt=prompt(chance.randrange(6), chance.randrange(1, 120)), **asked_for))
        if expected and chance.random() < 0.4:
            cancelled.add(victim := chance.randrange(len(expected)))
            engine.cancel(victim)
        for output in engine.step():
            answers.setdefault(output.id, Answer()).add(output)
    drain(engine, answers, max_steps=100_000)
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        whole = answer.last.finish_reason is FinishReason.LENGTH and len(answer.tokens) == expected[key]
        assert whole or (key in cancelled and answer.last.finish_reason is FinishReason.CANCELLED)
    assert (engine.unfinished(), engine.stats().active, engine.stats().blocks_used) == (0, 0, 0)
