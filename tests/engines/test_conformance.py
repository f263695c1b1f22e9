"""What every engine must do, whatever it is built on."""

from __future__ import annotations

import random
import time

import pytest

from roundhouse.engine.base import Engine, RequestError
from roundhouse.engine.protocol import ErrorCode, Feature, FinishReason, Guide, Retention, RetentionRange, Sampling
from tests.engines.conftest import (
    GREEDY,
    HAS_VLLM,
    VOCAB_SIZE,
    Answer,
    Make,
    blocks,
    drain,
    needs,
    prompt,
    request,
    run,
    run_one,
    tokens_a_step,
)

FAR = 3_600_000_000_000  # an hour, in nanoseconds


def assert_idle(engine: Engine) -> None:
    stats = engine.stats()
    assert (engine.unfinished(), stats.active, stats.waiting, stats.blocks_used) == (0, 0, 0, 0)
    assert engine.step() == []


# --- the life of a request ------------------------------------------------------------------------------------------


def test_idle_engine_does_nothing(engine: Engine) -> None:
    assert_idle(engine)


def test_info_describes_the_limits(engine: Engine) -> None:
    info = engine.info
    assert (info.max_batch_size, info.max_seq_len, info.vocab_size) == (8, 256, VOCAB_SIZE)
    assert info.max_blocks == blocks(engine, 2048)
    assert all(reason.strip() for reason in info.lacks.values())


@pytest.mark.parametrize("max_tokens", [1, 2, 15, 16, 17, 50])
def test_generates_exactly_max_tokens(engine: Engine, max_tokens: int) -> None:
    answer = run_one(engine, request(1, max_tokens=max_tokens))
    assert len(answer.tokens) == max_tokens
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert all(0 <= token < VOCAB_SIZE for token in answer.tokens)
    assert_idle(engine)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 200])
def test_any_prompt_length(engine: Engine, length: int) -> None:
    assert len(run_one(engine, request(1, prompt=prompt(1, length))).tokens) == 8


def test_streams_token_by_token(engine: Engine) -> None:
    answer = run_one(engine, request(1, max_tokens=10))
    assert len(answer.outputs) >= 10 / tokens_a_step(engine)


def test_one_sequence_to_max_seq_len(engine: Engine) -> None:
    assert len(run_one(engine, request(1, max_tokens=236)).tokens) == 236


def test_greedy_is_repeatable(engine: Engine) -> None:
    first = run_one(engine, request(1, max_tokens=30))
    assert run_one(engine, request(1, max_tokens=30)).tokens == first.tokens


def test_an_id_can_be_used_again_after_its_last_output(engine: Engine) -> None:
    for _ in range(3):
        assert len(run_one(engine, request(7)).tokens) == 8


def test_answer_does_not_depend_on_the_batch(engine: Engine) -> None:
    requests = [request(i, prompt=prompt(i, 5 + 9 * i), max_tokens=20) for i in range(8)]
    alone = {each.id: run_one(engine, each).tokens for each in requests}
    together = {i: answer.tokens for i, answer in run(engine, *requests).items()}
    assert together == alone


def test_more_requests_than_slots(engine: Engine) -> None:
    requests = [request(i, max_tokens=2 + i % 7) for i in range(50)]
    for each in requests:
        engine.submit(each)
    assert engine.unfinished() == 50
    seen = 0
    answers: dict[int, Answer] = {}
    while engine.unfinished():
        for output in engine.step():
            answers.setdefault(output.id, Answer()).add(output)
        seen = max(seen, engine.stats().active)
        assert engine.stats().active <= 8
    assert seen == 8
    assert {i: len(answer.tokens) for i, answer in answers.items()} == {i: 2 + i % 7 for i in range(50)}
    assert_idle(engine)


def test_a_pool_too_small_for_all_still_serves_all(make: Make) -> None:
    engine = make(kv_tokens=256)
    answers = run(engine, *(request(i, prompt=prompt(i, 60), max_tokens=60) for i in range(12)))
    assert all(len(answer.tokens) == 60 for answer in answers.values())
    assert len(answers) == 12
    assert_idle(engine)


