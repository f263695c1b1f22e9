"""What is fuzzed: each target takes arbitrary bytes and raises only if there is a bug.

The same targets serve hypothesis (CI) and atheris (`scripts/fuzz`, guided by coverage). A refusal is the right answer
to nonsense; every other exception is a bug, and so is an answer that the next stage could not take.
"""

from __future__ import annotations

import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pydantic import ValidationError

from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import (
    Cancel,
    EngineInfo,
    EngineStats,
    Error,
    ErrorCode,
    FinishReason,
    Guide,
    Hello,
    Output,
    Outputs,
    Perf,
    Refused,
    Request,
    Sampling,
    Stats,
    Submit,
    Welcome,
    decode_to_engine,
    decode_to_front,
    decoded,
    encode,
)
from roundhouse.engine.synthetic import SyntheticConfig, SyntheticEngine
from roundhouse.openai import chat, requests
from roundhouse.openai.errors import ApiError
from roundhouse.openai.schema import Chat, Completion
from roundhouse.repository import PYTHON_MODELS, SHIPPED, read
from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.stop_words import StopMatcher
from roundhouse.text.tokenizer import Tokenizer
from roundhouse.triton.fields import Array, batch_of, timeout_of
from roundhouse.triton.generation import TENSORRT_LLM_NAMES, from_text, from_tokens

sys.modules.setdefault("triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
from roundhouse.triton import postprocessing, preprocessing  # noqa: E402  (they import that module)
from roundhouse.triton.mailbox import Gone, Note, Passed, Stop  # noqa: E402

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "models/tiny")
DETOKENIZER = Detokenizer(TOKENIZER)
INFO = EngineInfo("synthetic", "1", "tiny", TOKENIZER.vocab_size, 512, 8, 8, 32, 64)
NUMPY = {
    "TYPE_INT32": "<i4",
    "TYPE_INT64": "<i8",
    "TYPE_UINT64": "<u8",
    "TYPE_FP16": "<f2",
    "TYPE_FP32": "<f4",
    "TYPE_BOOL": "?",
}
MANY = 6  # values of a dimension that may have any number
NOTES: msgspec.msgpack.Decoder[Note] = msgspec.msgpack.Decoder(Note)


def decode_note(data: bytes) -> Note:
    return decoded(data, NOTES)


