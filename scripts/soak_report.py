"""The soak: mixed, checked load on the synthetic engine, with clients that go away and an engine that is killed.

Passes if the server lives to the end, no stream was lost without an error, mixed up, doubled or left open, and memory
of every process, file descriptors, threads, shared memory and KV blocks are at the end what they were after warm-up,
to within 2 %. The kills stop before the end, so that the last engine can warm up too; less than a minute apart, five of
them end the server. See scripts/soak.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from roundhouse.bench.identity import Examiner, Mix, Tally, for_seconds
from roundhouse.bench.machine import machine
from roundhouse.bench.servers import Running, running, scrape
from roundhouse.bench.watch import Sample, Watch, as_json, role
from roundhouse.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models/tiny"
DEPLOYMENT = {
    "model": {"path": str(TINY)},
    "engine": {"kind": "synthetic", "tokens_per_second_per_sequence": 400},
    "limits": {"max_batch_size": 64, "max_seq_len": 1024, "queue": 64},
}
TOLERANCE = 0.02
WARM_UP, WINDOW, QUIET = 0.15, 0.1, 0.3  # parts of the time: before the first window, each window, without kills


def blocks_used(server: Running) -> Callable[[], float]:
    """KV blocks in use, from the metrics page; 0 if it cannot be had."""
    import urllib.request

    def read() -> float:
        try:
            with urllib.request.urlopen(f"http://{server.target.metrics}/metrics", timeout=5) as page:
                lines = page.read().decode().splitlines()
        except OSError:
            return 0.0
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if 'kv_cache_block_type="used"' in line), 0.0)

    return read


@dataclass(frozen=True)
class Life:
    """One run of a server under load. `lived`: whether it was still there at the end."""

    tally: Tally
    kills: int
    lived: bool
    seconds: float


async def load(server: Running, mix: Mix, going_on: Callable[[Tally], bool], kill_at: Iterable[float]) -> Life:
    """Put questions while `going_on` says so and the server lives; kill the engine at those times, in seconds."""
    examiner = Examiner(server.target.address, Tokenizer.load(TINY), mix)
    lives = True
    task = asyncio.create_task(examiner.run(lambda: lives and going_on(examiner.tally)))
    started = told = time.monotonic()
    kills, moments = 0, iter(kill_at)
    next_kill = next(moments, math.inf)
    while not task.done():
        await asyncio.wait([task], timeout=1.0)
        now = time.monotonic()
        lives = server.process.status() != psutil.STATUS_ZOMBIE
        if lives and now - started >= next_kill:
            kills += kill_engine(server.process)
            next_kill = next(moments, math.inf)
        if now - told >= 10:
            told = now
            tally = examiner.tally
            print(
                f"{now - started:.0f} s: {tally.streams} streams, {tally.cancelled} cancelled, {tally.failed} failed, "
                f"{tally.faults} wrong; {kills} kills",
                flush=True,
            )
    return Life(await task, kills, lives, time.monotonic() - started)


def every(seconds: float, until: float) -> Iterator[float]:
    """seconds, 2 x seconds, ... before `until`; nothing for 0."""
    return itertools.takewhile(lambda at: at < until, itertools.count(seconds, seconds)) if seconds else iter(())


def kill_engine(server: psutil.Process) -> int:
    killed = 0
    for process in server.children(recursive=True):
        try:
            if role(process) == "engine":
                process.kill()
                killed += 1
        except psutil.Error:
            continue
    return killed


def held(samples: Sequence[Sample]) -> dict[str, float]:
    """Medians over a window."""
    names = {name for one in samples for name in one.memory_mb}
    found = {f"memory_mb {name}": statistics.median(s.memory_mb.get(name, 0.0) for s in samples) for name in names}
    for field in ("fds", "threads", "shm_mb"):
        found[field] = statistics.median(getattr(one, field) for one in samples)
    return {name: round(found[name], 2) for name in sorted(found)}


def compare(samples: Sequence[Sample], seconds: float) -> dict[str, dict[str, float]]:
    """What was held in the window after warm-up, and in the last one."""
    start = samples[0].at

    def window(begin: float) -> dict[str, float]:
        return held([s for s in samples if begin <= (s.at - start) / seconds < begin + WINDOW])

    before, after = window(WARM_UP), window(1 - WINDOW)
    return {
        name: {
            "after_warm_up": before[name],
            "at_the_end": after.get(name, 0.0),
            "change_percent": round(100 * (after.get(name, 0.0) / before[name] - 1), 2) if before[name] else 0.0,
        }
        for name in before
    }


def plot(samples: Sequence[Sample], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, counts) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    minutes = [(one.at - samples[0].at) / 60 for one in samples]
    for name in sorted({name for one in samples for name in one.memory_mb}):
        memory.plot(minutes, [one.memory_mb.get(name, 0.0) for one in samples], label=name)
    memory.set_ylabel("memory (PSS), MB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize="small")
    for label, values in (
        ("file descriptors", [one.fds for one in samples]),
        ("threads", [one.threads for one in samples]),
        ("shared memory, MB", [one.shm_mb for one in samples]),
        ("KV blocks in use", [one.blocks_used for one in samples]),
    ):
        counts.plot(minutes, values, label=label)
    counts.set_xlabel("minutes")
    counts.set_ylim(bottom=0)
    counts.legend(fontsize="small")
    memory.set_title("Soak")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kill-every", type=float, default=90, help="seconds between kills of the engine; 0: never")
    parser.add_argument("--cancelled", type=float, default=0.2, help="part of the streams whose client goes away")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/soak.json")
    args = parser.parse_args()
    seconds = 60 * args.minutes
    mix = Mix(clients=40, tokens=(1, 24), cancelled=args.cancelled, unary=0.3)
    with running(DEPLOYMENT, "ensemble") as server:
        blocks = blocks_used(server)
        with Watch(server.process, max(seconds / 300, 0.5), blocks) as watch:
            time_left = for_seconds(seconds)
            kill_at = every(args.kill_every, (1 - QUIET) * seconds)
            life = asyncio.run(load(server, mix, lambda _: time_left(), kill_at))
        tally = life.tally
        if not life.lived:
            raise SystemExit(f"failed: the server ended after {life.seconds:.0f} s and {tally.streams} streams")
        time.sleep(5)  # clients of ensembles that went away are noticed after 3 s
        left = blocks()
        figures = scrape(server.target)
    changes = compare(watch.samples, seconds)
    leaks = sorted(name for name, change in changes.items() if change["change_percent"] > 100 * TOLERANCE)
    passed = not (leaks or tally.faults or left)
    result: dict[str, Any] = {
        "command": f"scripts/soak --minutes {args.minutes:g} --kill-every {args.kill_every:g} "
        f"--cancelled {args.cancelled:g}",
        "machine": machine(),
        "minutes": args.minutes,
        "streams": tally.streams,
        "engine_kills": life.kills,
        "engine_restarts": figures["roundhouse_engine_restarts_total"] if figures else None,
        "tally": asdict(tally) | {"errors": dict(tally.errors)},  # asdict counts a Counter's items anew
        "blocks_used_at_the_end": left,
        "held": changes,
        "grown_more_than_2_percent": leaks,
        "passed": passed,
        "samples": as_json(watch.samples)[::6],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    plot(watch.samples, args.output.with_suffix(".png"))
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
