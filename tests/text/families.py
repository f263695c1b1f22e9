"""Tokenizers of every family that the streaming rules know, trained on a small multilingual corpus."""

import json
from collections.abc import Iterator
from functools import cache

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from roundhouse.text.tokenizer import Tokenizer
from roundhouse.text.tokenizer_files import TokenizerSettings

SPECIAL = ["<s>", "</s>", "<|im_start|>"]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It doesn't stop, and it's learning!",
    "  indented code:\n\tdef f(x):\n\t\treturn x ** 2  # two spaces\n",
    "Der schnelle Fuchs läuft über die Straße; ça va, señor? Naïve café.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "素早い茶色の狐がのろまな犬を飛び越える。今日は天気がいいですね。",
    "快速的棕色狐狸跳过懒狗。你好,世界!",
    "다람쥐 헌 쳇바퀴에 타고파.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "नमस्ते दुनिया, यह एक परीक्षण है।",
    "emoji 😀😃 👩‍👩‍👧 🇩🇪 👍🏽 e\u0301 \ufffd",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _corpus() -> Iterator[str]:
    for text in TEXTS:
        yield from [text] * 3
        yield from text.split()


def byte_level(regex: bool = True) -> RustTokenizer:
    """GPT-2, Llama 3, Qwen."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    # A small vocabulary: most characters outside ASCII are spread over several tokens.
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # Added tokens: one with a space (which the byte alphabet lacks), one that reads as a byte, a U+FFFD.
    tokenizer.add_tokens([AddedToken("<tool call>"), AddedToken("é"), AddedToken("\ufffd")])
    return tokenizer


def _unigram() -> RustTokenizer:
    tokenizer = RustTokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def metaspace() -> RustTokenizer:
    """T5, XLM-R: no byte tokens, the first token loses its space."""
    tokenizer = _unigram()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def metaspace_byte_fallback() -> RustTokenizer:
    """Unigram with byte tokens, decoded by ByteFallback and then Metaspace."""
    tokenizer = _with_byte_tokens(_unigram())
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def llama2() -> RustTokenizer:
    """Llama 2, Mistral 7B, Phi 3: the joined text loses a leading space."""
    tokenizer = _with_byte_tokens(_unigram())
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def gemma() -> RustTokenizer:
    """Gemma: as Llama 2, but no space is put before the text, and none is taken away."""
    tokenizer = _with_byte_tokens(_unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def word_piece(cleanup: bool = True) -> RustTokenizer:
    """BERT."""
    tokenizer = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def no_decoder() -> RustTokenizer:
    """Tokens joined by spaces."""
    tokenizer = word_piece()
    tokenizer.decoder = None
    return tokenizer


def ctc() -> RustTokenizer:
    """A decoder of no known kind (it drops repeated tokens)."""
    tokenizer = word_piece()
    tokenizer.decoder = decoders.CTC()
    return tokenizer


def replace_after_fuse() -> RustTokenizer:
    """A decoder whose last stage sees the whole text."""
    tokenizer = _with_byte_tokens(_unigram())
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(Regex("▁+"), " "), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _with_byte_tokens(tokenizer: RustTokenizer) -> RustTokenizer:
    """`tokenizer` with a vocabulary of 256 byte tokens, an empty piece and a lone space."""
    pieces = [(token, score) for token, score in _unigram_pieces(tokenizer) if token not in BYTE_TOKENS]
    known = {token for token, _ in pieces}
    extra = [token for token in (*BYTE_TOKENS, "", "▁", "▁▁") if token not in known]
    model = models.Unigram([*pieces, *((token, -20.0) for token in extra)], unk_id=0, byte_fallback=True)
    rebuilt = RustTokenizer(model)
    rebuilt.pre_tokenizer = tokenizer.pre_tokenizer
    rebuilt.add_special_tokens(["<unk>", *SPECIAL])
    return rebuilt


def _unigram_pieces(tokenizer: RustTokenizer) -> list[tuple[str, float]]:
    return [(token, score) for token, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


INCREMENTAL = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "metaspace_byte_fallback": metaspace_byte_fallback,
    "llama2": llama2,
    "gemma": gemma,
    "word_piece": word_piece,
    "no_decoder": no_decoder,
}
WHOLE_ANSWER = {"ctc": ctc, "replace_after_fuse": replace_after_fuse}

NO_SETTINGS = TokenizerSettings({}, (), (), None, None, (), {})


@cache  # not a fixture: hypothesis tests draw from the vocabulary, and want it at hand
def tokenizer_of(family: str) -> Tokenizer:
    """The tokenizer of a family, trained once a process."""
    return Tokenizer((INCREMENTAL | WHOLE_ANSWER)[family](), NO_SETTINGS)