def test_joins_a_running_batch(engine: Engine) -> None:
    alone = run_one(engine, request(2, max_tokens=12)).tokens
    engine.submit(request(1, max_tokens=40))
    answers: dict[int, Answer] = {}
    for _ in range(5):
        for output in engine.step():
            answers.setdefault(output.id, Answer()).add(output)
    engine.submit(request(2, max_tokens=12))
    drain(engine, answers)
    assert answers[2].tokens == alone
    assert len(answers[1].tokens) == 40


# --- how it ends ----------------------------------------------------------------------------------------------------


def test_end_id_is_part_of_the_output(engine: Engine) -> None:
    free = run_one(engine, request(1, max_tokens=30)).tokens
    end = free[12]
    answer = run_one(engine, request(1, max_tokens=30, end_ids=(end,)))
    assert answer.tokens == free[: free.index(end) + 1]
    assert answer.last.finish_reason is FinishReason.STOP


def test_several_end_ids(engine: Engine) -> None:
    free = run_one(engine, request(1, max_tokens=30)).tokens
    ends = (free[20], free[9], VOCAB_SIZE + 5, -1)  # ids outside the vocabulary never come
    answer = run_one(engine, request(1, max_tokens=30, end_ids=ends))
    assert answer.tokens == free[: min(free.index(free[20]), free.index(free[9])) + 1]


def test_end_id_as_the_last_allowed_token_is_a_stop(engine: Engine) -> None:
    free = run_one(engine, request(1, max_tokens=30)).tokens
    place = free.index(free[12])
    answer = run_one(engine, request(1, max_tokens=place + 1, end_ids=(free[12],)))
    assert answer.last.finish_reason is FinishReason.STOP


def test_min_tokens_masks_the_end_ids(engine: Engine) -> None:
    needs(engine, Feature.MIN_TOKENS)
    free = run_one(engine, request(1, max_tokens=30)).tokens
    sampling = Sampling(temperature=0.0, min_tokens=10)
    answer = run_one(engine, request(1, max_tokens=30, end_ids=(free[3], free[0]), sampling=sampling))
    assert len(answer.tokens) >= 11 or answer.last.finish_reason is FinishReason.LENGTH
    assert not {free[3], free[0]} & set(answer.tokens[:10])
    everything = tuple(token for token in range(VOCAB_SIZE) if token != 5)
    answer = run_one(engine, request(1, max_tokens=30, end_ids=everything, sampling=sampling))
    assert answer.tokens[:10] == [5] * 10


def test_perf(engine: Engine) -> None:
    before = time.monotonic_ns()
    answer = run_one(engine, request(1, prompt=prompt(1, 40), max_tokens=20, arrival_ns=before))
    perf = answer.last.perf
    assert perf is not None
    assert perf.arrival_ns == before
    assert before <= perf.first_scheduled_ns <= perf.first_token_ns <= perf.last_token_ns <= time.monotonic_ns()
    assert perf.new_blocks == blocks(engine, 59)  # so many tokens have keys and values
    assert (perf.reused_blocks, perf.reused_tokens) == (0, 0)


# --- cancel and deadline --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel_in_every_phase(engine: Engine, steps: int) -> None:
    engine.submit(request(1, prompt=prompt(1, 40), max_tokens=200))
    engine.submit(request(2, max_tokens=12 * tokens_a_step(engine)))
    answers: dict[int, Answer] = {}
    for _ in range(steps):
        for output in engine.step():
            answers.setdefault(output.id, Answer()).add(output)
    engine.cancel(1)
    engine.cancel(1)
    assert engine.unfinished() == 2
    drain(engine, answers)
    assert answers[1].last.finish_reason is FinishReason.CANCELLED
    assert len(answers[1].tokens) <= (steps + 1) * tokens_a_step(engine)
    assert answers[2].last.finish_reason is FinishReason.LENGTH
    assert_idle(engine)


def test_cancel_during_a_chunked_prefill(make: Make) -> None:
    engine = make(max_num_tokens=16)
    engine.submit(request(1, prompt=prompt(1, 200), max_tokens=20))
    engine.step()
    engine.cancel(1)
    answers = drain(engine)
    assert answers[1].last.finish_reason is FinishReason.CANCELLED
    assert_idle(engine)


