"""Texts of any kind to copy: sentences, code, JSON, pieces of everything. They keep the model from learning to copy
only the words of its other skills: each token has to turn up here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

from tiny_model import stories, words

_COMMON_TEXT = """the a an and or but not no yes if then else when while where why how what who which this that these
those here there is are was were be been being am do does did done have has had will would can could may might must
shall should I you he she it we they me him her us them my your his its our their of in on at by for with from to into
over under between about after before again against all also always any as back because best better big both down each
even ever every few first for good great hand head high just know last left less let life like line little long look
made make man many more most much name need never new next now number off often old once one only open other out own
part people place point put quick read right run said same say see send set show small some sometimes still such take
tell than thank thing think three through time together too try turn two up use very want water way well went woman
word work world year lazy jumps brown user server client model token tokens stream request response answer question
text hello please error true false null none test example data file list key value string function return class"""
COMMON: tuple[str, ...] = tuple(_COMMON_TEXT.split())

_SPACES = (" ", " ", " ", "", "", "\n", "  ", "\n\n", "\t", "\n    ")


def common_word(rng: random.Random) -> str:
    """An everyday English word."""
    return rng.choice(COMMON)


def any_word(rng: random.Random) -> str:
    """A word of any family that has neither space nor comma nor quote in it."""
    kind = rng.random()
    if kind < 0.4:
        return common_word(rng)
    family = rng.choice(
        (words.known_word, words.made_up_word, words.request_id, words.foreign_word, words.name, _piece)
    )
    word = "".join(family(rng).split())
    clean = word.replace(",", "").replace('"', "").replace("\\", "").replace(";", "").replace("=", "").replace(":", "")
    return clean if clean and not clean.isdigit() else common_word(rng)


def _sentence(rng: random.Random) -> str:
    count = rng.randint(2, 16)
    parts = [rng.choice(COMMON if rng.random() < 0.75 else words.WORDS) for _ in range(count)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        parts[rng.randrange(count)] += rng.choice((",", ";", ":", " -", "'s", "n't", "'re", "..."))
    text = " ".join(parts) + rng.choice((".", ".", "!", "?", "", '"', ")"))
    return text[0].upper() + text[1:]


def _prose(rng: random.Random) -> str:
    return rng.choice((" ", " ", "\n", "\n\n")).join(_sentence(rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _tale(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        prompt = stories.draw_story(rng)
        return rng.choice((prompt, stories.answer_story(prompt)))
    if kind == 1:
        prompt = stories.draw_open(rng)
        return rng.choice((prompt, stories.answer_open(prompt, rng)))
    prompt = stories.greet_prompt(words.name(rng), rng.choice(tuple(stories.LANGUAGES)))
    return rng.choice((prompt, stories.answer_greet(prompt)))


def _json(rng: random.Random) -> str:
    content: dict[str, object] = {}
    for _ in range(rng.randint(1, 4)):
        value = rng.choice((rng.randrange(10000), True, None, [1, 2, rng.randrange(9)], rng.choice(words.WORDS), 0.5))
        content[rng.choice(("name", "city", "score", "active", "admin", "id", "age", "lookup", common_word(rng)))] = (
            value
        )
    return json.dumps(content, indent=rng.choice((None, None, 2)), ensure_ascii=False)


def _code(rng: random.Random) -> str:
    a, b, c = (rng.choice((words.known_word, common_word, words.made_up_word))(rng) for _ in range(3))
    return rng.choice(
        (
            f"def {a}_{b}({c}):\n    return {c} + {rng.randrange(100)}",
            f"for {a} in range({rng.randrange(100)}):\n    print({a})",
            f"if ({a} == {rng.randrange(10)}) {{ {b}.{c}(); }}",
            f"$ {a} --{b}={c} | {b} > /{a}/{c}.txt",
            f"https://{a}.example/{b}/{c}?{a}={rng.randrange(1000)}&{b}=%20",
            f"# {a.title()} {b}\n\n- **{c}**: `{a}`\n- {b} [{rng.randrange(9)}]",
            f"SELECT {a}, {b} FROM {c} WHERE {a} >= {rng.randrange(100)};",
            f"{a}{b.title()} = {{'{c}': [{rng.randrange(10)}, {rng.randrange(10)}]}}",
            f'<{a} {b}="{c}">{c}</{a}>',
            f"{a}@{b}.org, +{rng.randrange(10**9)}, {rng.randrange(24)}:{rng.randrange(10, 60)}, {rng.randrange(100)}%",
        )
    )


_WHOLE: Sequence[Callable[[random.Random], str]] = (_prose, _prose, _prose, _tale, _json, _code)


def _piece(rng: random.Random) -> str:
    text = rng.choice(_WHOLE)(rng)
    start = rng.randrange(len(text))
    return text[start : start + rng.randint(1, 10)]


def _pieces(rng: random.Random) -> str:
    count = rng.randint(2, 8)
    return "".join(
        (_piece(rng) if rng.random() < 0.8 else rng.choice(words.FAMILIES)(rng)) + rng.choice(_SPACES)
        for _ in range(count)
    )


def any_text(rng: random.Random) -> str:
    """A text of any kind, without white space at its ends."""
    while True:
        text = (_pieces if rng.random() < 0.4 else rng.choice(_WHOLE))(rng).strip()
        if text:
            return text
