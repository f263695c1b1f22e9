"""Prompts with exactly as many tokens as asked for, by any tokenizer, made offline from a seed."""

from __future__ import annotations

import random
from bisect import bisect_left
from functools import cached_property
from itertools import accumulate
from typing import Protocol

WORDS = """able about across again almost along also always among another answer apple arrow autumn back basket beach
because become before began behind below bird blue board boat book bread bridge bring brown build butter cabin called
candle carry castle center change chair circle city clean clear cloud coast cold color common corner cotton country
course dance dark deep desk different door draw dream drop early earth east enough evening ever every face family farm
father field final find fire first flower follow forest found friend front garden gate given glass gold good grass great
green ground group half hand happy heart heavy high hill hold home horse house hundred idea inside island just keep
kitchen knife lake language large last later learn leave left letter light line list little long lucky machine make map
market meadow mean metal middle milk mind minute money moon morning mother mountain mouth move much music name narrow
near never night north note number ocean offer often old once open orange order other over page paint paper part path
pattern pencil people picture piece place plain plant point pond power press quick quiet rain reach read ready red rest
rice ring river road rock roof room round sail salt same sand school season second seed seven shape sharp sheep ship
short side silver simple sing sister sleep slow small snow soft song sound south space spring stand star start stone
store story street strong summer sun table tall teach tell thing third three thought through time today tool town trade
train travel tree trip true turn under until valley village visit voice wait walk wall warm watch water wave west wheel
white whole wide wild wind window winter wish wood word work world write yellow young zero"""
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
ROUNDS = 400  # corrections before giving up; two or three are the rule


class PromptError(Exception):
    """No such prompt can be made. The message says how many tokens were asked for, and why it cannot be."""


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...


class PromptMaker:
    """Makes texts of words.

    A word mostly costs the same tokens wherever it stands, so as many words as should be right are put together and
    counted; what the sum then lacks or has too much is corrected word by word, and counted again.
    """

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer

    def count(self, text: str) -> int:
        """Tokens of a prompt as the server counts them: those that the tokenizer adds (BOS) included."""
        return len(self._tokenizer.encode(text, True))

    def make(self, chance: random.Random, tokens: int, prefix: str = "") -> str:
        """A text that begins with `prefix` and has exactly `tokens` tokens. Raises PromptError."""
        base = self.count(prefix)
        if tokens < base or (tokens == base and not prefix):
            begins = f"its first {base} are given" if prefix else f"the tokenizer adds {base} of its own"
            raise PromptError(f"a prompt of {tokens} tokens cannot be made: {begins}")
        added = self._about(chance, tokens - base)
        for _ in range(ROUNDS):
            text = " ".join([prefix, *added] if prefix else added)
            lacking = tokens - self.count(text)
            if lacking == 0:
                return text
            if lacking > 0:
                added += self._about(chance, lacking)
            else:  # a few words too many; now and then one more, to get out of a dead end
                drop = max(1, -lacking // self._dearest) + (chance.random() < 0.1)
                del added[max(0, len(added) - drop) :]
        raise PromptError(f"a prompt of {tokens} tokens cannot be made: this tokenizer's words do not add up to it")

    def _about(self, chance: random.Random, tokens: int) -> list[str]:
        """Words that should cost `tokens`; the last one fits what is left, if there is such a word."""
        words: list[str] = []
        while tokens > 0:
            usable = self._by_cost[: bisect_left(self._costs, tokens + 1)] or self._by_cost[:1]
            if tokens <= self._dearest:
                usable = [pair for pair in usable if pair[0] == tokens] or usable
            cost, word = chance.choice(usable)
            words.append(word)
            tokens -= max(cost, 1)
        return words

    @cached_property
    def _by_cost(self) -> list[tuple[int, str]]:
        """(tokens that a word adds to a text, word), cheapest first. Letters are for tokenizers that know no word."""
        words = WORDS.split()
        base = self.count("the")
        counts = [len(ids) for ids in self._tokenizer.encode_batch([f"the {word}" for word in words], True)]
        pairs = sorted((max(count - base, 1), word) for count, word in zip(counts, words, strict=True))
        if pairs[0][0] > 1:
            counts = [len(ids) for ids in self._tokenizer.encode_batch([f"the {letter}" for letter in LETTERS], True)]
            letters = [(max(count - base, 1), letter) for count, letter in zip(counts, LETTERS, strict=True)]
            pairs = sorted(letters + pairs)
        return pairs

    @cached_property
    def _costs(self) -> list[int]:
        return [cost for cost, _ in self._by_cost]

    @cached_property
    def _dearest(self) -> int:
        return max(accumulate(self._costs, max))
