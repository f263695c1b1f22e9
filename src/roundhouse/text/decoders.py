"""What the Rust library's decoders do, as far as a stream must know it: one class for each kind.

A decoder drops special and unknown tokens, turns the others into texts and joins them. Three things make text depend
on what follows or on what went before: characters spread over several tokens, rules for the first token (a leading
space that goes, a WordPiece that gets none), and runs of byte tokens (`<0xE2>`), which become characters only if the
whole run is valid UTF-8, and one U+FFFD for each byte otherwise.
"""

import json
import re
from codecs import utf_8_decode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as RustTokenizer

_BYTE_TOKEN = re.compile(
    r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>"
)  # what Rust's from_str_radix takes, the odd sign included
_BYTE_TOKEN_CHARACTERS = frozenset("<x>+0123456789abcdefABCDEF")
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class ChunkDecoder(Protocol):
    """`chunk_text` and `next_window` of `Detokenizer`, for one kind of decoder."""

    incremental: bool

    def chunk_text(self, window: Sequence[int], new: Sequence[int], final: bool) -> str: ...

    def next_window(self, window: Sequence[int], new: Sequence[int]) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def choose_decoder(backend: RustTokenizer, skip_special_tokens: bool) -> ChunkDecoder:
    """The class that knows the decoder of `backend`, or `WholeAnswerDecoder` if none does."""
    stages = _stages(backend)
    kinds = " ".join(stage["type"] for stage in stages)
    if re.fullmatch(r"ByteLevel( Fuse)*", kinds):
        return ByteLevelDecoder(backend, skip_special_tokens)
    strips = re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse )+Strip", kinds) is not None
    pieces = (
        re.fullmatch(r"(Replace ?)*(Metaspace ?)?(ByteFallback ?)?(Metaspace|WordPiece)?( ?Fuse)*", kinds) is not None
    )
    if (pieces or (strips and stages[-1]["start"] <= 1 and stages[-1]["stop"] == 0)) and _byte_tokens_survive(stages):
        byte_fallback = "ByteFallback" in kinds
        anchor = _find_anchor(backend, byte_fallback, _skipped_tokens(backend, skip_special_tokens))
        if anchor is not None:
            return PieceDecoder(backend, anchor, byte_fallback, strips, skip_special_tokens)
    return WholeAnswerDecoder(backend, skip_special_tokens)


def _stages(backend: RustTokenizer) -> list[dict[str, Any]]:
    """The decoder as a flat list of its serialised stages."""

    def flatten(stage: dict[str, Any]) -> Iterable[dict[str, Any]]:
        if stage["type"] != "Sequence":
            return (stage,)
        return (inner for part in stage["decoders"] for inner in flatten(part))

    return [] if backend.decoder is None else list(flatten(json.loads(backend.decoder.__getstate__())))