def test_cancel_while_waiting(engine: Engine) -> None:
    for i in range(20):
        engine.submit(request(i, max_tokens=30))
    engine.step()
    for i in range(0, 20, 2):
        engine.cancel(i)
    answers = drain(engine)
    for i, answer in answers.items():
        expected = FinishReason.LENGTH if i % 2 else FinishReason.CANCELLED
        assert answer.last.finish_reason is expected
    assert_idle(engine)


def test_cancel_of_unknown_ids_is_ignored(engine: Engine) -> None:
    engine.cancel(5)
    run_one(engine, request(5))
    engine.cancel(5)
    assert_idle(engine)


def test_cancelled_perf_tells_what_it_cost(engine: Engine) -> None:
    engine.submit(request(1, prompt=prompt(1, 40), max_tokens=100))
    tokens = sum(len(output.tokens) for _ in range(3) for output in engine.step())
    engine.cancel(1)
    (output,) = [output for output in engine.step() if output.last]
    assert output.perf is not None
    assert output.perf.first_token_ns > 0
    assert output.perf.new_blocks == blocks(engine, 39 + tokens)


def test_deadline_in_the_queue_and_while_running(make: Make) -> None:
    engine = make(max_batch_size=1)
    now = time.monotonic_ns()
    engine.submit(request(1, max_tokens=230, deadline_ns=now + 30_000_000))
    engine.submit(request(2, max_tokens=5, deadline_ns=now + 30_000_000))
    engine.submit(request(3, max_tokens=5, deadline_ns=now + FAR))
    engine.step()
    time.sleep(0.04)
    answers = drain(engine)
    assert answers[1].last.finish_reason is FinishReason.TIMEOUT
    assert (answers[2].last.finish_reason, answers[2].tokens) == (FinishReason.TIMEOUT, [])
    assert answers[3].last.finish_reason is FinishReason.LENGTH
    assert_idle(engine)


# --- order ----------------------------------------------------------------------------------------------------------


def finished_order(engine: Engine) -> list[int]:
    order = []
    while engine.unfinished():
        order += [output.id for output in engine.step() if output.last]
    return order


def test_the_queue_is_first_come_first_served(make: Make) -> None:
    engine = make(max_batch_size=1)
    for i in (3, 1, 2, 0):
        engine.submit(request(i))
    assert finished_order(engine) == [3, 1, 2, 0]


def test_priority_orders_the_queue(make: Make) -> None:
    engine = make(max_batch_size=1)
    needs(engine, Feature.PRIORITY)
    for i, priority in enumerate([0, -1, 5, 0, 5]):
        engine.submit(request(i, priority=priority))
    assert finished_order(engine) == [2, 4, 0, 3, 1]


# --- sampling -------------------------------------------------------------------------------------------------------


def test_equal_seed_equal_answer_in_any_batch(engine: Engine) -> None:
    needs(engine, Feature.SEED)
    sampled = request(1, max_tokens=30, sampling=Sampling(seed=2**64 - 1))
    alone = run_one(engine, sampled).tokens
    others = [request(i, max_tokens=10 + i, sampling=Sampling()) for i in range(2, 8)]
    assert run(engine, *others, sampled)[1].tokens == alone


def test_other_seed_other_answer(engine: Engine) -> None:
    needs(engine, Feature.SEED)
    answers = {
        tuple(run_one(engine, request(1, max_tokens=30, sampling=Sampling(seed=seed))).tokens) for seed in range(5)
    }
    assert len(answers) == 5


def test_no_seed_different_answers(engine: Engine) -> None:
    answers = run(engine, *(request(i, prompt=prompt(1), max_tokens=30, sampling=Sampling()) for i in range(5)))
    assert len({tuple(answer.tokens) for answer in answers.values()}) == 5


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0, seed=3), Sampling(top_k=1), Sampling(top_k=1, seed=4)])
def test_temperature_0_and_top_k_1_are_greedy(engine: Engine, sampling: Sampling) -> None:
    greedy = run_one(engine, request(1, max_tokens=20)).tokens
    assert run_one(engine, request(1, max_tokens=20, sampling=sampling)).tokens == greedy


