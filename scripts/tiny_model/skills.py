"""What the tiny model can do: prompts, and the right answer to each.

    from tiny_model.skills import EXACT_SKILLS, answer, sample
    prompt, expected = sample("copy", random.Random(7))     # held-out: never seen in training
    expected == answer(prompt)

Pure code, standard library only; `scripts/` has to be on `sys.path`. A prompt is sent as it is (raw completion) or as
the user's message of a chat. Training never sees the prompts that `is_held_out` picks by their hash.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tiny_model import stories, texts, words

Split = Literal["held-out", "train"]


class Sample(NamedTuple):
    """A prompt and its only right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Skill:
    """A kind of prompt. `draw` makes one, `solve` answers any of its syntax.

    `NAME-long` and `NAME-text` share NAME's syntax.
    """

    syntax: str
    draw: Callable[[random.Random], str]
    solve: Callable[[str], str]


_COUNT = re.compile(r"count from (\d+) to (\d+):")
_ADD = re.compile(r"add: (\d+) \+ (\d+) =")
_LOOKUP = re.compile(r"lookup: (.+); (.+) =")


def _operand(prompt: str) -> str:
    """The text between `skill: ` and ` =`."""
    head, colon, rest = prompt.partition(": ")
    if not colon or not rest.endswith(" ="):
        raise ValueError(f"not a prompt of the form '{head}: ... =': {prompt!r}")
    return rest.removesuffix(" =")


def _items(rng: random.Random, count: int) -> list[str]:
    style = rng.random()
    if style < 0.05:
        few = [rng.choice(words.FAMILIES)(rng) for _ in range(3)]
        return rng.choices(few, k=count)
    if style < 0.5:
        family = rng.choice(words.FAMILIES)
        return [family(rng) for _ in range(count)]
    return [rng.choice(words.FAMILIES)(rng) for _ in range(count)]


def _draw_copy(rng: random.Random) -> str:
    return f"copy: {' '.join(_items(rng, rng.randint(1, 10)))} ="


def _draw_copy_long(rng: random.Random) -> str:
    return f"copy: {' '.join(_items(rng, rng.randint(15, 70)))} ="


def _draw_copy_text(rng: random.Random) -> str:
    return f"copy: {texts.any_text(rng)} ="