def _byte_tokens_survive(stages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no Replace stage can make, or unmake, a token that looks like `<0xE2>` before ByteFallback sees it."""
    if all(stage["type"] != "ByteFallback" for stage in stages):
        return True
    replaces = [stage for stage in stages if stage["type"] == "Replace"]
    return all(
        "String" in stage["pattern"]
        and _BYTE_TOKEN_CHARACTERS.isdisjoint(stage["pattern"]["String"] + stage["content"])
        for stage in replaces
    )


def _skipped_tokens(backend: RustTokenizer, skip_special_tokens: bool) -> frozenset[str]:
    added = backend.get_added_tokens_decoder().values() if skip_special_tokens else ()
    return frozenset(token.content for token in added if token.special)


class WholeAnswerDecoder:
    """For decoders of no known kind: right for all of them, because nothing is sent before the answer is complete."""

    incremental = False

    def __init__(self, backend: RustTokenizer, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens

    def chunk_text(self, window: Sequence[int], new: Sequence[int], final: bool) -> str:
        if not final:
            return ""
        text: str = self._backend.decode([*window, *new], skip_special_tokens=self._skip_special_tokens)
        return text

    def next_window(self, window: Sequence[int], new: Sequence[int]) -> list[int]:
        return [*window, *new]

    def token_bytes(self, token_id: int) -> bytes:
        text: str = self._backend.decode([token_id], skip_special_tokens=self._skip_special_tokens)
        return text.encode()


class ByteLevelDecoder:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): a text is the UTF-8 of the joined bytes of its tokens.

    A character may be spread over tokens, so the window is the ids that hold the bytes of an incomplete character: at
    most 3, and mostly none. A window may begin inside an earlier character; that cannot be seen in a chunk's text,
    since the first byte of a character always starts a new one. Work is done on bytes, not through the Rust decoder:
    decoding invalid UTF-8 incrementally is exactly what Python's decoder does, and it replaces the same sequences as
    Rust's.
    """

    incremental = True

    def __init__(self, backend: RustTokenizer, skip_special_tokens: bool) -> None:
        self._bytes = _BytesTable(backend, _skipped_tokens(backend, skip_special_tokens))

    def chunk_text(self, window: Sequence[int], new: Sequence[int], final: bool) -> str:
        table = self._bytes
        before = b"".join([table[token_id] for token_id in window])
        text: str = utf_8_decode(before + b"".join([table[token_id] for token_id in new]), "replace", final)[0]
        return text[len(utf_8_decode(before, "replace", False)[0]) :] if before else text

    def next_window(self, window: Sequence[int], new: Sequence[int]) -> list[int]:
        table = self._bytes
        kept: list[int] = []
        tail = b""
        for token_id in (*window, *new)[::-1]:
            if piece := table[token_id]:
                kept.append(token_id)
                tail = piece + tail
                if len(tail) >= 3 or tail[-1] < 0x80:
                    break
        pending = len(tail) - utf_8_decode(tail, "replace", False)[1]
        if not pending:
            return []
        size = 0
        for count, token_id in enumerate(kept, start=1):
            size += len(table[token_id])
            if size >= pending:
                return kept[count - 1 :: -1]
        return kept[::-1]

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]


