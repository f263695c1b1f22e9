"""The law of streaming: joined chunk texts == the text of the whole answer, for every family, sequence and chunking."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.tokenizer import Tokenizer

from .families import BYTE_TOKENS, INCREMENTAL, TEXTS, WHOLE_ANSWER, tokenizer_of

FAMILIES = [*INCREMENTAL, *WHOLE_ANSWER]
BYTE_FALLBACK = ["metaspace_byte_fallback", "llama2", "gemma"]


# A surrogate (Python sees a byte later than Rust that it is wrong), overlong forms, a cut character, a real U+FFFD.
TROUBLE = [b"\xed\xa0", b"\xed\xa0\x80", b"\xc0\x80", b"\xe0\x80", b"\xf4\x90", b"\xf0\x9f\x98", b"\xef\xbf\xbd"]


def stream(detokenizer: Detokenizer, chunks: Sequence[Sequence[int]]) -> list[str]:
    """Texts of the chunks; the last of `chunks` is the final one."""
    window: list[int] = []
    texts = []
    for number, chunk in enumerate(chunks, start=1):
        texts.append(detokenizer.chunk_text(window, chunk, final=number == len(chunks)))
        window = detokenizer.next_window(window, chunk)
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_ids_are_those_that_leave_no_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    special = set(tokenizer.special_tokens.values())
    skipping, plain = Detokenizer(tokenizer), Detokenizer(tokenizer, skip_special_tokens=False)
    ids = range(tokenizer.vocab_size + 3)
    assert {i for i in ids if skipping.skips(i)} == special | set(ids[tokenizer.vocab_size :])
    assert {i for i in ids if plain.skips(i)} == set(ids[tokenizer.vocab_size :])


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random ids, with more of the ids that make trouble than there are in the vocabulary, and some unknown ids."""
    backend = tokenizer.backend
    byte_ids = [backend.token_to_id(token) for token in BYTE_TOKENS if backend.token_to_id(token) is not None]
    special_ids = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
    ids = st.one_of(
        st.integers(0, tokenizer.vocab_size + 3),
        st.sampled_from(special_ids),
        st.sampled_from([i for token in ("", "▁", "▁▁") if (i := backend.token_to_id(token)) is not None] or [0]),
    )
    texts = st.text(max_size=6).map(lambda text: tokenizer.encode(text, False))
    segments: list[st.SearchStrategy[list[int]]] = [
        st.lists(ids, max_size=6),
        texts,
        st.sampled_from(encoded_texts(tokenizer)),
    ]
    if byte_ids:
        runs = st.one_of(st.binary(max_size=8), st.text(max_size=4).map(str.encode), st.sampled_from(TROUBLE))
        segments.append(runs.map(lambda run: [backend.token_to_id(BYTE_TOKENS[byte]) for byte in run]))
    return st.lists(st.one_of(segments), max_size=6).map(lambda parts: [i for part in parts for i in part])


def encoded_texts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, False)[:40] for text in TEXTS]


def cut(ids: Sequence[int], places: Sequence[int]) -> list[Sequence[int]]:
    """`ids` cut at `places` (modulo its length); equal places make empty chunks."""
    borders = [0, *sorted(place % (len(ids) + 1) for place in places), len(ids)]
    return [ids[start:end] for start, end in pairwise(borders)]


places = st.lists(st.integers(0, 200), max_size=12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(deadline=None, max_examples=150)
@given(data=st.data(), places=places)
def test_joined_chunks_are_the_whole_text(
    family: str, skip_special_tokens: bool, data: st.DataObject, places: list[int]
) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    ids = data.draw(id_lists(tokenizer))
    whole = tokenizer.decode(ids, skip_special_tokens)
    assert detokenizer.text(ids) == whole
    assert "".join(stream(detokenizer, cut(ids, places))) == whole
    assert "".join(stream(detokenizer, [[i] for i in ids] or [[]])) == whole
    assert "".join(stream(detokenizer, [*([i] for i in ids), []])) == whole


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=150)
@given(data=st.data(), place=st.integers(0, 200))
def test_next_window_is_the_window_of_the_joined_ids(family: str, data: st.DataObject, place: int) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    before, new = cut(data.draw(id_lists(tokenizer)), [place])
    assert detokenizer.next_window(detokenizer.window(before), new) == detokenizer.window([*before, *new])


