"""fastokens gives what `tokenizers` gives, for one tokenizer of each kind that it knows; others it is not used for."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import fastokens
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from roundhouse.text.fast_encoder import ODD_TEXTS, fast_encoder
from roundhouse.text.tokenizer import Tokenizer

from . import families

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "llama 3": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-oss": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + rf"{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    + rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{CONTRACTIONS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SLOW_PATTERN = r"(?:a+b?)+c|[\s\S]"  # tries all ways to part a run of a's


def split(pattern: str, normalizer: normalizers.Normalizer | None = None) -> RustTokenizer:
    tokenizer = families.byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentence_piece_bpe(*, first_space: bool) -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if first_space else space
    special = ["<unk>", *families.SPECIAL, *families.BYTE_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(families.TEXTS * 3, trainer)
    return tokenizer


def with_flagged_tokens() -> RustTokenizer:
    tokenizer = families.byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    tokenizer.add_tokens([AddedToken(f"<{flag}>", **{flag: True}) for flag in flags])
    return tokenizer


def changed_model(**settings: object) -> RustTokenizer:
    content = json.loads(families.byte_level().to_str())
    content["model"] |= settings
    return RustTokenizer.from_str(json.dumps(content))


def fewer_merges() -> RustTokenizer:
    """Entries that no merges lead to, which is where tokenizers differ."""
    merges = json.loads(families.byte_level().to_str())["model"]["merges"]
    return changed_model(merges=merges[:40] + merges[60:])


KNOWN: dict[str, Callable[[], RustTokenizer]] = {
    "gpt-2": families.byte_level,
    "llama 3": lambda: split(PATTERNS["llama 3"]),
    "qwen": lambda: split(PATTERNS["qwen"], normalizers.NFC()),
    "gpt-oss": lambda: split(PATTERNS["gpt-oss"]),
    "llama 2": lambda: sentence_piece_bpe(first_space=True),
    "gemma": lambda: sentence_piece_bpe(first_space=False),
    "flagged tokens": with_flagged_tokens,
    "fewer merges": fewer_merges,
    "words before merges": lambda: changed_model(ignore_merges=True),
}
NESTS = [
    "<s>",
    "<|im_start|>",
    "<tool call>",
    "<lstrip>",
    " <rstrip> ",
    "<single_word>s",
    "<NORMALIZED>",
    "DON'T",
    "'ll",
]
texts = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([*families.TEXTS, *ODD_TEXTS, *NESTS]),
        st.text(alphabet=" \t\r\n\u00a0'0.", max_size=8),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("kind", KNOWN)
def test_the_ids_are_the_same(kind: str) -> None:
    backend = KNOWN[kind]()
    fast = fast_encoder(backend)
    assert fast is not None

    @settings(max_examples=300, deadline=None)
    @given(text=texts, special=st.booleans())
    def same(text: str, special: bool) -> None:
        assert fast.encode(text, add_special_tokens=special).ids == backend.encode(text, add_special_tokens=special).ids

    same()


@pytest.mark.parametrize(
    "backend",
    [families.metaspace, families.word_piece, lambda: changed_model(dropout=0.5)],
    ids=["unigram", "word piece", "one that rolls dice"],
)
def test_it_is_not_used_where_it_would_give_other_ids(backend: Callable[[], RustTokenizer], tmp_path: Path) -> None:
    backend().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.hasten() is False
    assert tokenizer.decode(tokenizer.encode("dog", False)).strip() == "dog"


def stand_in(monkeypatch: pytest.MonkeyPatch, other: fastokens.Tokenizer) -> None:
    """What fastokens makes of any tokenizer from now on."""
    monkeypatch.setattr(fastokens, "Tokenizer", type("Other", (), {"from_json_str": staticmethod(lambda _: other)}))


def test_a_difference_in_one_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with fastokens 0.2.1, of the tokenizer of scripts/bench_gpu.py."""
    backend = families.byte_level()
    content = json.loads(backend.to_str())
    del content["model"]["merges"][100]
    stand_in(monkeypatch, fastokens.Tokenizer.from_json_str(json.dumps(content)))
    assert fast_encoder(backend) is None


def test_one_that_gives_up_while_it_is_tried_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = split(SLOW_PATTERN)
    stand_in(monkeypatch, fastokens.Tokenizer.from_json_str(backend.to_str(), pcre2_match_limit=1))
    assert fast_encoder(backend) is None


def test_a_hastened_tokenizer_does_without_the_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KNOWN["llama 3"]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    expected = {special: tokenizer.encode("naïve 🦖", special) for special in (True, False)}
    assert tokenizer.hasten() is True
    monkeypatch.delattr(tokenizer, "backend")
    assert {special: tokenizer.encode("naïve 🦖", special) for special in (True, False)} == expected
    assert expected[True] == [0, *expected[False]]


def test_a_text_that_is_too_much_for_it_is_left_to_the_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = split(SLOW_PATTERN)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    text = "a" * 12
    expected = tokenizer.encode(text, False)
    limited = fastokens.Tokenizer.from_json_str(backend.to_str(), pcre2_match_limit=100)
    with pytest.raises(ValueError, match="limit"):
        limited.encode(text)
    monkeypatch.setattr(tokenizer, "_fast", limited)
    assert tokenizer.encode(text, False) == expected


def test_it_is_faster() -> None:
    """By what is worth a dependency; the tiny model's tokenizer, prose that it has not seen."""
    root = Path(__file__).resolve().parents[2]
    tokenizer = Tokenizer.load(root / "models/tiny")
    prose = (root / "README.md").read_text(encoding="utf-8") + (root / "docs/decisions.md").read_text(encoding="utf-8")
    pieces = [prose[start : start + 1000] for start in range(0, len(prose), 1000)]

    def seconds() -> float:
        begun = time.perf_counter()
        for piece in pieces:
            tokenizer.encode(piece, True)
        return time.perf_counter() - begun

    slow = min(seconds() for _ in range(3))
    assert tokenizer.hasten()
    assert seconds() < slow / 2
