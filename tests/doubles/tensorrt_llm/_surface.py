"""The names, types and defaults that the stand-in is generated from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SURFACE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "trtllm_executor.json").read_text(encoding="utf-8"))
EXECUTOR: dict[str, Any] = SURFACE["executor"]