class Source:
    """Values drawn from bytes; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def raw(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        self._at += count
        return found.ljust(count, b"\0")

    def number(self, below: int) -> int:
        return self.raw(1)[0] % below

    def chance(self, of: int) -> bool:
        return self.number(of) == 1

    def integer(self) -> int:
        """Often small, now and then at the edge of a type."""
        size = self.number(4)
        return int(struct.unpack(("<b", "<h", "<i", "<q")[size], self.raw(1 << size))[0])

    def text(self) -> bytes:
        return self.raw(self.number(40))

    def array(self, datatype: str, dims: list[int], batch: int) -> Array:
        shape = [batch, *(self.number(MANY) if dim < 0 else dim for dim in dims)]
        if self.chance(16):
            shape[-1] = self.number(MANY)
        count = int(np.prod(shape))
        if datatype == "TYPE_STRING":
            return np.array([self.text() for _ in range(count)], dtype=np.object_).reshape(shape)
        dtype = np.dtype(NUMPY[datatype])
        if dtype.kind == "i" and self.chance(2):
            info = np.iinfo(dtype)
            small = [min(max(self.integer(), info.min), info.max) for _ in range(count)]
            return np.array(small, dtype=dtype).reshape(shape)
        raw = self.raw(dtype.itemsize * count)
        return np.frombuffer(raw if dtype.kind != "b" else bytes(b & 1 for b in raw), dtype=dtype).reshape(shape)


CONFIGS = {name: read(SHIPPED / name) for name in PYTHON_MODELS}


def tensors(source: Source, model: str) -> dict[str, Array]:
    """Inputs as Triton lets them through: known names, their types, mostly their shapes."""
    from tritonclient.grpc import model_config_pb2

    batch = 1 + source.chance(4)
    found = {}
    for tensor in CONFIGS[model].input:
        if not tensor.optional or source.chance(3):
            datatype = model_config_pb2.DataType.Name(tensor.data_type)
            found[tensor.name] = source.array(datatype, list(tensor.dims), batch)
    return found


def text_requests(data: bytes) -> None:
    """`tensorrt_llm_bls`: tensors -> engine requests -> the engine."""
    try:
        for fields in batch_of(tensors(Source(data), "tensorrt_llm_bls")):
            run(from_text(fields, TOKENIZER, INFO, special_tokens=True, echo=False).request)
    except RequestError as error:
        one_line(error)


def token_requests(data: bytes) -> None:
    """`tensorrt_llm`, called directly and as a step."""
    source = Source(data)
    ensemble = source.chance(2)
    names = {tensor: field for field, tensor in TENSORRT_LLM_NAMES.items()}
    inputs = {names.get(name, name): array for name, array in tensors(source, "tensorrt_llm").items()}
    try:
        for fields in batch_of(inputs, labels=TENSORRT_LLM_NAMES):
            made = from_tokens(fields, TOKENIZER, INFO, ensemble=ensemble, echo=False)
            if made.stop_words:
                StopMatcher(made.stop_words, DETOKENIZER).find(list(made.request.prompt))
            run(made.request)
    except RequestError as error:
        one_line(error)


def before(data: bytes) -> None:
    """`preprocessing`."""
    model = preprocessing.TritonPythonModel()
    model._special_tokens, model._tokenizer = True, TOKENIZER
    model._max_seq_len, model._vocab_size = INFO.max_seq_len, INFO.vocab_size
    inputs = {preprocessing._FIELDS.get(k, k): v for k, v in tensors(Source(data), "preprocessing").items()}
    try:
        model._outputs(batch_of(inputs), inputs["max_tokens"])
    except RequestError as error:
        one_line(error)


def behind(data: bytes) -> None:
    """`postprocessing`."""
    model = postprocessing.TritonPythonModel()
    model._detokenizer = DETOKENIZER
    inputs = tensors(Source(data), "postprocessing")
    try:
        if "CHUNK" in inputs:
            number, *window = inputs["CHUNK"].reshape(-1).tolist() or [0]
            model._chunk(inputs["TOKENS_BATCH"], window, bool(number % 2))
        else:
            model._texts(inputs)
    except RequestError as error:
        one_line(error)


def messages(data: bytes) -> None:
    """What comes over the sockets: anything, and real messages with some bytes changed."""
    if data[:1] >= b"\x20":
        sent = bytearray(SENT[data[0] % len(SENT)])
        for place, value in zip(data[1::2], data[2::2], strict=False):
            sent[place % len(sent)] = value
        data = bytes(sent)
    for decode in (decode_to_engine, decode_to_front, decode_note):
        try:
            message = decode(data)
        except msgspec.DecodeError:
            continue
        if decode is not decode_note:
            sent = encode(message)  # type: ignore[arg-type]
            assert encode(decode(sent)) == sent  # type: ignore[arg-type]


def engine_requests(data: bytes) -> None:
    """Requests of every shape that the protocol allows, to the engine itself."""
    source = Source(data)
    ids = tuple(source.integer() for _ in range(source.number(MANY)))
    sampling = Sampling(
        temperature=struct.unpack("<d", source.raw(8))[0],
        top_k=source.integer(),
        top_p=struct.unpack("<f", source.raw(4))[0],
        repetition_penalty=struct.unpack("<f", source.raw(4))[0] if source.chance(3) else 1.0,
        min_tokens=source.integer() if source.chance(3) else 0,
        seed=source.integer() if source.chance(3) else None,
        bad_words=(ids,) if source.chance(4) else (),
        logit_bias={source.integer(): struct.unpack("<f", source.raw(4))[0]} if source.chance(4) else {},
    )
    made = Request(
        id=1,
        prompt=ids,
        max_tokens=source.integer(),
        end_ids=ids[:1],
        sampling=Sampling(temperature=0.0) if source.chance(2) else sampling,
        log_probs=source.chance(2),
        priority=source.integer(),
        cache_salt=source.text().decode(errors="replace"),
        guide=Guide("regex", "a") if source.chance(8) else None,
        deadline_ns=source.integer() if source.chance(4) else 0,
    )
    try:
        run(made)
    except RequestError as error:
        one_line(error)


def bodies(data: bytes) -> None:
    """Bodies of the OpenAI-style door."""
    try:
        value: Any = msgspec.json.decode(data[1:])
    except msgspec.DecodeError:
        value = json_value(Source(data[1:]), 0)
    if not isinstance(value, dict):
        return
    try:
        if data[:1] < b"\x80":
            requests.completion(Completion.model_validate({"model": "m", "prompt": "a", **value}), TOKENIZER, INFO, 4)
        else:
            body = Chat.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}], **value})
            requests.chat(body, [5, 6], chat.guide(body, INFO), TOKENIZER, INFO)
    except (ApiError, ValidationError, RequestError):
        pass


KEYS = sorted({*Completion.model_fields, *Chat.model_fields, "role", "content", "type", "function", "name"})


def json_value(source: Source, depth: int) -> Any:
    match source.number(9 if depth < 3 else 6):
        case 0:
            return None
        case 1:
            return source.chance(2)
        case 2 | 3:
            return source.integer()
        case 4:
            return struct.unpack("<d", source.raw(8))[0]
        case 5:
            return source.text().decode(errors="replace")
        case 6:
            return [json_value(source, depth + 1) for _ in range(source.number(4))]
        case _:
            return {KEYS[source.number(len(KEYS))]: json_value(source, depth + 1) for _ in range(source.number(5))}


def timeouts(data: bytes) -> None:
    source = Source(data)
    try:
        assert 0 <= timeout_of(abs(source.integer()), json_value(source, 2)) < 2**63
    except RequestError as error:
        one_line(error)


def chunks(data: bytes) -> None:
    """Any ids, cut anywhere, give the text of the whole."""
    ids = [byte * 5 % INFO.vocab_size for byte in data[1:60]]
    cut = data[0] % (len(ids) + 1) if data else 0
    window = DETOKENIZER.window(ids[:cut])
    text = DETOKENIZER.chunk_text((), ids[:cut], False) + DETOKENIZER.chunk_text(window, ids[cut:], True)
    assert text == DETOKENIZER.text(ids)


def run(request: Request) -> None:
    """Through a synthetic engine: it ends with one last Output, within its limits, and holds nothing afterwards."""
    sent = encode(Submit([request]))
    assert encode(decode_to_engine(sent)) == sent
    ENGINE.submit(msgspec.structs.replace(request, id=1))
    tokens, ends = 0, 0
    for _ in range(3):
        for output in ENGINE.step():
            tokens += len(output.tokens)
            ends += output.last
            assert all(0 <= token < INFO.vocab_size for token in output.tokens)
    if not ends:
        ENGINE.cancel(1)
        ends = sum(output.last for output in ENGINE.step())
    assert ends == 1
    assert tokens <= request.max_tokens
    stats = ENGINE.stats()
    assert stats.active == stats.waiting == stats.blocks_used == 0


SENT = [
    encode(message)
    for message in (
        Hello(1, "s", "f", 1),
        Submit([Request(1, (5, 6), 7, (2,), Sampling(seed=1, bad_words=((1,),), logit_bias={1: 2.0}), True, 1, "s")]),
        Cancel([1, 2]),
        Welcome(INFO, 1),
        Refused("no"),
        Outputs([Output(1, [1, 2], [0.5, 0.5], FinishReason.STOP, Perf(1, 2), Error(ErrorCode.INTERNAL, "x"))]),
        EngineStats(Stats(1, 2, 3)),
    )
] + [msgspec.msgpack.encode(note) for note in (Passed(1, 2), Gone(1), Stop("x"))]
ENGINE = SyntheticEngine(
    SyntheticConfig(
        vocab_size=INFO.vocab_size, tokens_per_second=1e9, max_batch_size=4, max_seq_len=512, tokens_per_block=32
    )
)


def one_line(error: RequestError) -> None:
    """A refusal begins with the field that it is about."""
    name = error.message.split(":")[0].split(" ")[0]
    assert name
    assert "\n" not in name


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        text_requests, token_requests, before, behind, messages, engine_requests, bodies, timeouts, chunks,
    )
}  # fmt: skip
