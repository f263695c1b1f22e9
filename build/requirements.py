"""Our dependencies by name alone, for an image that has most of them: pip then takes the versions that are there.

What the image lacks gets the newest version that goes with the image's packages, which the Dockerfile gives to pip as
constraints. requirements.lock cannot be used: it was resolved without them. Standard library only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def names(project: dict[str, Any], extra: str | None = None) -> list[str]:
    """Of the dependencies, or of one extra: `tritonclient[grpc,http]>=2` becomes `tritonclient[grpc,http]`."""
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return [match[0] for line in lines if (match := re.match(r"[\w.-]+(\[[\w,-]+\])?", line))]


if __name__ == "__main__":
    text = PROJECT.read_text(encoding="utf-8")
    print("\n".join(names(tomllib.loads(text)["project"], *sys.argv[1:])))