@settings(deadline=None, max_examples=600)
@given(data=st.lists(st.one_of(st.binary(max_size=8), st.sampled_from(TROUBLE)), max_size=6).map(b"".join))
def test_python_and_rust_replace_the_same_invalid_utf8(data: bytes) -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer = Detokenizer(tokenizer)
    alphabet = {bytes_: i for i in range(tokenizer.vocab_size) if len(bytes_ := detokenizer._decoder._bytes[i]) == 1}
    ids = [alphabet[bytes([byte])] for byte in data]
    assert "".join(stream(detokenizer, [[i] for i in ids] or [[]])) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", INCREMENTAL)
def test_ordinary_text_is_not_delayed(family: str) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.incremental
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog", False)
    texts = stream(detokenizer, [*([i] for i in ids), []])
    assert texts[-1] == ""
    sent = ""
    for count, text in enumerate(texts[:-1], start=1):
        sent += text
        assert sent == tokenizer.decode(ids[:count])


def test_a_character_goes_out_with_the_token_that_completes_it() -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("a🦖", False)
    assert len(ids) == 4
    assert stream(detokenizer, [*([i] for i in ids), []]) == ["a", "", "", "🦖", ""]


def test_an_incomplete_character_is_flushed_at_the_end() -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("a🦖", False)[:-1]
    assert stream(detokenizer, [*([i] for i in ids), []]) == ["a", "", "", "\ufffd"]


def test_a_real_replacement_character_is_not_held_back() -> None:
    tokenizer = tokenizer_of("byte_level")
    token_id = tokenizer.backend.token_to_id("\ufffd")
    assert Detokenizer(tokenizer).chunk_text([], [token_id], final=False) == "\ufffd"


@pytest.mark.parametrize("family", BYTE_FALLBACK)
def test_a_run_of_byte_tokens_is_held_back_until_it_is_settled(family: str) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    start = tokenizer.encode("The", False)
    run = [tokenizer.backend.token_to_id(BYTE_TOKENS[byte]) for byte in "é🦖".encode()]
    assert stream(detokenizer, [start, run[:3], run[3:], start])[1:3] == ["", ""]
    # Broken, all of the run is settled: six bytes and the seventh that breaks it.
    broken = tokenizer.backend.token_to_id("<0xFF>")
    assert stream(detokenizer, [start, run, [broken], [run[0]], []])[1:] == ["", "\ufffd" * 7, "\ufffd", ""]


@pytest.mark.parametrize("family", INCREMENTAL)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_windows_are_short(family: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(family)
    ids = data.draw(id_lists(tokenizer))
    byte_ids = {tokenizer.backend.token_to_id(token) for token in BYTE_TOKENS}
    run = 0
    for token_id in reversed([i for i in ids if tokenizer.decode([i]) or i in byte_ids]):
        if token_id not in byte_ids:
            break
        run += 1
    assert len(Detokenizer(tokenizer).window(ids)) <= 4 + run


@pytest.mark.parametrize("family", BYTE_FALLBACK)
@pytest.mark.parametrize(
    "run", [b"\xed\xa0\0a", b"\xed\xa0\x80", b"a\xf0\x9f\x98a", b"\x80a", b"\xe2\x82a", b"a\xf5", b"\xc0\x80"]
)
def test_kinds_of_broken_runs(family: str, run: bytes) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    ids = [tokenizer.backend.token_to_id(BYTE_TOKENS[byte]) for byte in run * 2]
    assert "".join(stream(detokenizer, [*([i] for i in ids), []])) == tokenizer.decode(ids) == "\ufffd" * len(ids)
    for count in range(len(ids)):
        window = detokenizer.window(ids[:count])
        assert detokenizer.next_window(window, ids[count:]) == detokenizer.window(ids)


@pytest.mark.parametrize("family", BYTE_FALLBACK)
def test_a_broken_run_has_a_bounded_window(family: str) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    ids = [tokenizer.backend.token_to_id(BYTE_TOKENS[byte]) for byte in b"abc\x80" + b"a" * 4096]
    assert len(detokenizer.window(ids)) <= 4
    assert "".join(stream(detokenizer, [[i] for i in ids])) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", ["byte_level", *BYTE_FALLBACK])
def test_unknown_ids_do_not_fill_the_tables(family: str) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    unknown = list(range(10**6, 10**6 + 100))
    assert detokenizer.chunk_text([], unknown, final=True) == ""
    assert detokenizer.window(unknown) == []
    assert vars(detokenizer._decoder).get("_bytes", vars(detokenizer._decoder).get("_pieces")) == {}


@pytest.mark.parametrize("family", WHOLE_ANSWER)
def test_an_unknown_decoder_sends_its_text_at_the_end(family: str) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    assert not detokenizer.incremental
    ids = tokenizer.encode("The quick fox", False)
    assert stream(detokenizer, [ids, []]) == ["", tokenizer.decode(ids)]
