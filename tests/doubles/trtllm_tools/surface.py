"""What the stand-ins share: argument parsers made from the recorded surface, faults, and file layouts."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

SURFACE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "trtllm_cli.json").read_text(encoding="utf-8"))
TYPES = {"int": int, "float": float}


def parser(tool: str) -> argparse.ArgumentParser:
    """Takes the flags of the surface and no others, no abbreviations, and only the choices that it names."""
    result = argparse.ArgumentParser(prog=tool, allow_abbrev=False)
    for flag in SURFACE["cli"][tool]:
        names = (flag["flag"], *flag.get("aliases", ()))
        if flag["type"] == "flag":
            result.add_argument(*names, action="store_true")
            continue
        result.add_argument(
            *names,
            type=TYPES.get(flag["type"], str),
            default=flag.get("default"),
            choices=flag.get("choices"),
            nargs=flag.get("nargs"),
        )
    return result


def fault(tool: str, file: Path) -> None:
    """Fail as FAKE_FAULT says, while `file` is being written."""
    where, _, kind = os.environ.get("FAKE_FAULT", "").partition(":")
    if where != tool:
        return
    file.write_bytes(b"half of it")
    match kind:
        case "crash":
            raise RuntimeError("Assertion failed: no valid tactics")
        case "disk-full":
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"the other half")  # a real ENOSPC
        case "out-of-memory":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            print("[I] timing tactics", flush=True)
            time.sleep(3600)
        case "truncate":
            file.write_bytes(b"")
            sys.exit(0)
        case _:
            sys.exit(f"FAKE_FAULT: {kind!r} is not known")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")