def test_log_probs_only_for_those_who_ask(engine: Engine) -> None:
    needs(engine, Feature.LOG_PROBS)
    answers = run(
        engine,
        request(1, log_probs=True),
        request(2),
        request(3, log_probs=True, sampling=Sampling(seed=1)),
    )
    assert len(answers[1].log_probs) == len(answers[3].log_probs) == 8
    assert all(value <= 0 for i in (1, 3) for value in answers[i].log_probs)
    assert answers[2].log_probs == []
    assert all(output.log_probs is None for output in answers[2].outputs)


def test_top_log_probs_begin_with_the_greedy_choice(engine: Engine) -> None:
    needs(engine, Feature.TOP_LOG_PROBS)
    answers = run(engine, request(1, log_probs=True, top_log_probs=4), request(2, log_probs=True))
    tops = [top for output in answers[1].outputs for top in output.top_log_probs or ()]
    assert [top[0][0] for top in tops] == answers[1].tokens
    assert [top[0][1] for top in tops] == pytest.approx(answers[1].log_probs, abs=1e-3)
    for top in tops:
        assert len({token for token, _ in top}) == 4
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
    assert all(output.top_log_probs is None for output in answers[2].outputs)


def test_log_probs_do_not_change_the_answer(engine: Engine) -> None:
    needs(engine, Feature.LOG_PROBS)
    assert run_one(engine, request(1, log_probs=True)).tokens == run_one(engine, request(1)).tokens


def test_bad_words_of_one_and_of_several_tokens(engine: Engine) -> None:
    needs(engine, Feature.BAD_WORDS)
    free = run_one(engine, request(1, max_tokens=20)).tokens
    single = Sampling(temperature=0.0, bad_words=((free[0],),))
    assert free[0] not in run_one(engine, request(1, max_tokens=20, sampling=single)).tokens
    pair = tuple(free[4:6])
    answer = run_one(engine, request(1, max_tokens=20, sampling=Sampling(temperature=0.0, bad_words=(pair,))))
    place = next(i for i in range(len(free)) if tuple(free[i : i + 2]) == pair)
    assert answer.tokens[: place + 1] == free[: place + 1]
    assert pair not in set(zip(answer.tokens, answer.tokens[1:], strict=False))


def test_logit_bias(engine: Engine) -> None:
    needs(engine, Feature.LOGIT_BIAS)
    forced = Sampling(temperature=0.0, logit_bias={9: 1000.0})
    assert run_one(engine, request(1, sampling=forced)).tokens == [9] * 8
    free = run_one(engine, request(1)).tokens
    avoided = Sampling(logit_bias={free[0]: -1000.0}, seed=1)
    assert free[0] not in run_one(engine, request(1, max_tokens=50, sampling=avoided)).tokens


def test_bad_words_win_over_logit_bias(engine: Engine) -> None:
    needs(engine, Feature.LOGIT_BIAS, Feature.BAD_WORDS)
    sampling = Sampling(temperature=0.0, logit_bias={9: 1000.0, 8: 500.0}, bad_words=((9,),))
    assert run_one(engine, request(1, sampling=sampling)).tokens == [8] * 8


def test_a_request_that_forbids_everything_fails_alone(engine: Engine) -> None:
    needs(engine, Feature.BAD_WORDS)
    everything = tuple((token,) for token in range(VOCAB_SIZE))
    answers = run(
        engine,
        request(1),
        request(2, sampling=Sampling(bad_words=everything)),
        request(3),
    )
    assert answers[2].last.error is not None
    assert answers[2].last.error.code is ErrorCode.INTERNAL
    assert len(answers[1].tokens) == len(answers[3].tokens) == 8
    assert_idle(engine)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_a_huge_penalty_forbids_repetition(engine: Engine, penalty: str) -> None:
    needs(engine, Feature(penalty))
    answer = run_one(engine, request(1, max_tokens=60, sampling=Sampling(temperature=0.0, **{penalty: 1000.0})))
    assert len(set(answer.tokens)) == 60