class _BytesTable(dict[int, bytes]):
    """Id -> the bytes that it adds to a byte-level text, filled as ids come; b"" for skipped and unknown ids."""

    def __init__(self, backend: RustTokenizer, skipped: frozenset[str]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._byte_of = _byte_level_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # not kept: a client could fill the memory with ids that do not exist
        if token in self._skipped:
            piece = b""
        else:
            try:
                piece = bytes([self._byte_of[character] for character in token])
            except KeyError:  # an added token with characters outside the alphabet stands for itself
                piece = token.encode()
        self[token_id] = piece
        return piece


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map of printable characters to bytes: printable Latin-1 for itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class PieceDecoder:
    """SentencePiece and WordPiece: tokens that are pieces of text, perhaps with byte tokens, or a rule for the first.

    The state of an answer is whether the rule for its first token is used up, and the run of byte tokens at its end.
    So the window is `[anchor]` or `[]`, followed by that run; `anchor` is one fixed ordinary id. A run must be held
    back while it is valid UTF-8, since one wrong byte would turn all of it into U+FFFD, and the window grows with it.
    As soon as the run is broken all its bytes are settled, and 4 ids from where it broke stand for it. Cost of a chunk
    inside a valid run of n byte tokens: copying n ids.
    """

    incremental = True

    def __init__(
        self, backend: RustTokenizer, anchor: int, byte_fallback: bool, strips: bool, skip_special_tokens: bool
    ) -> None:
        """`strips`: the rule takes a leading character from the joined text, so that empty pieces do not use it up."""
        self._backend = backend
        self._anchor = anchor
        self._strips = strips
        self._skip_special_tokens = skip_special_tokens
        self._pieces = _PieceTable(backend, anchor, byte_fallback, _skipped_tokens(backend, skip_special_tokens))

    def chunk_text(self, window: Sequence[int], new: Sequence[int], final: bool) -> str:
        pieces = self._pieces
        if len(window) == 1 and window[0] == self._anchor:
            try:  # the common case, without Rust: after an ordinary piece, ordinary pieces add their own texts
                return "".join([pieces[token_id] for token_id in new])  # type: ignore[misc]
            except TypeError:  # a byte or a skipped token among them
                pass
        kept = [token_id for token_id in new if pieces[token_id] is not None]
        whole = [*window, *kept]
        sent = self._settled(window, [])
        settled = len(whole) if final else self._settled(window, kept)
        if settled == sent:
            return ""
        return self._decode(whole[:settled])[len(self._decode(whole[:sent])) :]

    def next_window(self, window: Sequence[int], new: Sequence[int]) -> list[int]:
        pieces = self._pieces
        head = self._head(window)
        if head and new and pieces[new[-1]].__class__ is str:
            return [self._anchor]
        kept = [token_id for token_id in new if pieces[token_id] is not None]
        run = kept[len(kept) - self._run_length(kept) :]
        held: Sequence[int] = window[head:]
        if closed := kept[: len(kept) - len(run)]:
            rule_used = head or held or not self._strips or any(pieces[token_id] != "" for token_id in closed)
            head = 1 if rule_used else 0
            held = ()
        if not self._is_open(held, run):
            held, run = (), self._first_broken([*held, *run])
        return [*([self._anchor] if head else ()), *held, *run]

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        return bytes([piece]) if isinstance(piece, int) else (piece or "").encode()

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=self._skip_special_tokens)
        return text

    def _head(self, window: Sequence[int]) -> int:
        return 1 if window and window[0] == self._anchor else 0

    def _settled(self, window: Sequence[int], kept: Sequence[int]) -> int:
        """How many of the ids `window + kept` have a text that no later id can change."""
        run = self._run_length(kept)
        held = window[self._head(window) :] if run == len(kept) else ()
        is_open = self._is_open(held, kept[len(kept) - run :])
        return len(window) + len(kept) - (len(held) + run if is_open else 0)

    def _run_length(self, kept: Sequence[int]) -> int:
        """Number of byte tokens at the end of `kept`."""
        for count, token_id in enumerate(reversed(kept)):
            if self._pieces[token_id].__class__ is not int:
                return count
        return len(kept)

    def _is_open(self, held: Sequence[int], run: Sequence[int]) -> bool:
        """Whether the run of byte tokens `held + run` may still become valid UTF-8; `held` is the run in a window."""
        # More than 4 held ids are a valid run, of which only an incomplete character at the end matters.
        start = self._values(held[-3:]).lstrip(_CONTINUATION_BYTES) if len(held) > 4 else self._values(held)
        try:
            utf_8_decode(start + self._values(run), "strict", False)
        except UnicodeDecodeError:
            return False
        return True

    def _first_broken(self, run: list[int]) -> list[int]:
        """The first 4 ids from where a broken run breaks: enough to be broken by themselves, whatever follows."""
        try:
            utf_8_decode(self._values(run), "strict", False)
        except UnicodeDecodeError as error:
            return run[error.start : error.start + 4]
        return run

    def _values(self, run: Sequence[int]) -> bytes:
        return bytes([self._pieces[token_id] for token_id in run])  # type: ignore[misc]


class _PieceTable(dict[int, str | int | None]):
    """Id -> the text that it adds after an ordinary piece; a byte token's value; None for skipped and unknown ids.

    Filled as ids come.
    """

    def __init__(self, backend: RustTokenizer, anchor: int, byte_fallback: bool, skipped: frozenset[str]) -> None:
        self._backend = backend
        self._anchor = anchor
        self._byte_fallback = byte_fallback
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | int | None:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return None  # not kept: a client could fill the memory with ids that do not exist
        piece: str | int | None
        if token in self._skipped:
            piece = None
        elif self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            piece = int(match[1], 16)
        else:
            before, text = (self._backend.decode(ids, False) for ids in ([self._anchor], [self._anchor, token_id]))
            piece = text[len(before) :]
        self[token_id] = piece
        return piece


def _find_anchor(backend: RustTokenizer, byte_fallback: bool, skipped: frozenset[str]) -> int | None:
    """The first id of an ordinary token with a text; None in a vocabulary that has none."""
    for token_id in range(backend.get_vocab_size()):
        token = backend.id_to_token(token_id)
        is_byte = token is not None and byte_fallback and _BYTE_TOKEN.fullmatch(token)
        if token is not None and token not in skipped and not is_byte and backend.decode([token_id], False):
            return token_id
    return None
