"""Streams with random sizes and cancels, an engine that is killed, a server that is started again when it dies.

    .venv/bin/python -m scripts.bench_identity --streams 100000

Each answer is checked word by word, as in the soak, but this is about what clients get, not about what is held: Triton
2.51 crashes under clients that cancel (docs/reliability.md), and then the next server takes the rest of the streams, as
whoever runs it would have it. Passes if none was lost without an error, mixed up, doubled or left open. Writes
docs/benchmarks/identity.json and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from roundhouse.bench.identity import Mix
from roundhouse.bench.machine import machine
from roundhouse.bench.servers import running
from scripts.soak_report import DEPLOYMENT, ROOT, Life, load

MIX = Mix(clients=40, tokens=(1, 24), cancelled=0.2, unary=0.3)
ENDED = "the server has ended by itself\n"
KILL_FIRST, KILL_EVERY = 10, 70  # seconds: five kills, each less than a minute after the last, would end the server
ENDS = ("finished", "cancelled", "failed", "wrong", "silent", "late", "hanging")


def live(number: int, streams: int, kill_at: Iterable[float]) -> tuple[Life, str]:
    """One server, until so many streams have ended or it has, and why it did, if it did. Its questions are its own."""
    with running(DEPLOYMENT, "ensemble") as server:
        mix = replace(MIX, seed=number)
        life = asyncio.run(load(server, mix, lambda tally: tally.streams < streams, kill_at))
        return life, "" if life.lived else cause(server.log.read_text(errors="replace"))


def cause(log: str) -> str:
    """What a server that ended by itself gave as the first reason."""
    return log.partition(ENDED)[2].strip().partition("\n")[0]


def kind(error: str) -> str:
    """An error without what is different each time."""
    return re.sub(r"(\[request id: )\w+|(127\.0\.0\.1:)\d+", r"\1\2...", error)


def plot(lives: Sequence[Life], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    below = [0] * len(lives)
    for name in ENDS:
        counts = [getattr(life.tally, name) for life in lives]
        axes.bar(range(1, len(lives) + 1), counts, bottom=below, label=f"{name}: {sum(counts):,}")
        below = [old + new for old, new in zip(below, counts, strict=True)]
    axes.set_xlabel("server, each started when the one before had ended")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("streams")
    axes.legend(fontsize="small")
    axes.set_title("How checked streams ended")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--lives", type=int, default=60, help="at most so many servers")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/identity.json")
    args = parser.parse_args()
    lives: list[Life] = []
    causes: list[str] = []
    done = 0
    while done < args.streams and len(lives) < args.lives:
        life, why = live(len(lives) + 1, args.streams - done, itertools.count(KILL_FIRST, KILL_EVERY))
        lives.append(life)
        causes.append(why)
        done += life.tally.streams
        print(f"server {len(lives)}: {life.tally.streams} streams, {done} of {args.streams}; {why}", flush=True)
    tallies = [life.tally for life in lives]
    faults = sum(tally.faults for tally in tallies)
    result: dict[str, Any] = {
        "command": f".venv/bin/python -m scripts.bench_identity --streams {args.streams}",
        "machine": machine(),
        "mix": asdict(MIX),
        "streams": done,
        **{name: sum(getattr(tally, name) for tally in tallies) for name in ENDS},
        "faults": faults,
        "engine_kills": sum(life.kills for life in lives),
        "servers": len(lives),
        "servers_ended_because": dict(Counter(filter(None, causes))),
        "streams_by_server": [tally.streams for tally in tallies],
        "seconds_by_server": [round(life.seconds, 1) for life in lives],
        "errors": dict(sum((Counter(map(kind, tally.errors.elements())) for tally in tallies), Counter())),
        "examples": [example for tally in tallies for example in tally.examples],
        "passed": done >= args.streams and not faults,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    plot(lives, args.output.with_suffix(".png"))
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
