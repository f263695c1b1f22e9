"""Our dependencies by name alone, for an image that has most of them: pip then takes the versions that are there.

What the image lacks gets the newest version that goes with the image's packages, which the Dockerfile gives to pip as
constraints. requirements.lock cannot be used: it was resolved without them. Standard library only.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def names(project: dict[str, Any]) -> list[str]:
    """`tritonclient[grpc,http]>=2` becomes `tritonclient[grpc,http]`."""
    return [match[0] for line in project["dependencies"] if (match := re.match(r"[\w.-]+(\[[\w,-]+\])?", line))]


if __name__ == "__main__":
    print("\n".join(names(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"])))
