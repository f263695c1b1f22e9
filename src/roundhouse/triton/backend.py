"""Triton's Python backend, in the words of this package. The only module that touches `triton_python_backend_utils`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from roundhouse.engine.protocol import Error, ErrorCode

# Triton adds its classes to that module only after this one is imported, hence the names instead of the values.
_CODES = {
    ErrorCode.INVALID_ARGUMENT: "INVALID_ARG",
    ErrorCode.UNSUPPORTED: "UNSUPPORTED",
    ErrorCode.UNAVAILABLE: "UNAVAILABLE",
    ErrorCode.QUEUE_FULL: "UNAVAILABLE",
    ErrorCode.CANCELLED: "CANCELLED",
    ErrorCode.INTERNAL: "INTERNAL",
}
_FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL


def inputs(request: Any) -> dict[str, npt.NDArray[Any]]:
    """The input tensors of a Triton request by name, `[B, ...]` each."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def timeouts(request: Any) -> tuple[int, object]:
    """What the client gave as timeout, microseconds: Triton's own, 0 without; the parameter `timeout`, None without."""
    return int(request.timeout()), json.loads(request.parameters() or "{}").get("timeout")


def response(tensors: Mapping[str, npt.NDArray[Any]]) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in tensors.items()])


def refusal(error: Error) -> Any:
    code = getattr(pb_utils.TritonError, _CODES[error.code])
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(error.message, code))


class TritonSender:
    """The response sender of one Triton request."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()

    def send(self, tensors: Mapping[str, npt.NDArray[Any]], *, final: bool) -> None:
        self._sender.send(response(tensors), _FINAL if final else 0)

    def fail(self, error: Error, *, final: bool) -> None:
        self._sender.send(refusal(error), _FINAL if final else 0)

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def log_info(message: str) -> None:
    _log("I", message)


def log_warning(message: str) -> None:
    _log("W", message)


def _log(level: str, message: str) -> None:
    """A line of the server's log, past Triton's logger.

    That one holds the interpreter's lock while it waits for the server: for ever, if the server was killed.
    """
    line = f"{level} roundhouse: {message}".replace("\n", "\\n")
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="replace"))
