"""Typed access to the input tensors of one request. Every refusal names the tensor, as the client called it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy.typing as npt

from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import ErrorCode

Array = npt.NDArray[Any]
LATEST_NS = 2**63 - 1  # engines, and the messages to them, count no further


def refuse(message: str) -> NoReturn:
    raise RequestError(ErrorCode.INVALID_ARGUMENT, message)


def refuse_feature(label: str, reason: str) -> NoReturn:
    raise RequestError(ErrorCode.UNSUPPORTED, f"{label}: {reason}")


class Fields:
    """The inputs of one prompt. Absent inputs and inputs without elements are the same: the default applies.

    `arrays`: tensor by field name, without the batch dimension. `labels`: what the client calls a field, where it
    differs. All methods raise RequestError(INVALID_ARGUMENT).
    """

    def __init__(self, arrays: Mapping[str, Array], labels: Mapping[str, str] | None = None) -> None:
        self._arrays = arrays
        self._labels = labels or {}

    def label(self, name: str) -> str:
        return self._labels.get(name, name)

    def array(self, name: str) -> Array | None:
        array = self._arrays.get(name)
        return array if array is not None and array.size else None

    def integer(self, name: str) -> int | None:
        value = self._scalar(name)
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self._scalar(name)
        if value is None:
            return None
        if not math.isfinite(value):
            refuse(f"{self.label(name)}: {value} is not allowed; it must be a finite number")
        return float(value)

    def flag(self, name: str) -> bool | None:
        value = self._scalar(name)
        return None if value is None else bool(value)

    def string(self, name: str) -> str | None:
        value = self._scalar(name)
        return None if value is None else self._text(name, value)

    def strings(self, name: str) -> list[str]:
        array = self.array(name)
        return [] if array is None else [self._text(name, value) for value in array.reshape(-1)]

    def one_of(self, *names: str) -> int | None:
        """An integer that goes by several names. Two of them with different values contradict each other."""
        given = {name: value for name in names if (value := self.integer(name)) is not None}
        if len(set(given.values())) > 1:
            told = " and ".join(f"{self.label(name)}={value}" for name, value in given.items())
            refuse(f"{told} contradict each other: they are two names of one setting; send one of them")
        return next(iter(given.values()), None)

    def _scalar(self, name: str) -> Any:
        array = self.array(name)
        if array is None:
            return None
        if array.size != 1:
            refuse(f"{self.label(name)}: has {array.size} values; it must have exactly 1 for each prompt")
        return array.reshape(-1)[0]

    def _text(self, name: str, value: bytes | str) -> str:
        if isinstance(value, str):
            return value
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            refuse(
                f"{self.label(name)}: not valid UTF-8 (byte 0x{value[error.start]:02x} at position {error.start}); "
                "send text encoded as UTF-8"
            )


def batch_of(tensors: Mapping[str, Array], *, labels: Mapping[str, str] | None = None) -> list[Fields]:
    """One Fields for each prompt of a client's batch. `tensors`: `[B, ...]` each, with the same B, at least one."""
    sizes = {name: len(array) if array.ndim else 1 for name, array in tensors.items()}
    batch = max(sizes.values())
    for name, size in sizes.items():
        if size != batch:
            label = (labels or {}).get(name, name)
            refuse(f"{label}: has a batch of {size}, other inputs have {batch}; send one row for each prompt")
    return [Fields({name: _row(array, row) for name, array in tensors.items()}, labels) for row in range(batch)]


def _row(array: Array, row: int) -> Array:
    """A row, as an array also where it is one value: numpy would make its own string of it, without NULs at its end."""
    return array[row] if array.ndim > 1 else array[row : row + 1]


def timeout_of(triton: int, parameter: object) -> int:
    """Microseconds until a request expires, 0 for never.

    `triton`: of a request of `infer`. `parameter`: the parameter `timeout`, where the body of `generate` puts it.
    Raises RequestError.
    """
    value = triton if parameter is None else parameter
    if type(value) is not int or not 0 <= value < 2**63:
        refuse(f"timeout: {value!r} is not allowed; give the microseconds after which the request may be dropped")
    return value


def deadline_of(arrival_ns: int, timeout: int) -> int:
    """When a request of so many microseconds expires, in monotonic nanoseconds; 0 for never."""
    return min(arrival_ns + 1000 * timeout, LATEST_NS) if timeout else 0
