"""Text to token ids by fastokens: the ids of `tokenizers`, many times sooner, for byte-level and other BPE tokenizers.

fastokens reads the same tokenizer.json. It refuses the kinds that it does not know; that it gives the same ids is tried
here for each tokenizer that is loaded, and in tests/text/test_fast_encoder.py for one of each kind.
"""

from __future__ import annotations

from typing import Protocol

from tokenizers import Tokenizer as RustTokenizer

ODD_TEXTS = (
    "",
    " ",
    "   three spaces,\n\n\nthree lines,\r\n\tand a tab \t\n  ",
    "Don't, WON'T, we'll, I'M; 3.14 1,234,567 v2.0 #1 50%",
    "snake_case camelCase HTTPServer a->b x!=y ((())) ... --- '''",
    "naïve e\u0301 ﬁ ß ẞ İ ı ſ K Ⅷ ½ ١٢٣ 𝟙",
    "Съешь же 素早い茶色の狐 快速 다람쥐 مرحبا שלום नमस्ते",
    "👩\u200d👩\u200d👧 👍🏽 🇩🇪 \u200b \u00a0 \u2028 \u3000 \x85 \x00 \ufffd \ue000 \U0010ffff",
    "<|endoftext|> <s> </s> [INST] <unk> <0x0A>",
)
RUN = 50  # entries of the vocabulary in a row


class FastEncoding(Protocol):
    ids: list[int]


class FastEncoder(Protocol):
    """Of fastokens."""

    def encode(self, text: str, add_special_tokens: bool) -> FastEncoding: ...


def fast_encoder(backend: RustTokenizer) -> FastEncoder | None:
    """None: fastokens is not installed, does not know this kind of tokenizer, or gives other ids for something tried.

    Tries odd texts and each entry of the vocabulary.
    """
    ids = range(backend.get_vocab_size(with_added_tokens=True))
    entries = backend.decode_batch([[id] for id in ids], skip_special_tokens=False)
    texts = [*ODD_TEXTS, *("".join(entries[start : start + RUN]) for start in range(0, len(entries), RUN))]
    try:
        import fastokens

        fast: FastEncoder = fastokens.Tokenizer.from_json_str(backend.to_str())
        given = [fast.encode(text, add_special_tokens=True).ids for text in texts]
    except (ImportError, ValueError):
        return None
    expected = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=True)]
    return fast if given == expected else None
