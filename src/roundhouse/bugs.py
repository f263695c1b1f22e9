"""How a bug is written into the log: where it is, and nothing of the request that met it."""

from __future__ import annotations

import traceback


def described(error: BaseException) -> str:
    """The kind of an exception and the places that it went through, innermost first.

    Its message is left out, since it may hold a prompt.
    """
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    places = ", ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} in {frame.name}" for frame in frames)
    return f"{type(error).__name__} at {places}" if places else type(error).__name__
