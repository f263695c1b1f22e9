"""Streams whose answers are known: a lost, doubled, swapped or foreign chunk shows, whatever happens to the server.

The synthetic engine's greedy answer is its prompt over and over, so the client can say what every stream must bring.
Streams are cancelled at random points, and their lengths are random. Each ends in exactly one of the ways of `Tally`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from roundhouse.bench.scenario import NEVER_ENDS
from roundhouse.text.tokenizer import Tokenizer

CHANNELS = 4  # connections that the streams share
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAUSE_SECONDS = 0.05  # of a client after an error: a server that is down is not to be flooded


@dataclass(frozen=True)
class Mix:
    """Attributes:
    clients: streams at the same time. cancelled, unary: shares of the streams.
    tokens: shortest and longest answer. patience: seconds without a response after which a stream counts as hanging.
    """

    clients: int = 32
    models: tuple[str, ...] = ("tensorrt_llm_bls", "ensemble")
    cancelled: float = 0.2
    unary: float = 0.2
    tokens: tuple[int, int] = (1, 40)
    patience: float = 20.0
    seed: int = 1


@dataclass
class Tally:
    """How streams ended. All of them but `finished`, `cancelled` and `failed` are faults of the server.

    Attributes:
        failed: with an error; what came before it was right. errors: their texts, cut short.
        wrong: text that is not the beginning of the answer. silent: an end without error or reason, or a short one.
        late: a response behind the last one. hanging: nothing came for `patience` seconds.
    """

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    wrong: int = 0
    silent: int = 0
    late: int = 0
    hanging: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)  # of faults

    @property
    def streams(self) -> int:
        return self.finished + self.cancelled + self.failed + self.faults

    @property
    def faults(self) -> int:
        return self.wrong + self.silent + self.late + self.hanging


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and all that its answer may be."""

    id: str
    model: str
    prompt: str
    tokens: int
    stream: bool
    answer: str
    cancel_after: int | None  # responses


class Examiner:
    """Makes questions with the tokenizer of the served model, and puts them."""

    def __init__(self, address: str, tokenizer: Tokenizer, mix: Mix) -> None:
        self._address = address
        self._tokenizer = tokenizer
        self._mix = mix
        self._numbers = itertools.count()
        self.tally = Tally()

    def question(self, number: int) -> Question:
        """The same for the same number, and unlike that of every other."""
        chance = random.Random(f"{self._mix.seed} {number}")
        words = ("".join(chance.choices(LETTERS, k=chance.randint(1, 8))) for _ in range(chance.randint(0, 6)))
        prompt = f"{number} {' '.join(words)}"
        ids = self._tokenizer.encode(prompt, True)
        tokens = chance.randint(*self._mix.tokens)
        answer = self._tokenizer.decode([ids[index % len(ids)] for index in range(tokens)], True)
        stream = chance.random() >= self._mix.unary
        cancels = chance.random() < self._mix.cancelled
        return Question(
            f"q{number}",
            self._mix.models[number % len(self._mix.models)],
            prompt,
            tokens,
            stream,
            answer,
            chance.randint(0, tokens) if cancels else None,
        )

    async def run(self, going_on: Callable[[], bool]) -> Tally:
        """Keep `clients` streams open while `going_on()`; the open ones are then waited for."""
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        channels = [
            grpc.aio.insecure_channel(
                self._address,
                options=[("roundhouse.channel", number), ("grpc.max_reconnect_backoff_ms", 500)],
            )
            for number in range(CHANNELS)
        ]
        stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]

        async def client(stub: Any) -> None:
            while going_on():
                if not await self.ask(stub, self.question(next(self._numbers))):
                    await asyncio.sleep(PAUSE_SECONDS)

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._mix.clients):
                    group.create_task(client(stubs[number % CHANNELS]))
        finally:
            for channel in channels:
                await channel.close()
        return self.tally

    async def ask(self, stub: Any, question: Question) -> bool:
        """Put one question and book how it ended. Returns whether without an error."""
        import grpc

        ended = asyncio.Event()
        call = stub.ModelStreamInfer(_until(ended, _request(question)))
        text, reason, responses = "", "", 0
        try:
            while True:
                if question.cancel_after is not None and responses >= question.cancel_after:
                    self.tally.cancelled += 1
                    return True
                message = await asyncio.wait_for(call.read(), self._mix.patience)
                if message is grpc.aio.EOF:
                    return self._book(question, "silent", f"ended after {text!r}")
                if message.error_message:
                    ended.set()
                    await asyncio.wait_for(call.read(), self._mix.patience)
                    return self._fail(question, text, message.error_message)
                response = message.infer_response
                found = _texts(response)
                if response.id != question.id:
                    return self._book(question, "wrong", f"got a response to {response.id}")
                if found and reason:
                    return self._book(question, "late", f"then {found}")
                responses += bool(found)
                text += found.get("text_output", "")
                reason = found.get("finish_reason", reason)
                if not question.answer.startswith(text):
                    return self._book(question, "wrong", f"got {text!r}")
                if response.parameters["triton_final_response"].bool_param:
                    ended.set()
                    if await asyncio.wait_for(call.read(), self._mix.patience) is not grpc.aio.EOF:
                        return self._book(question, "late", "more after the final response")
                    return self._end(question, text, reason)
        except TimeoutError:
            return self._book(question, "hanging", f"after {text!r}")
        except grpc.aio.AioRpcError as error:
            return self._fail(question, text, f"{error.code().name}: {error.details()}")
        finally:
            call.cancel()
            ended.set()

    def _end(self, question: Question, text: str, reason: str) -> bool:
        if text != question.answer or reason != "length":
            return self._book(question, "silent", f"ended with reason {reason!r} after {text!r}")
        self.tally.finished += 1
        self.tally.tokens += question.tokens
        return True

    def _fail(self, question: Question, text: str, error: str) -> bool:
        if not question.answer.startswith(text):
            return self._book(question, "wrong", f"got {text!r} before the error {error}")
        self.tally.failed += 1
        self.tally.errors[error[:120]] += 1
        return False

    def _book(self, question: Question, fault: str, what: str) -> bool:
        setattr(self.tally, fault, getattr(self.tally, fault) + 1)
        if len(self.tally.examples) < 20:
            self.tally.examples.append(f"{fault}: {question} {what}")
        return False


def for_seconds(seconds: float) -> Callable[[], bool]:
    ends = time.monotonic() + seconds
    return lambda: time.monotonic() < ends


async def _until(ended: asyncio.Event, request: Any) -> Any:
    """The request, with the sending side left open until then: a closed one is not a client that goes away."""
    yield request
    await ended.wait()


def _request(question: Question) -> Any:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=question.model, id=question.id)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, datatype, raw in _tensors(question):
        message.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        message.raw_input_contents.append(raw)
    return message


def _tensors(question: Question) -> Iterator[tuple[str, str, bytes]]:
    prompt = question.prompt.encode()
    yield "text_input", "BYTES", len(prompt).to_bytes(4, "little") + prompt
    yield "max_tokens", "INT32", question.tokens.to_bytes(4, "little")
    yield "end_id", "INT32", NEVER_ENDS.to_bytes(4, "little")
    yield "stream", "BOOL", bytes([question.stream])
    yield "exclude_input_in_output", "BOOL", b"\x01"


def _texts(response: Any) -> dict[str, str]:
    """The strings of a response by tensor name."""
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {output.name: raw[4:].decode() for output, raw in pairs if output.datatype == "BYTES"}