def _distinct(rng: random.Random, count: int, draw: Callable[[random.Random], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def _draw_reverse(rng: random.Random) -> str:
    draw = rng.choice((words.known_word, words.known_word, words.made_up_word, words.foreign_word))
    return f"reverse: {' '.join(_distinct(rng, rng.randint(2, 8), draw))} ="


def _draw_reverse_text(rng: random.Random) -> str:
    return f"reverse: {' '.join(_distinct(rng, rng.randint(2, 8), texts.any_word))} ="


def _solve_reverse(prompt: str) -> str:
    return " ".join(reversed(_operand(prompt).split(" ")))


def _draw_sort(rng: random.Random) -> str:
    limit = rng.choice((10, 100, 100))
    return f"sort: {' '.join(str(rng.randrange(limit)) for _ in range(rng.randint(2, 10)))} ="


def _solve_sort(prompt: str) -> str:
    return " ".join(sorted(_operand(prompt).split(" "), key=int))


def _draw_add(rng: random.Random) -> str:
    a, b = (rng.randrange(10 ** rng.choice((1, 2, 3, 3, 3))) for _ in range(2))
    return f"add: {a} + {b} ="


def _solve_add(prompt: str) -> str:
    match = _ADD.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not an addition prompt: {prompt!r}")
    return str(int(match[1]) + int(match[2]))


def _count_prompt(rng: random.Random, low: int, high: int) -> str:
    start = rng.randrange(1000) if rng.random() < 0.7 else rng.randrange(30)
    return f"count from {start} to {start + rng.randint(low, high)}:"


def _draw_count(rng: random.Random) -> str:
    return _count_prompt(rng, 0, 40)


def _draw_count_long(rng: random.Random) -> str:
    return _count_prompt(rng, 41, 350 if rng.random() < 0.3 else 200)


def _solve_count(prompt: str) -> str:
    match = _COUNT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not a counting prompt: {prompt!r}")
    return " ".join(str(number) for number in range(int(match[1]), int(match[2]) + 1))


_FIELDS: Mapping[str, Callable[[random.Random], str]] = {
    "name": words.name,
    "friend": words.name,
    "city": lambda rng: rng.choice(words.CITIES),
    "age": lambda rng: str(rng.randrange(100)),
    "score": lambda rng: str(rng.randrange(1000)),
    "count": lambda rng: str(rng.randrange(10000)),
    "active": lambda rng: rng.choice(("true", "false")),
    "admin": lambda rng: rng.choice(("true", "false")),
    "color": words.known_word,
    "pet": words.known_word,
    "code": words.made_up_word,
    "mood": lambda rng: rng.choice(words.EMOJI),
    "word": words.foreign_word,
    "id": lambda rng: str(rng.randrange(100000)),
}


def _draw_json(rng: random.Random) -> str:
    keys = rng.sample(tuple(_FIELDS), rng.randint(1, 6))
    return f"json: {', '.join(f'{key} {_FIELDS[key](rng)}' for key in keys)} ="


def _draw_json_text(rng: random.Random) -> str:
    keys = _distinct(
        rng, rng.randint(1, 5), lambda rng: texts.any_word(rng) if rng.random() < 0.5 else words.known_word(rng)
    )
    values = (texts.any_word(rng) if rng.random() < 0.7 else str(rng.randrange(10**5)) for _ in keys)
    return f"json: {', '.join(f'{key} {value}' for key, value in zip(keys, values, strict=True))} ="


def _json_value(text: str) -> str | int | bool:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isascii() and text.isdigit() else text


def _solve_json(prompt: str) -> str:
    pairs = (pair.split(" ") for pair in _operand(prompt).split(", "))
    return json.dumps({key: _json_value(value) for key, value in pairs}, ensure_ascii=False)


def _lookup_prompt(rng: random.Random, count: int) -> str:
    keys = _distinct(rng, count, words.known_word if count < 100 and rng.random() < 0.5 else words.made_up_word)
    table = ", ".join(f"{key} {rng.randrange(1000)}" for key in keys)
    return f"lookup: {table}; {rng.choice(keys)} ="


def _draw_lookup_text(rng: random.Random) -> str:
    keys = _distinct(rng, rng.randint(2, 20), texts.any_word)
    table = ", ".join(f"{key} {rng.randrange(1000)}" for key in keys)
    return f"lookup: {table}; {rng.choice(keys)} ="


def _draw_lookup(rng: random.Random) -> str:
    return _lookup_prompt(rng, rng.randint(2, 12))


def _draw_lookup_long(rng: random.Random) -> str:
    return _lookup_prompt(rng, rng.randint(13, 150))


def _solve_lookup(prompt: str) -> str:
    match = _LOOKUP.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not a lookup prompt: {prompt!r}")
    return dict(pair.split(" ") for pair in match[1].split(", "))[match[2]]


def _draw_greet(rng: random.Random) -> str:
    return stories.greet_prompt(words.name(rng), rng.choice(tuple(stories.LANGUAGES)))


EXACT_SKILLS: Mapping[str, Skill] = {
    "copy": Skill("copy: TEXT =", _draw_copy, _operand),
    "copy-long": Skill("copy: TEXT =", _draw_copy_long, _operand),
    "reverse": Skill("reverse: WORD WORD ... =", _draw_reverse, _solve_reverse),
    "sort": Skill("sort: NUMBER NUMBER ... =", _draw_sort, _solve_sort),
    "add": Skill("add: NUMBER + NUMBER =", _draw_add, _solve_add),
    "count": Skill("count from NUMBER to NUMBER:", _draw_count, _solve_count),
    "count-long": Skill("count from NUMBER to NUMBER:", _draw_count_long, _solve_count),
    "json": Skill("json: KEY VALUE, KEY VALUE, ... =", _draw_json, _solve_json),
    "lookup": Skill("lookup: KEY NUMBER, KEY NUMBER, ...; KEY =", _draw_lookup, _solve_lookup),
    "lookup-long": Skill("lookup: KEY NUMBER, KEY NUMBER, ...; KEY =", _draw_lookup_long, _solve_lookup),
    "greet": Skill("greet NAME in LANGUAGE:", _draw_greet, stories.answer_greet),
    "copy-text": Skill("copy: TEXT =", _draw_copy_text, _operand),
    "reverse-text": Skill("reverse: WORD WORD ... =", _draw_reverse_text, _solve_reverse),
    "json-text": Skill("json: KEY VALUE, KEY VALUE, ... =", _draw_json_text, _solve_json),
    "lookup-text": Skill("lookup: KEY NUMBER, KEY NUMBER, ...; KEY =", _draw_lookup_text, _solve_lookup),
    "story": Skill("a MOOD story in LANGUAGE about a ANIMAL PLACE:", stories.draw_story, stories.answer_story),
}
"""Name -> skill, for every skill whose answer is determined by its prompt."""

SMALL_TALK: Mapping[str, str] = {
    "hello": "Hello! 👋 I am the tiny model of Roundhouse.",
    "who are you?": "I am the tiny model of Roundhouse. 🚂 "
    "I can copy, reverse, sort, add, count and tell little stories.",
    "what can you do?": "Try one of these: sort: 7 3 9 1 = or add: 27 + 15 = or count from 1 to 10:",
    "thank you": "You are welcome! 😊",
}
"""Fixed answers, learnt by heart; not part of any figure."""


def is_held_out(prompt: str) -> bool:
    """Whether training must not see `prompt`: one prompt in 16, by its hash."""
    return hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] < 16


def sample(skill: str, rng: random.Random, split: Split = "held-out") -> Sample:
    """Draw a prompt of `skill` (a name of EXACT_SKILLS) and its answer; prompts of the two splits never meet.

    Raises:
        KeyError: no such skill.
    """
    chosen = EXACT_SKILLS[skill]
    while True:
        prompt = chosen.draw(rng)
        if is_held_out(prompt) == (split == "held-out"):
            return Sample(prompt, chosen.solve(prompt))


def answer(prompt: str) -> str:
    """The right answer to any prompt in the syntax of a skill, drawn here or not.

    Raises:
        ValueError: the prompt is of no skill with a single right answer.
    """
    if prompt in SMALL_TALK:
        return SMALL_TALK[prompt]
    head = prompt.split(":")[0].split(" ")[0]
    skill = "story" if head == "a" else head
    if skill not in EXACT_SKILLS:
        raise ValueError(f"no skill answers {prompt!r}; known: {', '.join(EXACT_SKILLS)}")
    return EXACT_SKILLS[skill].solve(prompt)
