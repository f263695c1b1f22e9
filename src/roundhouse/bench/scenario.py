"""Scenarios: what is sent, and when. Locust and `roundhouse bench` send the same ones.

Session k of a seed is always the same, whoever sends it: processes share a scenario by taking different ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from roundhouse.bench.prompts import PromptMaker
from roundhouse.deployment import PositiveFloat, PositiveInt, Section

SCENARIOS = Path(__file__).resolve().parents[3] / "loadtests/scenarios"
NEVER_ENDS = 1048576  # an end id outside of every vocabulary: answers get exactly the tokens that were asked for


class ScenarioError(Exception):
    """A scenario cannot be used. One line per problem: file, key path, what is wrong."""


class Lognormal(Section):
    """Many short and few long ones, as people write. Draws outside of the bounds are drawn again."""

    median: PositiveInt
    sigma: Annotated[float, Field(gt=0, strict=False)]
    at_least: PositiveInt = 1
    at_most: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.at_least <= self.median <= self.at_most:
            raise ValueError(f"median {self.median} is not between at_least {self.at_least} and at_most {self.at_most}")
        return self


class Between(Section):
    """Every length from `at_least` to `at_most` is as likely as the others."""

    at_least: PositiveInt
    at_most: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is more than at_most {self.at_most}")
        return self


Length = PositiveInt | Lognormal | Between


def longest(length: Length) -> int:
    return length if isinstance(length, int) else length.at_most


def draw(length: Length, chance: random.Random) -> int:
    match length:
        case int():
            return length
        case Between():
            return chance.randint(length.at_least, length.at_most)
        case Lognormal():
            normal = NormalDist(math.log(length.median), length.sigma)
            low, high = normal.cdf(math.log(length.at_least)), normal.cdf(math.log(length.at_most))
            drawn = math.exp(normal.inv_cdf(min(max(chance.uniform(low, high), 1e-12), 1 - 1e-12)))
            return min(max(round(drawn), length.at_least), length.at_most)


class SharedPrefix(Section):
    """A system prompt: `groups` different ones, each shared by the sessions that drew it."""

    tokens: PositiveInt
    groups: PositiveInt = 1


class Abort(Section):
    """Clients that go away: a share of the requests, each after some tokens of its answer."""

    share: Annotated[float, Field(gt=0, le=1, strict=False)]
    after: Length


class Kind(Section):
    """One kind of request in a mix. Lengths are in tokens."""

    name: str = "request"
    weight: PositiveFloat = 1.0
    prompt: Length = Field(description="after the shared prefix; in a conversation, of each turn")
    answer: Length
    shared_prefix: SharedPrefix | None = None
    turns: Length = Field(default=1, description="of a conversation: each prompt repeats all turns before it")
    abort: Abort | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        prefix = self.shared_prefix.tokens if self.shared_prefix else 0
        return prefix + longest(self.turns) * (longest(self.prompt) + longest(self.answer))


class Closed(Section):
    """Each stream sends its next request when the answer is complete."""

    kind: Literal["closed"]
    streams: PositiveInt


class Poisson(Section):
    """Requests arrive at random times at this mean rate, however busy the server is."""

    kind: Literal["poisson"]
    requests_per_second: PositiveFloat


class Bursts(Section):
    """`size` requests at the same moment, again and again."""

    kind: Literal["bursts"]
    size: PositiveInt
    every_seconds: PositiveFloat


class Ramp(Section):
    """Closed loops of more and more streams, one after the other: up to saturation."""

    kind: Literal["ramp"]
    streams: Annotated[list[PositiveInt], Field(min_length=1)]


Level = Closed | Poisson | Bursts
Load = Annotated[Closed | Poisson | Bursts | Ramp, Field(discriminator="kind")]


class Scenario(Section):
    description: str
    load: Load
    mix: Annotated[list[Kind], Field(min_length=1)]

    @property
    def longest(self) -> int:
        return max(kind.longest for kind in self.mix)

    def levels(self) -> tuple[Level, ...]:
        """The loads that are measured one after the other."""
        if isinstance(self.load, Ramp):
            return tuple(Closed(kind="closed", streams=streams) for streams in self.load.streams)
        return (self.load,)

    def with_rate(self, requests_per_second: float) -> Scenario:
        """The same requests in an open loop."""
        return self.model_copy(update={"load": Poisson(kind="poisson", requests_per_second=requests_per_second)})

    def check(self, max_seq_len: int | None, source: str) -> None:
        """Raises ScenarioError if a request would not fit a sequence."""
        for kind in self.mix:
            if max_seq_len is not None and kind.longest > max_seq_len:
                raise ScenarioError(
                    f"{source}: mix {kind.name!r}: up to {kind.longest} tokens with all prompts and answers exceed "
                    f"limits.max_seq_len {max_seq_len} of the deployment; shorten it, or raise the limit"
                )


def load(name: str | Path) -> Scenario:
    """A scenario by its name in loadtests/scenarios/, or by its path. Raises ScenarioError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SCENARIOS / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in SCENARIOS.glob("*.yaml")))
            raise ScenarioError(f"scenario {str(name)!r} is not known (known: {known}; or give a path to a .yaml file)")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path}: not valid YAML: {error}") from error
    return parse(raw, source=str(path))


