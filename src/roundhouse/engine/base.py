"""What an engine is: the interface that every implementation gives to the engine process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from roundhouse.engine.protocol import EngineInfo, Error, ErrorCode, Output, Request, Stats


class RequestError(Exception):
    """One request is refused. The message names the field, the value, the limit and the way out."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def as_error(self) -> Error:
        return Error(self.code, self.message)


class EngineError(Exception):
    """The engine cannot be loaded or cannot go on. The message says what to change."""


class Engine(ABC):
    """A batching LLM engine, driven by one thread: submit and cancel between steps, or in `meanwhile`, then step.

    The constructor loads the model; it raises EngineError if the deployment asks for what the engine cannot do.
    Request ids are unique among live requests (the engine process sees to that).
    """

    info: EngineInfo
    meanwhile: Callable[[], None] = staticmethod(lambda: None)
    """What a `step` that waits for another processor calls until that is done: it may submit and cancel, and returns
    at once. Set by whoever drives the engine."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run here; it then leaves no trace in the engine."""

    @abstractmethod
    def cancel(self, request_id: int) -> None:
        """End a request early: a later `step` returns its last Output, with CANCELLED. Unknown ids are ignored."""

    @abstractmethod
    def step(self) -> list[Output]:
        """Advance the batch once and return what each sequence gained. Blocks for at most about one engine iteration.

        Returns an empty list when there is nothing to do, or nothing came of this step.
        """

    @abstractmethod
    def unfinished(self) -> int:
        """Requests that were submitted and whose last Output was not yet returned by `step`."""

    @abstractmethod
    def stats(self) -> Stats:
        """A snapshot; cheap enough to be asked for ten times a second."""

    @abstractmethod
    def close(self) -> None:
        """Free the model. No other method is called after it."""
