"""Stop sequences in text: where an answer ends, however it was cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundhouse.openai.stop_text import StopText

letters = st.text(alphabet="ab", max_size=12)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


def sent(pieces: list[str], stops: list[str]) -> str:
    stop_text = StopText(stops)
    text = ""
    for piece in pieces:
        new, stopped = stop_text.feed(piece)
        text += new
        if stopped:
            return text
    return text + stop_text.rest()


@given(st.lists(letters), stop_lists)
def test_pieces_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    assert sent(pieces, stops) == sent(list("".join(pieces)), stops)


@given(letters, stop_lists)
def test_no_stop_sequence_is_sent(text: str, stops: list[str]) -> None:
    result = sent([text], stops)
    assert text.startswith(result)
    assert not any(stop in result for stop in stops)
    if result != text:
        assert any(text[len(result) :].startswith(stop) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "result"),
    [
        (["one two three"], ["two"], "one "),
        (["one t", "wo three"], ["two"], "one "),
        (["one t", "ree"], ["two"], "one tree"),
        (["one tw"], ["two"], "one tw"),
        (["abc"], ["bc", "b"], "a"),  # `b` is complete first
        (["xabc"], ["abc", "c"], "x"),  # complete at once: the longer one goes
    ],
)
def test_examples(pieces: list[str], stops: list[str], result: str) -> None:
    assert sent(pieces, stops) == result


def test_only_a_possible_beginning_is_held_back() -> None:
    assert StopText(["END"]).feed("the E") == ("the ", False)
    assert StopText(["END"]).feed("the e") == ("the e", False)