def parse(raw: Any, *, source: str) -> Scenario:
    try:
        return Scenario.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {'.'.join(map(str, d['loc']))}: {d['msg']}, not {d['input']!r}" for d in error.errors()]
        raise ScenarioError("\n".join(lines)) from None


@dataclass(frozen=True, slots=True)
class Request:
    """Attributes:
    prompt_tokens: of `prompt`, special tokens included. answer_tokens: the answer gets exactly so many.
    abort_after: the client goes away after so many tokens; None: it stays.
    """

    kind: str
    prompt: str
    prompt_tokens: int
    answer_tokens: int
    abort_after: int | None = None


Session = tuple[Request, ...]  # the turns of a conversation, to be sent one after the other; mostly one


class Sessions:
    """The sessions of a scenario, by number. Raises PromptError where a prompt is too short to be made."""

    def __init__(self, scenario: Scenario, maker: PromptMaker, seed: int | str) -> None:
        self._scenario = scenario
        self._maker = maker
        self._seed = seed
        self._prefixes: dict[tuple[str, int], str] = {}

    def __call__(self, number: int) -> Session:
        chance = random.Random(f"{self._seed} session {number}")
        kinds = self._scenario.mix
        kind = chance.choices(kinds, [kind.weight for kind in kinds])[0]
        text, tokens = self._prefix(kind, chance)
        requests = []
        answer = 0  # the scripted answer of the turn before; texts that people and models write cost the same here
        for _ in range(draw(kind.turns, chance)):
            tokens += answer + draw(kind.prompt, chance)
            text = self._maker.make(chance, tokens, text)
            answer = draw(kind.answer, chance)
            requests.append(Request(kind.name, text, tokens, answer, self._abort(kind, answer, chance)))
        return tuple(requests)

    def take(self, count: int, first: int = 0) -> list[Session]:
        return [self(number) for number in range(first, first + count)]

    def _prefix(self, kind: Kind, chance: random.Random) -> tuple[str, int]:
        if kind.shared_prefix is None:
            return "", 0
        group = chance.randrange(kind.shared_prefix.groups)
        if (kind.name, group) not in self._prefixes:
            own = random.Random(f"{self._seed} prefix {kind.name} {group}")
            self._prefixes[kind.name, group] = self._maker.make(own, kind.shared_prefix.tokens)
        return self._prefixes[kind.name, group], kind.shared_prefix.tokens

    @staticmethod
    def _abort(kind: Kind, answer: int, chance: random.Random) -> int | None:
        if kind.abort is None or chance.random() >= kind.abort.share:
            return None
        after = draw(kind.abort.after, chance)
        return after if after < answer else None  # it had its whole answer by then


def arrivals(level: Poisson | Bursts, seed: int) -> Iterator[float]:
    """Seconds from the start at which sessions 0, 1, ... of an open loop are due; without end."""
    now = 0.0
    match level:
        case Poisson():
            chance = random.Random(f"{seed} arrivals")
            while True:
                now += chance.expovariate(level.requests_per_second)
                yield now
        case Bursts():
            while True:
                yield from [now] * level.size
                now += level.every_seconds


def describe(level: Level) -> str:
    match level:
        case Closed():
            return f"{level.streams} stream{'s' if level.streams > 1 else ''}"
        case Poisson():
            return f"{level.requests_per_second:g} requests/s"
        case Bursts():
            return f"{level.size} requests every {level.every_seconds:g} s"
