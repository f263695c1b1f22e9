"""The pure parts of pacing, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roundhouse.triton.pacing import GATHER_SECONDS, GATHERED, Pace, Passage


def test_a_pace_is_kept_over_a_second() -> None:
    pace = Pace(100, now=0.0)
    sent, now = 0, 0.0
    while now < 10.0:
        wait = pace.wait(now)
        if wait:
            now += max(wait, 1e-6)  # a wait may be too short to move the clock
        else:
            pace.take()
            sent += 1
    assert 1000 <= sent <= 1026  # with the burst at the start, and one at the end


@given(st.integers(1, 20_000), st.lists(st.floats(0, 0.05), min_size=1, max_size=300))
def test_beyond_the_pace_responses_gather(rate: int, sleeps: list[float]) -> None:
    """Whoever has waited may send as many as have gathered: one, if 32 ms bring no more, and never more than 16."""
    pace, now = Pace(rate, now=0.0), 0.0
    while not pace.wait(now):
        pace.take()
    for sleep in sleeps:
        now += sleep
        wait = pace.wait(now)
        if wait:
            assert wait <= max(GATHER_SECONDS, 1 / rate) + 1e-6
            now += wait + 1e-6
        sent = 0
        while not pace.wait(now):
            pace.take()
            sent += 1
        assert sent >= min(GATHERED, max(int(rate * GATHER_SECONDS), 1))


def test_chunks_wait_while_the_passage_is_full_and_go_on_when_one_is_through() -> None:
    passage = Passage(2, patience=0.1)
    passage.send(0.0)
    second = passage.send(0.0)
    assert passage.wait(0.01) > 0
    passage.passed(second)  # postprocessing takes them in order, so the first is through as well
    assert passage.wait(0.01) == 0


def test_a_chunk_that_is_never_passed_holds_up_nobody_for_longer_than_the_patience() -> None:
    passage = Passage(1, patience=0.1)
    lost = passage.send(5.0)
    assert passage.wait(5.06) == 5.0 + 0.1 - 5.06
    assert passage.wait(5.1) == 0
    passage.passed(passage.send(5.1))
    assert passage.overtook(lost)


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 8))
def test_never_more_than_the_limit_are_on_their_way(events: list[bool], limit: int) -> None:
    passage = Passage(limit, patience=1e9)
    way = []
    for sends in events:
        if sends and not passage.wait(0.0):
            way.append(passage.send(0.0))
        elif not sends and way:
            passage.passed(way.pop(0))
        assert len(way) <= limit
    assert bool(passage.wait(0.0)) == (len(way) == limit)
