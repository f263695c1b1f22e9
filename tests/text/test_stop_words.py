"""Word lists as tensors, and where stop words end an answer."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.stop_words import StopMatcher, decode_word_list, embedding_bias, encode_word_list
from roundhouse.text.tokenizer import Tokenizer

from .families import BYTE_TOKENS, INCREMENTAL, WHOLE_ANSWER, tokenizer_of
from .test_detokenize import cut, id_lists, places

FAMILIES = [*INCREMENTAL, *WHOLE_ANSWER]


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def first_stop(detokenizer: Detokenizer, words: list[list[int]], ids: list[int], min_tokens: int) -> int | None:
    """The definition, on the texts of whole prefixes: index of the token that ends the answer."""
    of_text = [word for word in words if not any(map(detokenizer.skips, word))]
    texts = [text for word in of_text if (text := detokenizer.text(word)) and "\ufffd" not in text]
    earlier: list[str] = []
    for index in range(len(ids)):
        answer = ids[: index + 1]
        now = detokenizer.text(answer)
        seen = max((len(common_prefix(before, now)) for before in earlier), default=0)
        new_text = any(text in now[max(0, seen - len(text) + 1) :] for text in texts)
        if index + 1 >= min_tokens and (new_text or any(answer[-len(word) :] == word for word in words)):
            return index
        earlier.append(now)
    return None


def common_prefix(left: str, right: str) -> str:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(a for a, _ in pairs)


def feed(matcher: StopMatcher, chunks: list[list[int]]) -> int | None:
    before = 0
    for chunk in chunks:
        index = matcher.find(chunk)
        if index is not None:
            return before + index
        before += len(chunk)
    return None


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=100)
@given(data=st.data(), places=places, min_tokens=st.integers(0, 8))
def test_an_answer_ends_where_the_definition_says(
    family: str, data: st.DataObject, places: list[int], min_tokens: int
) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    ids = data.draw(id_lists(tokenizer))
    # Words that occur: pieces of the ids and of the text; and words that may not.
    start, length = data.draw(st.tuples(st.integers(0, 40), st.integers(1, 4)))
    text = detokenizer.text(ids)[start : start + length]
    mixed = f"<|im_start|>{text}", f"{text}</s>"
    candidates = [ids[start : start + length], *ids_of(tokenizer, text, "o", *mixed), data.draw(id_lists(tokenizer))]
    words = [word for word in candidates if word]
    chunks = [list(chunk) for chunk in cut(ids, places)]
    assert feed(StopMatcher(words, detokenizer, min_tokens), chunks) == first_stop(detokenizer, words, ids, min_tokens)


@pytest.mark.parametrize("family", ["byte_level", "llama2", "metaspace", "metaspace_byte_fallback"])
def test_a_word_is_found_however_it_was_cut_into_tokens(family: str) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    (word,) = ids_of(tokenizer, "lazy")
    letters = [tokenizer.backend.token_to_id(letter) for letter in "lazy"]
    assert None not in letters
    assert letters != word
    matcher = StopMatcher([word], detokenizer)
    assert [matcher.find([i]) for i in letters] == [None, None, None, 0]


def test_the_token_that_completes_a_word_belongs_to_the_answer() -> None:
    tokenizer = tokenizer_of("byte_level")
    word, answer = ids_of(tokenizer, "fox", "The quick brown fox jumps")
    index = StopMatcher([word], Detokenizer(tokenizer)).find(answer)
    assert index is not None
    assert tokenizer.decode(answer[: index + 1]) == "The quick brown fox"


@pytest.mark.parametrize("family", ["llama2", "gemma", "metaspace_byte_fallback"])
def test_a_character_of_byte_tokens_ends_the_answer_at_its_last_byte(family: str) -> None:
    tokenizer = tokenizer_of(family)
    run = [tokenizer.backend.token_to_id(BYTE_TOKENS[byte]) for byte in "é🦖".encode()]
    matcher = StopMatcher(ids_of(tokenizer, "🦖"), Detokenizer(tokenizer))
    assert matcher.find([*run, *run]) == len(run) - 1


@pytest.mark.parametrize("family", ["llama2", "gemma", "metaspace_byte_fallback"])
@pytest.mark.parametrize("min_tokens", [0, 275])
def test_a_long_run_of_byte_tokens_is_searched_in_bounded_pieces(family: str, min_tokens: int) -> None:
    tokenizer = tokenizer_of(family)
    detokenizer = Detokenizer(tokenizer)
    text = "ab" + " é🦖d" * 30 + "xyz" + "d " * 20
    run = [tokenizer.backend.token_to_id(BYTE_TOKENS[byte]) for byte in text.encode()]
    words = [
        [tokenizer.backend.token_to_id(BYTE_TOKENS[byte]) for byte in b"d" + word] for word in (b"xyz", b"a", b"bd")
    ]
    words.append(tokenizer.encode("dxyz", False))
    matcher = StopMatcher(words, detokenizer, min_tokens)
    assert feed(matcher, [[i] for i in run]) == first_stop(detokenizer, words, run, min_tokens)
    assert len(matcher._window) < 200


def test_a_special_token_ends_the_answer_by_its_id() -> None:
    tokenizer = tokenizer_of("byte_level")
    special, answer = ids_of(tokenizer, "<|im_start|>", "a b<|im_start|>c")
    assert StopMatcher([special], Detokenizer(tokenizer)).find(answer) == answer.index(special[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("word", ["<|im_start|>o", "o<|im_start|>", "t</s>o", "<|im_start|></s>"])
def test_a_word_with_a_special_token_is_not_what_is_left_of_it(family: str, word: str) -> None:
    tokenizer = tokenizer_of(family)
    ids, answer = ids_of(tokenizer, word, "o fox to o, do")
    matcher = StopMatcher([ids], Detokenizer(tokenizer))
    assert matcher.find(answer) is None
    assert matcher.find([*ids, *answer]) == len(ids) - 1


def test_special_tokens_that_stay_in_the_text_are_text() -> None:
    tokenizer = tokenizer_of("byte_level")
    (word,) = ids_of(tokenizer, "<|im_start|>fox")
    answer = [word[0], *map(tokenizer.backend.token_to_id, "fox")]
    assert StopMatcher([word], Detokenizer(tokenizer, skip_special_tokens=False)).find(answer) == 3
    assert StopMatcher([word], Detokenizer(tokenizer)).find(answer) is None


def test_another_matcher_begins_anew() -> None:
    tokenizer = tokenizer_of("byte_level")
    word, letters = ids_of(tokenizer, "fox")[0], list(map(tokenizer.backend.token_to_id, "fox"))
    first = StopMatcher([word], Detokenizer(tokenizer), min_tokens=3)
    assert first.find(letters[:2]) is None
    assert first.another().find(letters[2:]) is None
    assert first.another().find(letters) == 2
    assert first.find(letters[2:]) == 0


def test_min_tokens_passes_over_early_words() -> None:
    tokenizer = tokenizer_of("byte_level")
    word, answer = ids_of(tokenizer, ",", "a,b,c,d")
    assert len(answer) == 7
    stops = [StopMatcher([word], Detokenizer(tokenizer), min_tokens).find(answer) for min_tokens in range(9)]
    assert stops == [1, 1, 1, 3, 3, 5, 5, None, None]


def test_a_word_list_is_ids_over_end_offsets() -> None:
    tokenizer = tokenizer_of("byte_level")
    two, three = ids_of(tokenizer, "\n\n", "b-c")
    assert (len(two), len(three)) == (2, 3)
    tensor = encode_word_list([["\n\n", "", "b-c"], ["\n\n"], [""]], tokenizer)
    assert tensor.dtype == np.int32
    assert tensor.tolist() == [
        [[*two, *three], [2, 5, -1, -1, -1]],
        [[*two, 0, 0, 0], [2, -1, -1, -1, -1]],
        [[0] * 5, [-1] * 5],
    ]
    assert [decode_word_list(row, "stop_words_list") for row in tensor] == [[two, three], [two], []]


@pytest.mark.parametrize(
    ("words", "shape"), [([[""]], (1, 2, 1)), ([["", ""]], (1, 2, 1)), ([[]], (1, 2, 0)), ([[], []], (2, 2, 0))]
)
def test_no_words(words: list[list[str]], shape: tuple[int, ...]) -> None:
    tensor = encode_word_list(words, tokenizer_of("byte_level"))
    assert tensor.shape == shape
    assert [decode_word_list(row, "bad_words_list") for row in tensor] == [[]] * len(words)


@settings(deadline=None)
@given(words=st.lists(st.lists(st.text(max_size=80), max_size=4), min_size=1, max_size=3))
def test_word_lists_survive_the_round_trip(words: list[list[str]]) -> None:
    tokenizer = tokenizer_of("llama2")
    decoded = [decode_word_list(row, "stop_words_list") for row in encode_word_list(words, tokenizer)]
    assert decoded == [[ids for ids in ids_of(tokenizer, *row) if ids] for row in words]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([1, 2], "has shape"),
        ([[1, 2]], "has shape"),
        ([[1, 2], [2, 2]], "end offset 1 is 2, expected more than 2 and at most 2"),
        ([[1, 2], [0, 2]], "end offset 0 is 0, expected more than 0"),
        ([[1, 2], [3, -1]], "end offset 0 is 3, expected more than 0 and at most 2"),
        ([[1, 2], [-1, 2]], "end offset 0 is -1"),
        ([[1, 2], [-2, -1]], "end offset 0 is -2"),
        ([[1, -5], [2, -1]], "word 0 holds the token id -5"),
    ],
)
def test_a_broken_word_list_is_refused_by_name(array: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^stop_words_list.*{message}"):
        decode_word_list(np.array(array, dtype=np.int32), "stop_words_list")


def test_a_bias_adds_the_weight_to_every_id_of_the_word() -> None:
    tokenizer = tokenizer_of("byte_level")
    x, y = tokenizer.encode("X-", False)
    bias = embedding_bias(["X-", "", "X"], [2.0, 9.0, -0.5], tokenizer, tokenizer.vocab_size)
    assert bias.dtype == np.float32
    assert bias.shape == (tokenizer.vocab_size,)
    assert {int(i): float(bias[i]) for i in np.flatnonzero(bias)} == {x: 1.5, y: 2.0}


@pytest.mark.parametrize(("words", "weights"), [([], []), ([""], [1.0])])
def test_no_bias(words: list[str], weights: list[float]) -> None:
    assert embedding_bias(words, weights, tokenizer_of("byte_level"), 10).shape == (0,)


def test_a_bias_that_cannot_be_is_refused_by_name() -> None:
    tokenizer = tokenizer_of("byte_level")
    with pytest.raises(ValueError, match="embedding_bias_words has 2 entries and embedding_bias_weights has 1"):
        embedding_bias(["a", "b"], [1.0], tokenizer, tokenizer.vocab_size)
    with pytest.raises(ValueError, match=r"'X' holds the token id .* the ids of the model end at 9"):
        embedding_bias(["X"], [1.0], tokenizer, 10)