# --- prefix reuse ---------------------------------------------------------------------------------------------------


def reused(answer: Answer) -> tuple[int, int]:
    perf = answer.last.perf
    assert perf is not None
    return perf.reused_blocks, perf.reused_tokens


def whole(engine: Engine, tokens: int) -> tuple[int, int]:
    """Blocks that so many tokens fill, and the tokens in them."""
    size = engine.info.tokens_per_block
    return tokens // size, tokens // size * size


@pytest.mark.parametrize("length", [15, 16, 17, 33, 50, 64, 65])
def test_second_request_reuses_whole_blocks(engine: Engine, length: int) -> None:
    one = request(1, prompt=prompt(1, length), max_tokens=4)
    first, second = run_one(engine, one), run_one(engine, one)
    assert reused(first) == (0, 0)
    shared, _ = expected = whole(engine, length - 1)  # one token at least is computed
    assert reused(second) == expected
    assert second.tokens == first.tokens
    assert second.last.perf is not None
    assert first.last.perf is not None
    assert second.last.perf.new_blocks == first.last.perf.new_blocks - shared
    assert engine.stats().blocks_reused == shared


def test_a_longer_prompt_reuses_the_common_part(engine: Engine) -> None:
    common = prompt(1, 48)
    run_one(engine, request(1, prompt=(*common, 5, 6, 7)))
    assert reused(run_one(engine, request(2, prompt=(*common, 9, 9)))) == whole(engine, 48)


def test_the_same_tokens_elsewhere_are_not_the_same_prefix(engine: Engine) -> None:
    part = prompt(1, 32)
    run_one(engine, request(1, prompt=part + part + (4,)))
    assert reused(run_one(engine, request(2, prompt=prompt(2, 32) + part + (4,)))) == (0, 0)


def test_the_answer_is_reused_by_the_next_turn(engine: Engine) -> None:
    first = run_one(engine, request(1, prompt=prompt(1, 30), max_tokens=40))
    turn = prompt(1, 30) + tuple(first.tokens) + prompt(3, 10)
    assert reused(run_one(engine, request(2, prompt=turn))) == whole(engine, 69)  # so many have keys and values


def test_another_salt_never_shares(engine: Engine) -> None:
    needs(engine, Feature.CACHE_SALT)
    shared = prompt(1, 50)
    plain = run_one(engine, request(1, prompt=shared))
    assert reused(run_one(engine, request(2, prompt=shared, cache_salt="a"))) == (0, 0)
    assert reused(run_one(engine, request(3, prompt=shared, cache_salt="b"))) == (0, 0)
    again = run_one(engine, request(4, prompt=shared, cache_salt="a"))
    assert reused(again) == whole(engine, 49)
    assert again.tokens == plain.tokens
    assert reused(run_one(engine, request(5, prompt=shared))) == whole(engine, 49)


def test_running_requests_share_too(engine: Engine) -> None:
    shared = prompt(1, 50)
    engine.submit(request(1, prompt=shared, max_tokens=60))
    for _ in range(3):
        engine.step()
    used = engine.stats().blocks_used
    engine.submit(request(2, prompt=shared, max_tokens=10))
    engine.step()
    own = 1 if tokens_a_step(engine) == 1 else 2  # drafts may have taken the first one over a block's edge
    assert engine.stats().blocks_used <= used + own
    answers = drain(engine)
    assert reused(answers[2]) == whole(engine, 49)
    assert_idle(engine)


def test_reuse_off(make: Make) -> None:
    engine, sharing = make(reuse=False), make()
    requests = [request(i, prompt=prompt(i % 3, 60), max_tokens=40) for i in range(9)]
    for each in requests:
        answer = run_one(engine, each)
        assert reused(answer) == (0, 0)
        assert answer.tokens == run_one(sharing, each).tokens
    assert engine.stats().blocks_reused == 0
    assert sharing.stats().blocks_reused > 0


