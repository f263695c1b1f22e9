"""The measurements of scripts/bench_optimisations.py, on engines that need no GPU; their times prove nothing here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bench_optimisations as bench
import pytest

from roundhouse.engine.embedded.engine import EmbeddedConfig, EmbeddedEngine
from roundhouse.engine.synthetic import SyntheticConfig, SyntheticEngine

SCALE = replace(bench.SMOKE, streams=(1, 4), crowd=96, settle=0.05, seconds=0.4, long_every=0.05)


@pytest.fixture(scope="module")
def driver() -> Iterator[bench.Driver]:
    """On an engine that gives each sequence 100 tokens a second, and has room for 85 of the standard load."""
    config = SyntheticConfig(
        vocab_size=1024, tokens_per_second_per_sequence=100, max_batch_size=96, max_seq_len=512, kv_tokens=4096
    )
    engine = SyntheticEngine(config)
    yield bench.Driver(engine, SCALE)
    engine.close()


def test_more_streams_more_tokens(driver: bench.Driver) -> None:
    points = bench.batching(driver)
    assert points["4"]["tokens_per_second"] > 2 * points["1"]["tokens_per_second"] > 0
    assert 3 < points["4"]["mean_active"] <= 4
    assert points["4"]["tpot_ms"]["p50"] >= 5
    assert driver.engine.unfinished() == 0


def test_a_shared_prefix_is_reused_only_without_salts(driver: bench.Driver) -> None:
    def reused(salted: bool) -> int:
        before = driver.engine.stats().blocks_reused
        assert bench.prefix_load(driver, salted)["4"]["tokens_per_second"] > 0
        return driver.engine.stats().blocks_reused - before

    assert reused(salted=True) == 0
    assert reused(salted=False) > 50
    assert bench.prefix(driver).keys() == {"off", "on"}


def test_long_prompts_arrive_while_streams_run(driver: bench.Driver) -> None:
    figures = bench.stalls(driver)
    assert figures["long_prompts"] >= 5
    assert figures["itl_ms"]["p99"] >= figures["itl_ms"]["p50"] > 0


def test_a_crowd_does_not_fit(driver: bench.Driver) -> None:
    figures = bench.crowd(driver)
    assert (figures["kv_tokens"], figures["streams_that_fit"]) == (4096, 85)
    assert figures["streams_that_fit"] < figures["streams"]


def test_log_probs_of_expected_tokens_are_those_before_the_bias() -> None:
    from tiny_model import evaluate, skills
    from tokenizers import Tokenizer

    engine = EmbeddedEngine(EmbeddedConfig(model=bench.ROOT / "models/tiny", max_seq_len=256))
    tokenizer = Tokenizer.from_file(str(bench.ROOT / "models/tiny/tokenizer.json"))
    asked = evaluate.draw_questions(tokenizer, "sort", 3, seed=1)
    assert "sort" in skills.EXACT_SKILLS
    given = bench.exact_answers(engine, asked, evaluate.END_IDS)
    assert [question.expected for question in asked] == given
    values = bench.expected_log_probs(engine, asked)
    assert len(values) == sum(len(question.expected) for question in asked)
    assert all(-1 < value <= 0 for value in values)
    assert min(values) < 0  # a bias of 1000 would make them all 0
    engine.close()


def test_a_cut_off_run_still_draws(tmp_path: Path) -> None:
    point = {"tokens_per_second": 10.0, "ttft_ms": None}
    bench.plot({"base": {"batching": {"1": point, "8": point}}}, tmp_path / "plot.png", "cut off")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_page_says_what_was_measured() -> None:
    result = json.loads((bench.BENCHMARKS / "gpu-optimisations.json").read_text())
    assert (bench.BENCHMARKS / "optimisations.md").read_text() == bench.page(result, bench.DRAFT_TOKENS)
    assert "--only base" in bench.page({**result, "configurations": {}}, bench.DRAFT_TOKENS)
