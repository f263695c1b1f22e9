"""Run each fuzz target in a process of its own, with atheris, and add up what happened. See scripts/fuzz."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "docs/benchmarks"
PACKAGES = ["roundhouse.triton", "roundhouse.openai", "roundhouse.text", "roundhouse.engine"]
SLOW_SECONDS = 10  # one case longer than this is a hang


def one(target: str, cases: int, seed: int) -> None:
    """Does not return: libFuzzer ends the process, with 77 for a crash."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES):
        from tests.fuzz.targets import TARGETS
    with tempfile.TemporaryDirectory() as corpus:
        arguments = [f"-runs={cases}", f"-seed={seed}", "-max_len=1024", f"-timeout={SLOW_SECONDS}", corpus]
        atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
        atheris.Fuzz()


def run(target: str, cases: int, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "scripts.fuzz_targets",
        "--one",
        target,
        "--cases",
        str(cases),
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = re.findall(r"#(\d+)\s.*?cov: (\d+)", done.stderr)
    figures = {
        "cases": int(found[-1][0]) if found else 0,
        "coverage_points": int(found[-1][1]) if found else 0,
        "seconds": round(time.monotonic() - started, 1),
        "failed": done.returncode != 0,
    }
    print(f"{target}: {figures}", flush=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "fuzz.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.cases, args.seed)
    from tests.fuzz.targets import TARGETS

    names = args.targets or list(TARGETS)
    targets = {name: run(name, -(-args.cases // len(names)), args.seed) for name in names}
    result = {
        "command": " ".join(["scripts/fuzz", *sys.argv[1:]]),
        "cases": sum(figures["cases"] for figures in targets.values()),
        "failed": sum(figures["failed"] for figures in targets.values()),
        "targets": targets,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['cases']} cases, {result['failed']} targets failed; written to {args.output}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
