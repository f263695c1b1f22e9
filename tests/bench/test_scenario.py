"""Scenarios: prompts have exactly the tokens that were asked for, sessions are the seed's, arrivals have their rate."""

from __future__ import annotations

import random
import statistics
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from roundhouse.bench import scenario as scenarios
from roundhouse.bench.prompts import PromptError, PromptMaker
from roundhouse.bench.scenario import Bursts, Poisson, ScenarioError, Sessions, arrivals
from roundhouse.text.tokenizer import Tokenizer
from tests.text.families import INCREMENTAL, tokenizer_of

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.stem for path in scenarios.SCENARIOS.glob("*.yaml"))


@lru_cache
def tiny() -> PromptMaker:
    return PromptMaker(Tokenizer.load(ROOT / "models/tiny"))


@lru_cache
def maker_of(family: str) -> PromptMaker:
    return PromptMaker(tokenizer_of(family))


def one_kind(**kind: object) -> scenarios.Scenario:
    raw = {"description": "test", "load": {"kind": "closed", "streams": 1}, "mix": [{"prompt": 8, "answer": 8, **kind}]}
    return scenarios.parse(raw, source="test")


@settings(deadline=None, max_examples=40)
@given(family=st.sampled_from(sorted(INCREMENTAL)), tokens=st.integers(4, 300), seed=st.integers(0, 10**6))
def test_a_prompt_has_exactly_the_tokens_asked_for(family: str, tokens: int, seed: int) -> None:
    maker = maker_of(family)
    tokens += maker.count("")
    text = maker.make(random.Random(seed), tokens)
    assert len(tokenizer_of(family).encode(text, True)) == tokens


@settings(deadline=None, max_examples=30)
@given(first=st.integers(4, 200), more=st.integers(0, 200), seed=st.integers(0, 10**6))
def test_a_prompt_can_go_on_from_another(first: int, more: int, seed: int) -> None:
    chance = random.Random(seed)
    start = tiny().make(chance, first)
    text = tiny().make(chance, first + more, start)
    assert text.startswith(start)
    assert tiny().count(text) == first + more


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(PromptError, match="of its own"):
        tiny().make(random.Random(0), tiny().count(""))
    with pytest.raises(PromptError, match="first 20 are given"):
        tiny().make(random.Random(0), 10, tiny().make(random.Random(0), 20))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_scenario_fits_the_default_deployment(name: str) -> None:
    scenario = scenarios.load(name)
    scenario.check(2048, name)
    for session in Sessions(scenario, tiny(), seed=1).take(6):
        for request in session:
            assert tiny().count(request.prompt) == request.prompt_tokens
            assert request.prompt_tokens + request.answer_tokens <= scenario.longest


def test_sessions_are_the_seeds() -> None:
    scenario = scenarios.load("mixed")
    first, again, other = (Sessions(scenario, tiny(), seed).take(5) for seed in (1, 1, 2))
    assert first == again
    assert not {s[0].prompt for s in first} & {s[0].prompt for s in other}
    assert Sessions(scenario, tiny(), 1)(4) == first[4]


def test_shared_prefixes_are_shared_and_nothing_else_is() -> None:
    kind = {"shared_prefix": {"tokens": 40, "groups": 2}, "prompt": 20}
    prompts = [session[0].prompt for session in Sessions(one_kind(**kind), tiny(), 3).take(40)]
    assert len(set(prompts)) == 40
    assert len({prompt[:60] for prompt in prompts}) == 2


def test_a_conversation_repeats_what_was_said() -> None:
    session = Sessions(one_kind(turns=4, prompt=10, answer=12), tiny(), 5)(0)
    assert [request.prompt_tokens for request in session] == [10, 32, 54, 76]
    for before, after in pairwise(session):
        assert after.prompt.startswith(before.prompt)


@given(share=st.floats(0.2, 0.8), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_the_share_of_aborts(share: float, seed: int) -> None:
    sessions = Sessions(one_kind(answer=50, abort={"share": share, "after": 5}), tiny(), seed).take(300)
    aborted = [s[0].abort_after for s in sessions if s[0].abort_after is not None]
    assert set(aborted) <= {5}
    assert abs(len(aborted) / 300 - share) < 0.15


def test_the_weights_of_a_mix() -> None:
    kinds = [session[0].kind for session in Sessions(scenarios.load("long-among-short"), tiny(), 2).take(400)]
    assert 15 < kinds.count("long") < 75


@given(
    median=st.integers(1, 500), sigma=st.floats(0.05, 3), below=st.integers(0, 400), above=st.integers(0, 4000),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_lognormal_keeps_its_bounds(median: int, sigma: float, below: int, above: int, seed: int) -> None:
    low, high = max(1, median - below), median + above
    length = scenarios.Lognormal(median=median, sigma=sigma, at_least=low, at_most=high)
    assert low <= scenarios.draw(length, random.Random(seed)) <= high


def test_a_lognormal_has_its_median() -> None:
    length = scenarios.Lognormal(median=100, sigma=0.7, at_most=10_000)
    chance = random.Random(1)
    assert statistics.median(scenarios.draw(length, chance) for _ in range(4000)) == pytest.approx(100, rel=0.1)


@given(rate=st.floats(0.5, 200), seed=st.integers(0, 1000))
def test_poisson_arrivals_have_their_rate_and_their_spread(rate: float, seed: int) -> None:
    times = list(islice(arrivals(Poisson(kind="poisson", requests_per_second=rate), seed), 3000))
    gaps = [b - a for a, b in pairwise(times)]
    assert times == sorted(times)
    assert statistics.mean(gaps) == pytest.approx(1 / rate, rel=0.15)
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.25)  # an exponential's deviation is its mean


def test_bursts_come_together() -> None:
    assert list(islice(arrivals(Bursts(kind="bursts", size=3, every_seconds=2.5), 1), 7)) == [0] * 3 + [2.5] * 3 + [5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mix": []}, "mix"),
        ({"load": {"kind": "closed", "streams": 0}}, "load.closed.streams"),
        ({"load": {"kind": "open"}}, "load"),
        ({"surprise": 1}, "surprise"),
        ({"mix": [{"prompt": {"at_least": 9, "at_most": 3}, "answer": 1}]}, "at_least 9 is more than at_most 3"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], said: str) -> None:
    raw = {"description": "d", "load": {"kind": "closed", "streams": 1}, "mix": [{"prompt": 1, "answer": 1}], **change}
    with pytest.raises(ScenarioError, match=said):
        scenarios.parse(raw, source="test")


def test_a_scenario_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"768 tokens .* exceed limits.max_seq_len 512"):
        scenarios.load("fixed-512-256").check(512, "fixed-512-256")
    with pytest.raises(ScenarioError, match="known: aborts, bursts"):
        scenarios.load("nothing-of-the-kind")
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(scenarios.load("bursts").model_dump()))
    assert scenarios.load(path) == scenarios.load("bursts")


def test_the_levels_of_a_ramp() -> None:
    ramp = scenarios.load("ramp")
    assert [level.streams for level in ramp.levels()] == [1, 2, 4, 8, 16, 32, 64]
    assert [scenarios.describe(level) for level in ramp.levels()][:2] == ["1 stream", "2 streams"]
    assert scenarios.describe(ramp.with_rate(2.5).levels()[0]) == "2.5 requests/s"
