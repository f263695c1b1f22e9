"""The text of a streamed chunk, as a pure function of its token ids and a short window of ids before it.

The law: joined, the texts of an answer's chunks are byte for byte `Tokenizer.decode` of all its ids, whatever the ids
and however they were cut into chunks.

With `stable(ids)` = the part of the text of `ids` that no later id can change, a chunk's text is
`stable(window + new)[len(stable(window)):]`; the last chunk takes the rest. The window is not the raw tail of the
answer but the shortest list of ids that stands for it: a state, written in ids so that it can travel as a tensor. What
a state must hold depends on the tokenizer's decoder, and is settled for each kind in `roundhouse.text.decoders`.
"""

from collections.abc import Sequence

from roundhouse.text.decoders import choose_decoder
from roundhouse.text.tokenizer import Tokenizer


class Detokenizer:
    """Chunk texts of one tokenizer. Holds tables of the vocabulary, nothing of any stream: share it freely.

    Attributes:
        incremental: False when the tokenizer's decoder is of no known kind: all text then comes with the last chunk.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = choose_decoder(tokenizer.backend, skip_special_tokens)
        self.incremental: bool = self._decoder.incremental

    def chunk_text(self, window: Sequence[int], new: Sequence[int], final: bool) -> str:
        """Text that the ids `new` add to an answer; with `final`, also all that was held back.

        `window`: the answer before `new`, as `next_window` or `window` gave it; empty for the first chunk. `new` may
        be empty. Ids are non-negative; those outside the vocabulary add nothing.
        """
        return self._decoder.chunk_text(window, new, final)

    def next_window(self, window: Sequence[int], new: Sequence[int]) -> list[int]:
        """The window for the chunk after `new`: `next_window(window(a), b) == window(a + b)`.

        At most 3 ids for byte-level tokenizers. For tokenizers with byte fallback at most 5, plus the length of the
        run of byte tokens at the end of the answer while that run is valid UTF-8 (see `PieceDecoder`). For tokenizers
        that are not `incremental`: the whole answer.
        """
        return self._decoder.next_window(window, new)

    def window(self, ids: Sequence[int]) -> list[int]:
        """The window that stands for the answer `ids`."""
        return self._decoder.next_window((), ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to an answer, in UTF-8; part of a character for some."""
        return self._decoder.token_bytes(token_id)

    def skips(self, token_id: int) -> bool:
        """Whether an id leaves no text in an answer: of a special token, or outside the vocabulary."""
        token = self._tokenizer.backend.id_to_token(token_id)
        return token is None or (self._skip_special_tokens and token in self._tokenizer.special_tokens)

    def text(self, ids: Sequence[int]) -> str:
        """Text of a whole answer."""
        return self._tokenizer.decode(ids, self._skip_special_tokens)
