"""The model `postprocessing`: token ids to text. The last step of the ensemble.

It keeps nothing between calls: the window that travels with each chunk of a stream is all that it needs to know. It
tells the front of each chunk that it got. So the front can bound what is on its way, and notice when Triton stops
passing chunks on because the client has gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from roundhouse.bugs import described
from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import Error, ErrorCode
from roundhouse.engine.runtime import runtime_dir
from roundhouse.text.detokenize import Detokenizer
from roundhouse.triton import backend
from roundhouse.triton.fields import Array, refuse
from roundhouse.triton.mailbox import Gone, Passed, Post
from roundhouse.triton.model import Settings

ASK_SECONDS = 0.3  # no stream is asked for more often,
ASKS_PER_SECOND = 100  # and all together no more often than this
MAX_ASKED = 10_000  # streams; those whose last chunk never came are forgotten beyond it
# Values of one call: some tenths of a second, for which all streams wait. Ids are more than any context has.
MOST = {"TOKENS_BATCH": 1 << 20, "SEQUENCE_LENGTH": 1 << 14, "CHUNK": 1 << 20}


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        settings = Settings(args)
        self._detokenizer = Detokenizer(settings.tokenizer(encodes=False), settings.flag("skip_special_tokens"))
        self._post = Post(runtime_dir(settings.server_pid))
        self._asked: dict[tuple[int, int], float] = {}  # front and stream -> when Triton was asked for its client
        self._next_ask = 0.0

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self._post.close()

    def _answer(self, request: Any) -> Any:
        try:
            tensors = backend.inputs(request)
            check_sizes(tensors)
            if "CHUNK" not in tensors:
                return backend.response({"OUTPUT": self._texts(tensors)})
            if tensors["CHUNK"].size < 4:
                refuse("CHUNK: is internal to the ensemble; leave it out")
            number, stream, index, last, *window = tensors["CHUNK"].reshape(-1).tolist()
            self._tell_front(request, number, stream, index, last)
            return backend.response({"OUTPUT": self._chunk(tensors["TOKENS_BATCH"], window, bool(last))})
        except RequestError as error:
            return backend.refusal(error.as_error())
        except Exception as error:
            backend.log_warning(f"unexpected error with a request: {described(error)}")
            return backend.refusal(Error(ErrorCode.INTERNAL, f"unexpected error: {error}"))

    def _tell_front(self, request: Any, number: int, stream: int, index: int, last: int) -> None:
        """That the chunk is here; and now and then, whether the client is gone.

        Asking takes as long as an answer: with 256 streams, each every 0.3 s, half of the time of this process went
        there. The front notices those that are not asked for by their silence.
        """
        self._post.send(number, Passed(stream, index))
        now = time.monotonic()
        if last:
            self._asked.pop((number, stream), None)
        elif now >= self._next_ask and now - self._asked.get((number, stream), 0.0) > ASK_SECONDS:
            self._next_ask = now + 1 / ASKS_PER_SECOND
            if len(self._asked) > MAX_ASKED:
                self._asked.clear()
            self._asked[number, stream] = now
            if request.is_cancelled():
                self._post.send(number, Gone(stream))
                self._asked.pop((number, stream), None)

    def _chunk(self, batch: Array, window: list[int], last: bool) -> Array:
        """STRING `[1]`: the text of one chunk of a stream."""
        ids = _counted("TOKENS_BATCH", batch.reshape(-1).tolist())
        return np.array([self._detokenizer.chunk_text(_counted("CHUNK", window), ids, last).encode()], dtype=np.object_)

    def _texts(self, tensors: Mapping[str, Array]) -> Array:
        """STRING `[B * beams]`: one text for each sequence."""
        batch, lengths = tensors["TOKENS_BATCH"], tensors["SEQUENCE_LENGTH"]
        if batch.ndim != 3 or lengths.shape != batch.shape[:2]:
            refuse(
                f"SEQUENCE_LENGTH: has shape {list(lengths.shape)}, TOKENS_BATCH has {list(batch.shape)}; "
                "they must be [B, beams] and [B, beams, length]"
            )
        rows = zip(batch.reshape(lengths.size, batch.shape[2]).tolist(), lengths.reshape(-1).tolist(), strict=True)
        return np.array([self._whole(ids, length).encode() for ids, length in rows], dtype=np.object_)

    def _whole(self, ids: list[int], length: int) -> str:
        if not 0 <= length <= len(ids):
            refuse(f"SEQUENCE_LENGTH: {length} is not allowed; TOKENS_BATCH has {len(ids)} ids a sequence")
        return self._detokenizer.text(_counted("TOKENS_BATCH", ids[:length]))


def check_sizes(tensors: Mapping[str, Array]) -> None:
    """Raises RequestError."""
    for name, array in tensors.items():
        if array.size > MOST[name]:
            refuse(f"{name}: has {array.size} values; at most {MOST[name]} are allowed; split them into several calls")


def _counted(name: str, ids: list[int]) -> list[int]:
    for id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= id < 1 << 31:
            refuse(f"{name}: token id {id} is not allowed; ids count from 0, padding goes behind them")
    return ids
