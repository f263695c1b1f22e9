"""Arguments of the bindings."""

from __future__ import annotations

from typing import Any


def given(**arguments: Any) -> dict[str, Any]:
    """Those that are not None. The bindings refuse None for most parameters, and take a missing one for its default."""
    return {name: value for name, value in arguments.items() if value is not None}
