"""Engine folders that the stand-in of TensorRT-LLM loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.trtllm.conftest import engine_config

DOUBLES = Path(__file__).parent


def write_engine(
    folder: Path, model: Path, *, behaviour: dict[str, Any] | None = None, ranks: int = 1, **changes: Any
) -> Path:
    """An engine folder as trtllm-build writes it, whose tokens are those of a Hugging Face model.

    `changes`: values of its config.json. `behaviour`: fields of the stand-in's `Engine`, such as iteration_seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    mapping = {"world_size": ranks, "tp_size": ranks, "pp_size": 1, "cp_size": 1}
    config = engine_config(**{"vocab_size": vocab, "mapping": mapping, **changes})
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        content = {"stand_in": "test", "rank": rank, "model": str(model), **(behaviour or {})}
        (folder / f"rank{rank}.engine").write_text(json.dumps(content))
    return folder
