"""The search finds what is fast, gives up what is slow, survives what breaks, and goes on where it was ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from roundhouse import deployment as deployments
from roundhouse.bench.scenario import Closed, Poisson
from roundhouse.deployment import Deployment
from roundhouse.tune import report, settle, space
from roundhouse.tune.search import OtherStudyError, Search
from roundhouse.tune.space import DoesNotFitError
from roundhouse.tune.trials import Bench, BrokenError, Clock, attempt

ROOT = Path(__file__).resolve().parents[2]
POOR = {
    "model": {"path": str(ROOT / "models/tiny")},
    "engine": {"kind": "transformers"},
    "limits": {"max_batch_size": 4, "max_seq_len": 1024},
    "kv_cache": {"reuse": False},
}
BENCH = Bench(Closed(kind="closed", streams=256), [], None, "tokens", 1, 0, 1, "ensemble")


def parsed(raw: dict[str, Any]) -> Deployment:
    return deployments.parse(raw, source="test", base=ROOT)


def figures(rate: float) -> dict[str, Any]:
    return {
        "output_tokens_per_second": rate, "goodput": None, "good_percent": None, "ttft_ms": {}, "tpot_ms": {},
        "tokens_per_second_per_user": {"p50": 5.0}, "failed": 0,
    }  # fmt: skip


def modelled(raw: dict[str, Any], bench: Bench, checkpoint: Callable[[int, float], None]) -> dict[str, Any]:
    """A server whose speed is known: batches up to 64, reuse, nothing else; larger batches kill it."""
    deployment = parsed(raw)
    if deployment.limits.max_batch_size > 64:
        raise BrokenError("out of memory")
    rate = 100.0 * deployment.limits.max_batch_size * (1.5 if deployment.kv_cache.reuse else 1.0)
    for step in range(2):
        checkpoint(step, rate)
    return figures(rate)


def search(folder: Path, raw: dict[str, Any] | None = None) -> Search:
    deployment = parsed(raw or POOR)
    return Search(folder, raw or POOR, deployment, space.knobs(deployment, BENCH.level), {"level": "256 streams"})


def run(one: Search, limit: int, try_: Any = modelled) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    one.run(BENCH, Clock(5), lambda: 0, limit, told.append, try_)
    return told


def test_it_finds_what_is_fast(tmp_path: Path) -> None:
    one = search(tmp_path)
    assert one.gained() == 0
    told = run(one, 40)
    best = one.best()
    assert best is not None
    assert told[0]["changed"] == {}, "the start is measured first"
    assert best.params["limits.max_batch_size"] == 64
    assert best.params["kv_cache.reuse"] is True
    assert one.gained() == len([key for key in best.params if best.params[key] != one.start[key]]) >= 2
    states = {record["state"] for record in told}
    assert states == {"measured", "given up", "broken"}
    assert all(record["why"] == "out of memory" for record in told if record["state"] == "broken")


def test_it_goes_on_after_its_own_end(tmp_path: Path) -> None:
    def ends(raw: dict[str, Any], bench: Bench, checkpoint: Any) -> dict[str, Any]:
        if deployments.parse(raw, source="test", base=ROOT).limits.max_batch_size == 64:
            raise KeyboardInterrupt
        return modelled(raw, bench, checkpoint)

    with pytest.raises(KeyboardInterrupt):
        run(search(tmp_path), 30, ends)
    again = search(tmp_path)
    before = again.records()
    assert [record["state"] for record in before][-1] == "broken", "the trial that it ended in"
    run(again, 5)
    assert len(again.records()) == len(before) + 5
    assert again.records()[: len(before)] == before
    with pytest.raises(OtherStudyError, match="choose another folder"):
        search(tmp_path, {**POOR, "limits": {"max_batch_size": 8, "max_seq_len": 1024}})


def test_it_keeps_as_much_time_as_its_trials_have_shown_to_take(tmp_path: Path) -> None:
    def slow(raw: dict[str, Any], bench: Bench, checkpoint: Any) -> dict[str, Any]:
        time.sleep(0.2)
        return modelled(raw, bench, lambda step, rate: None)

    one = search(tmp_path)
    assert one.trial_seconds() is None
    told: list[dict[str, Any]] = []
    clock = Clock(1.5 / 60)
    one.run(BENCH, clock, lambda: 3 * (one.trial_seconds() or 0), None, told.append, slow)
    assert told, "the first one is always made"
    assert 0.2 <= (one.trial_seconds() or 0) < 1
    assert clock.left > 0, "time for the proof is left"


def test_what_does_not_matter_stays_as_it_was() -> None:
    deployment = parsed(POOR)
    start = {knob.key: space.value(deployment, knob.key) for knob in space.knobs(deployment, BENCH.level)}
    found = {**start, "limits.max_batch_size": 64, "kv_cache.reuse": True, "kv_cache.tokens_per_block": 64}
    told: list[settle.Effect] = []
    kept, effects = settle.settle(POOR, start, found, 9600, BENCH, Clock(5), 0, modelled, told.append)
    assert kept == {"limits.max_batch_size": 64, "kv_cache.reuse": True}
    assert effects == told
    assert {effect.key: effect.factor for effect in effects} == {
        "limits.max_batch_size": 16, "kv_cache.reuse": 1.5, "kv_cache.tokens_per_block": 1,
    }  # fmt: skip
    gained = [{"level": "16 streams", "start": 4.0, "tuned": 8.0, "ratio": 2.0, "from": 1.9, "to": 2.1}]
    lines = list(settle.advice(effects, gained, [], "goodput"))
    assert lines[0] == "16 streams: goodput 4.00 before, 8.00 tuned: 2.00 x (95 %: 1.9 to 2.1)"
    assert lines[1] == "limits.max_batch_size: 4 -> 64: without it the score falls to 6 %"
    assert "stays 32" in lines[3]
    assert len(lines) == 4, "it pays at every load, so there is nothing more to say"


@pytest.mark.parametrize(
    ("with_it", "reserve", "factor", "attempts"),
    [
        ([1080, 1000], 0, 1.04, 4),
        ([1040, 1000], 0, 1.02, 4),
        ([1200, 1000], 0, 1.2, 2),
        ([1080, 1000], 8, 1.08, 2),
    ],
)
def test_what_may_be_noise_is_measured_once_more(
    with_it: list[float], reserve: float, factor: float, attempts: int
) -> None:
    """Without the setting it is 1000 always. Each trial takes one of 10 seconds."""
    start, new = {"kv_cache.tokens_per_block": 32}, {"kv_cache.tokens_per_block": 64}
    measured: list[bool] = []

    def noisy(raw: dict[str, Any], bench: Bench, checkpoint: Any) -> dict[str, Any]:
        without = parsed(raw).kv_cache.tokens_per_block == 32
        measured.append(without)
        return figures(1000 if without else with_it[measured.count(without) - 1])

    class Ticking(Clock):
        @property
        def left(self) -> float:
            return 10.0 - len(measured)

    kept, (effect,) = settle.settle(POOR, start, new, 0, BENCH, Ticking(1), reserve, noisy, lambda effect: None)
    assert effect.factor == factor
    assert len(measured) == attempts
    assert bool(kept) == effect.kept == (factor >= 1.03)


def test_advice_does_not_call_a_gain_proven_that_may_be_none() -> None:
    effect = settle.Effect("engine.ngram.draft_tokens", None, 3, 1.4, kept=True)
    wide = {"level": "32 streams", "start": 15.0, "tuned": 22.4, "ratio": 1.49, "from": 0.8, "to": 2.78}
    single = {**wide, "level": "8 streams", "from": None, "to": None}
    sure = {**wide, "level": "16 streams", "from": 1.2, "to": 1.9}
    worse = {**wide, "level": "64 streams", "ratio": 0.9, "from": 0.85, "to": 0.95}
    doubt, where = list(settle.advice([effect], [wide, single, sure, worse], [], "goodput"))[-2:]
    assert doubt.startswith("not proven at 32 streams, 8 streams: the 95 % interval includes 1")
    assert "the tuned file may be no better there" in doubt
    assert "more --repeats" in doubt
    assert where == "the new settings pay at 16 streams; with another load, tune again"
    assert list(settle.advice([effect], [wide], [], "goodput"))[-1].startswith("not proven at 32 streams")


def test_advice_says_where_it_does_not_pay() -> None:
    gained = [
        {"level": "4 streams", "start": 4.0, "tuned": 3.9, "ratio": 0.98, "from": 0.97, "to": 0.99},
        {"level": "16 streams", "start": 0.0, "tuned": 8.0, "ratio": None, "from": None, "to": None},
    ]
    effect = settle.Effect("engine.ngram.draft_tokens", None, 3, 1.4, kept=True)
    lines = list(settle.advice([effect], gained, [{"state": "broken", "why": "out of memory\nmore"}], "goodput"))
    assert "engine.ngram.draft_tokens: unset -> 3: without it the score falls to 71 %" in lines
    assert "the new settings pay at 16 streams; with another load, tune again" in lines
    assert lines[-1] == "did not work: out of memory"


def test_the_planner_is_asked_before_anything_starts() -> None:
    huge = space.override(POOR, {"kv_cache.tokens": 10**12})
    with pytest.raises(BrokenError, match=r"GiB, and .* are free"):
        attempt(huge, BENCH)
    gpu = yaml.safe_load((ROOT / "deployments/local-cpu.yaml").read_text())
    gpu["engine"] = {"kind": "vllm"}
    gpu["scheduling"] = {"policy": "max_utilization"}
    gpu["gpu"] = {"product": "NVIDIA-H200"}
    gpu["kv_cache"] = {"tokens": 10**12}
    gpu["model"] = {"path": str(ROOT / "models/tiny")}
    with pytest.raises(DoesNotFitError, match=r"kv_cache\.tokens: .* do not fit"):
        space.check_fits(parsed(gpu))
    with pytest.raises(BrokenError, match="max_num_tokens"):
        attempt(space.override(POOR, {"limits.max_num_tokens": 2}), BENCH)


KEYS = st.sampled_from(["limits.queue", "kv_cache.reuse", "engine.ngram.draft_tokens", "slo.ttft_ms", "engine.kind"])


@given(st.dictionaries(KEYS, st.integers(1, 9)))
def test_overrides_can_be_taken_back(values: dict[str, int]) -> None:
    raw = {"model": {"path": "x"}, "limits": {"max_batch_size": 3}}
    changed = space.override(raw, values)
    for key, wanted in values.items():
        assert space._get(changed, key) == wanted
    assert changed["limits"]["max_batch_size"] == 3
    assert space.override(changed, dict.fromkeys(values)) == raw


def written(raw: dict[str, Any], key: str) -> Any:
    try:
        return space.value(parsed(raw), key)
    except deployments.DeploymentError as error:
        return str(error) if "unknown key" in str(error) else "contradicts other keys"


@pytest.mark.parametrize(
    ("now", "streams", "left"),
    [
        (4, 16, (4, 8, 16)),
        (256, 8, (4, 256)),
        (256, 256, (4, 8, 16, 32, 64, 128, 256)),
        (48, 1000, (4, 8, 16, 32, 48, 64, 128, 256)),
        (6, 1, (6,)),
    ],
)
def test_batches_that_hold_all_streams_are_tried_once(now: int, streams: int, left: tuple[int, ...]) -> None:
    """Each trial of a large engine takes minutes, and those would all be the same."""
    deployment = parsed(space.override(POOR, {"limits.max_batch_size": now}))
    batch, *_ = space.knobs(deployment, Closed(kind="closed", streams=streams))
    assert (batch.key, batch.values) == ("limits.max_batch_size", left)


@pytest.mark.parametrize(("streams", "first"), [(32, True), (64, True), (65, False)])
def test_speculation_comes_first_where_streams_are_few(streams: int, first: bool) -> None:
    """There it gives two to three times as much; a search that has time for few trials must not end before it."""
    deployment = deployments.load(ROOT / "deployments/llama-3-8b-h200-vllm.yaml")
    keys = [knob.key for knob in space.knobs(deployment, Closed(kind="closed", streams=streams))]
    assert keys.index("engine.ngram.draft_tokens") == (0 if first else keys.index("engine.memory_fraction") + 1)


@pytest.mark.parametrize("path", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_of_a_knob_can_be_written(path: Path) -> None:
    deployment = deployments.load(path)
    raw = space.read(path)
    for knob in space.knobs(deployment, Poisson(kind="poisson", requests_per_second=1)):
        assert space.value(deployment, knob.key) in knob.values
        for wanted in knob.values:
            roomy = {"limits.max_num_tokens": 8192, knob.key: wanted}
            if knob.key == "limits.max_num_tokens":
                roomy = {"limits.max_batch_size": 64, knob.key: wanted}
            assert written(space.override(raw, roomy), knob.key) in (wanted, "contradicts other keys")


def test_a_tuned_file_keeps_its_relative_paths(tmp_path: Path) -> None:
    source = ROOT / "deployments/local-cpu.yaml"
    moved = space.relative_to(space.read(source), tmp_path / "out", source)
    assert not Path(moved["model"]["path"]).is_absolute()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tuned.yaml").write_text(yaml.safe_dump(moved))
    assert deployments.load(tmp_path / "out/tuned.yaml") == deployments.load(source)


def test_a_tuned_file_keeps_the_paths_of_adapters(tmp_path: Path) -> None:
    source = tmp_path / "start.yaml"
    source.write_text("model: {path: m}\nengine: {kind: vllm, lora: {7: adapters/a, 8: /b}}\n")
    read = space.read(source)
    assert read["engine"]["lora"] == {7: str(tmp_path / "adapters/a"), 8: "/b"}
    moved = space.relative_to(read, tmp_path / "out", source)
    assert moved["engine"]["lora"] == {7: "../adapters/a", 8: "/b"}


def test_a_tuned_file_keeps_its_absolute_paths(tmp_path: Path) -> None:
    given = yaml.safe_load((ROOT / "deployments/local-cpu.yaml").read_text())
    given["model"]["path"] = str(ROOT / "models/tiny")
    source = tmp_path / "start.yaml"
    source.write_text(yaml.safe_dump(given))
    assert space.relative_to(space.read(source), tmp_path / "out", source)["model"] == given["model"]


RECORDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12)


@given(RECORDS)
def test_nothing_beats_the_pareto_front(points: list[tuple[int, int]]) -> None:
    records = [
        {"trial": number, "score": 1.0, "figures": {"tokens_per_second_per_user": one, "tokens_per_second": all_}}
        for number, (one, all_) in enumerate(points)
    ]
    front = [points[record["trial"]] for record in report.front(records)]
    for point in points:
        beaten = any(other[0] >= point[0] and other[1] >= point[1] and other != point for other in points)
        assert (point in front) == (not beaten)


def test_the_plot_of_a_tuning(tmp_path: Path) -> None:
    one = search(tmp_path)
    run(one, 12)
    assert "Pareto front" in report.pareto(one.records())
    _, rows = report.table(json.loads(json.dumps(one.records())))
    assert len(rows) == len(one.records())
    assert any("given up" in row or "out of memory" in row[-1] for row in rows)


def test_a_trial_that_lags_is_given_up(tmp_path: Path) -> None:
    one = search(tmp_path)
    run(one, 40)
    lagging = [record for record in one.records() if record["state"] == "given up"]
    assert lagging
    assert all("tokens/s so far, good or not; trial" in record["why"] for record in lagging)
    assert all(record["score"] is None for record in lagging), "tokens/s of a part are no score"


def test_a_trial_of_slower_but_better_answers_is_not_given_up(tmp_path: Path) -> None:
    def trade(raw: dict[str, Any], bench: Bench, checkpoint: Callable[[int, float], None]) -> dict[str, Any]:
        small = parsed(raw).limits.max_num_tokens < 2048
        rate, good = (700.0, 100.0) if small else (1000.0, 50.0)
        checkpoint(0, rate)
        return {**figures(rate), "goodput": rate * good / 1e4, "good_percent": good}

    one = search(tmp_path)
    one.run(replace(BENCH, goal="goodput"), Clock(5), lambda: 0, 30, lambda record: None, trade)
    best = one.best()
    assert best is not None
    assert best.params["limits.max_num_tokens"] < 2048


def test_each_knob_is_turned_once_on_top_of_what_has_helped(tmp_path: Path) -> None:
    one = search(tmp_path)
    steps = [(knob.key, wanted) for knob in one.knobs for wanted in knob.steps(one.start[knob.key])]
    told = run(one, 1 + len(steps))
    assert told[1]["changed"] == {"limits.max_batch_size": 32}
    for record, (key, wanted) in zip(told[2:], steps[1:], strict=True):
        helped = {"limits.max_batch_size": 32}
        if record["trial"] > 1 + steps.index(("kv_cache.reuse", True)):
            helped["kv_cache.reuse"] = True
        assert record["changed"] == {**helped, key: wanted}


@given(st.lists(st.integers(1, 99), min_size=1, unique=True), st.data())
def test_a_step_leads_half_of_the_way(values: list[int], data: st.DataObject) -> None:
    now = data.draw(st.sampled_from(values))
    at = values.index(now)
    moved = [values.index(step) - at for step in space.Knob("key", tuple(values)).steps(now)]
    ways = (len(values) - 1 - at, -at)
    assert moved == [int(way / 2) or (1 if way > 0 else -1) for way in ways if way]


def test_a_value_of_its_own_takes_its_place_among_the_others() -> None:
    knob = space.Knob("limits.max_batch_size", (4, 8, 16))
    assert space._with_current(knob, 10).values == (4, 8, 10, 16)
    assert space._with_current(knob, 1).values == (1, 4, 8, 16)
    assert space._with_current(space.Knob("engine.ngram.draft_tokens", (None, 3, 5)), 4).values == (None, 3, 4, 5)
    assert space._with_current(space.Knob("precision.kv_cache", ("auto", "fp8")), "fp8_e5m2").values[0] == "fp8_e5m2"