def test_the_least_recently_used_prefix_goes_first(make: Make) -> None:
    engine = make(kv_tokens=128, max_batch_size=1, max_seq_len=80)
    if engine.info.max_blocks != 8 or tokens_a_step(engine) > 1:  # each of these takes 4, and leaves 3 full ones
        pytest.skip("it is about blocks of 16 tokens, and drafts take more of them")
    for i in (1, 2, 1, 3):
        run_one(engine, request(i, prompt=prompt(i, 56), max_tokens=6))
    assert reused(run_one(engine, request(4, prompt=prompt(1, 56), max_tokens=6))) == (3, 48)
    assert reused(run_one(engine, request(5, prompt=prompt(2, 56), max_tokens=6)))[0] < 3


# --- refusals -------------------------------------------------------------------------------------------------------


def kept(*ranges: tuple[int, int]) -> Retention:
    return Retention(tuple(RetentionRange(start, end, 50) for start, end in ranges))


BAD = {
    "empty prompt": ({"prompt": ()}, "prompt"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens: 0"),
    "too long": ({"max_tokens": 237}, "max_seq_len 256"),
    "prompt too long": ({"prompt": prompt(1, 256)}, "max_seq_len 256"),
    "token outside": ({"prompt": (3, VOCAB_SIZE)}, f"prompt: token id {VOCAB_SIZE}"),
    "negative token": ({"prompt": (3, -1)}, "prompt: token id -1"),
    "temperature": ({"sampling": Sampling(temperature=-0.5)}, "temperature: -0.5"),
    "nan temperature": ({"sampling": Sampling(temperature=float("nan"))}, "temperature: nan"),
    "infinite temperature": ({"sampling": Sampling(temperature=float("inf"))}, "temperature: inf"),
    "top_k": ({"sampling": Sampling(top_k=-1)}, "top_k: -1"),
    "top_p 0": ({"sampling": Sampling(top_p=0.0)}, "top_p: 0.0"),
    "top_p 1.5": ({"sampling": Sampling(top_p=1.5)}, "top_p: 1.5"),
    "repetition": ({"sampling": Sampling(repetition_penalty=0.0)}, "repetition_penalty: 0.0"),
    "presence": ({"sampling": Sampling(presence_penalty=float("nan"))}, "presence_penalty: nan"),
    "frequency": ({"sampling": Sampling(frequency_penalty=float("inf"))}, "frequency_penalty: inf"),
    "min_tokens": ({"sampling": Sampling(min_tokens=-1)}, "min_tokens: -1"),
    "seed": ({"sampling": Sampling(seed=2**64)}, "seed"),
    "empty bad word": ({"sampling": Sampling(bad_words=((),))}, "bad_words"),
    "bad word outside": ({"sampling": Sampling(bad_words=((VOCAB_SIZE,),))}, "bad_words"),
    "bias outside": ({"sampling": Sampling(logit_bias={VOCAB_SIZE: 1.0})}, "logit_bias"),
    "nan bias": ({"sampling": Sampling(logit_bias={3: float("nan")})}, "logit_bias"),
    "overlapping retention": ({"retention": kept((5, 20), (0, 10))}, "retention range end: 10 of the range from 0"),
    "retention of the rest, and more": ({"retention": kept((0, -1), (5, 9))}, "retention range end: -1 of the range"),
    "retention of one range twice": ({"retention": kept((0, 9), (0, 9))}, "leave one of the two out"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_the_field_and_leave_no_trace(engine: Engine, case: str) -> None:
    fields, text = BAD[case]
    with pytest.raises(RequestError) as caught:
        engine.submit(request(1, **fields))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert text in caught.value.message
    assert "\n" not in caught.value.message
    assert_idle(engine)
    assert len(run_one(engine, request(1)).tokens) == 8


def test_longer_than_the_pool_is_refused(make: Make) -> None:
    if HAS_VLLM:
        pytest.skip("vLLM is not loaded with a pool that is shorter than a sequence: test_vllm.py")
    engine = make(kv_tokens=64)
    with pytest.raises(RequestError, match="KV cache of 64 tokens") as caught:
        engine.submit(request(1, prompt=prompt(1, 60), max_tokens=5))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert len(run_one(engine, request(1, prompt=prompt(1, 60), max_tokens=4)).tokens) == 4


ASKS = {
    Feature.TEMPERATURE: {"sampling": Sampling(temperature=0.5)},
    Feature.TOP_K: {"sampling": Sampling(top_k=5)},
    Feature.TOP_P: {"sampling": Sampling(top_p=0.5)},
    Feature.REPETITION_PENALTY: {"sampling": Sampling(repetition_penalty=1.5)},
    Feature.PRESENCE_PENALTY: {"sampling": Sampling(presence_penalty=0.5)},
    Feature.FREQUENCY_PENALTY: {"sampling": Sampling(frequency_penalty=0.5)},
    Feature.MIN_TOKENS: {"sampling": Sampling(min_tokens=2)},
    Feature.SEED: {"sampling": Sampling(seed=2)},
    Feature.LOG_PROBS: {"log_probs": True},
    Feature.TOP_LOG_PROBS: {"log_probs": True, "top_log_probs": 3},
    Feature.BAD_WORDS: {"sampling": Sampling(bad_words=((3,),))},
    Feature.LOGIT_BIAS: {"sampling": Sampling(logit_bias={3: 1.0})},
    Feature.PRIORITY: {"priority": 1},
    Feature.CACHE_SALT: {"cache_salt": "salt"},
    Feature.GUIDED_DECODING: {"guide": Guide("json")},
}


@pytest.mark.parametrize("feature", ASKS)
def test_each_feature_works_or_is_refused_with_its_reason(engine: Engine, feature: Feature) -> None:
    asked = request(1, **ASKS[feature])
    if feature not in engine.info.lacks:
        assert len(run_one(engine, asked).tokens) == 8
        return
    with pytest.raises(RequestError) as caught:
        engine.submit(asked)
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert engine.info.lacks[feature] in caught.value.message
    assert_idle(engine)


# --- everything at once ---------------------------------------------------------------------------------------------


def test_stats_add_up(engine: Engine) -> None:
    run(engine, *(request(i, prompt=prompt(i, 10 + i), max_tokens=5) for i in range(10)))
    stats = engine.stats()
    assert stats.prompt_tokens == sum(10 + i for i in range(10))
    assert stats.generated_tokens == 50
    assert stats.steps >= 5 / tokens_a_step(engine)
    assert (stats.max_active, stats.blocks_max) == (8, blocks(engine, 2048))
    assert stats.tokens_per_block == engine.info.tokens_per_block
    assert stats.memory_cpu_bytes > 2**20
    engine.submit(request(1, max_tokens=20))
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.active, stats.generation, stats.context, stats.waiting) == (1, 1, 0, 0)
    assert blocks(engine, 22) <= stats.blocks_used <= blocks(engine, 20 + 3 * tokens_a_step(engine))


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_arrivals_and_cancels_leaves_nothing_behind(make: Make, seed: int) -> None:
    engine = make(kv_tokens=640)  # room for few at a time
    chance = random.Random(seed)
    answers: dict[int, Answer] = {}
    expected: dict[int, int] = {}
    cancelled: set[int] = set()
    for i in range(150):
        for _ in range(chance.randrange(3)):
            key = len(expected)
            expected[key] = chance.randrange(1, 40)
            engine.submit(
                request(
                    key,
                    prompt=prompt(chance.randrange(6), chance.randrange(1, 120)),
                    max_tokens=expected[key],
                    priority=chance.choice([0, 0, 1]),
                    cache_salt=chance.choice(["", "x"]),
                    sampling=chance.choice([GREEDY, Sampling(), Sampling(top_k=5, seed=i)]),
                    log_probs=chance.random() < 0.3,
                )
            )
        if expected and chance.random() < 0.4:
            victim = chance.randrange(len(expected))
            if victim not in answers or not answers[victim].outputs[-1].last:
                cancelled.add(victim)
            engine.cancel(victim)
        for output in engine.step():
            answers.setdefault(output.id, Answer()).add(output)
        assert engine.stats().blocks_used <= 40
    drain(engine, answers)
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        if key in cancelled:
            assert answer.last.finish_reason is FinishReason.CANCELLED
        else:
            assert len(answer.tokens) == expected[key]
            assert answer.last.finish_reason is FinishReason.LENGTH
    assert cancelled
    assert_idle(engine)
