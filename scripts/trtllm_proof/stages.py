"""What the proof tries, one function each: it returns a Stage's details, or raises StageError."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tiny_model import skills

from roundhouse.trtllm import engine_folder
from roundhouse.trtllm.toolchain import Toolchain
from trtllm_proof import surface

ROOT = Path(__file__).resolve().parents[2]
DOUBLES = ROOT / "tests/doubles"
SUITE_SECONDS = 1800
PROMPTS_PER_SKILL = 8
CLIENTS = 16
# Least share of exact answers, in percent. The model gives 99.2 in bfloat16 on a CPU (models/tiny/README.md).
LEAST_EXACT = {"bfloat16": 97.0, "fp8": 90.0}
MOST_LOST = 2.0  # percent fewer exact answers when the blocks of an earlier answer are reused


class StageError(Exception):
    """A stage failed. `details` go into the report."""

    def __init__(self, *details: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(details[0] if details else "failed")
        self.details = details
        self.data = data or {}


@dataclass(frozen=True)
class Found:
    details: list[str]
    data: dict[str, Any]


@dataclass(frozen=True)
class Site:
    """Where the proof runs: the tools, and the folder that everything is written to."""

    tools: Toolchain
    examples: Path
    output: Path
    quick: bool

    def log(self, name: str) -> Path:
        return self.output / f"{name}.log"

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(self.output / "hypothesis"), **more}


def compare_surface(site: Site) -> Found:
    """The installed package and tools against what was recorded of them."""
    tools = [f"trtllm-build={site.tools.trtllm_build}", f"quantize.py={site.tools.quantize}"]
    command = [site.tools.python, str(Path(__file__).with_name("installed.py")), *tools]
    with site.log("surface").open("w") as log:
        asked = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=600, check=False)
    if asked.returncode:
        raise StageError("the installed package cannot be inspected; see the log")
    found = json.loads(asked.stdout)
    (site.output / "surface.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    differences = surface.compare(recorded(), found)
    data = {"file": found["file"], "differences": [each.as_dict() for each in differences]}
    lines = [f"{each.kind}: {each.where}: recorded {each.recorded}, found {each.found}" for each in differences]
    broken = sum(each.kind != "new" for each in differences)
    first = f"{broken} things are not as recorded, {len(differences) - broken} are new"
    if broken:
        raise StageError(first, *lines, data=data)
    return Found([first, *lines], data)


def recorded() -> dict[str, Any]:
    executor, cli = (json.loads((DOUBLES / f"trtllm_{name}.json").read_text()) for name in ("executor", "cli"))
    return {"version": cli["version"], "executor": executor["executor"], "cli": cli["cli"]}


RANDOM_MODEL = """
import pathlib, sys
from tests.engines.conftest import build_model
build_model(pathlib.Path(sys.argv[1]), head_dim=int(sys.argv[2]))
"""


def write_random_model(site: Site, folder: Path, head_size: int) -> None:
    """The model of the conformance suite, with a head size that TensorRT-LLM has kernels for."""
    command = [sys.executable, "-c", RANDOM_MODEL, str(folder), str(head_size)]
    with site.log("random-model").open("w") as log:
        made = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
    if made.returncode:
        raise StageError("the random model cannot be made; see the log")


def build(site: Site, deployment: Path) -> Found:
    """`roundhouse build`, as a user runs it; then what is in the engines."""
    name = deployment.stem
    command = [sys.executable, "-m", "roundhouse.cli", "build", str(deployment), "--examples", str(site.examples)]
    with site.log(f"build-{name}").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        said = site.log(f"build-{name}").read_text().splitlines()
        raise StageError(*[line for line in said if line.strip()][-20:])
    engine = engine_folder.read(site.output / "engines" / name)
    seconds = engine.manifest.seconds if engine.manifest else {}
    size = sum(engine.rank_files.values())
    details = (
        f"{engine.quant_algo or engine.dtype}, KV cache {engine.kv_cache_quant_algo or engine.dtype}, {size:,} bytes"
    )
    return Found(
        [f"{details}; {', '.join(f'{step} {taken} s' for step, taken in seconds.items())}"], {"seconds": seconds}
    )


def suite(site: Site, name: str, arguments: list[str], **environment: str) -> Found:
    """Some of the project's own tests."""
    report = site.output / f"{name}.xml"
    options = ["-p", "no:cacheprovider", "-q", f"--junit-xml={report}"]
    with site.log(name).open("w") as log:
        try:
            code = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *arguments],
                cwd=ROOT,
                env=site.environment(PYTHONDONTWRITEBYTECODE="1", **environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=SUITE_SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise StageError(f"not done after {SUITE_SECONDS} s") from None
    counts, failed = results(report.read_text(encoding="utf-8")) if report.exists() else ({}, [])
    summary = ", ".join(f"{count} {what}" for what, count in counts.items()) or "no tests ran"
    if code or not counts.get("passed"):
        raise StageError(summary, *failed, data={"tests": counts})
    return Found([summary], {"tests": counts})


def results(junit: str) -> tuple[dict[str, int], list[str]]:
    """How many passed, failed, were skipped; the names of those that failed, with the first line of why."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        trouble = [part for part in case if part.tag in ("failure", "error")]
        outcome = "failed" if trouble else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        failed += [
            f"{case.get('classname')}::{case.get('name')}: {part.get('message', '')[:200]}" for part in trouble[:1]
        ]
    return counts, failed


def accuracy(site: Site, deployment: Path, least: float) -> Found:
    """Exact answers to held-out prompts; each is asked twice, the second time with its blocks reused."""
    from tests.server.client import answer
    from tests.server.conftest import Server

    rng = random.Random(1)
    count = 1 if site.quick else PROMPTS_PER_SKILL
    drawn = (skills.sample(skill, rng) for skill in skills.EXACT_SKILLS for _ in range(count))
    pairs = [pair for pair in drawn if len(pair.prompt) + len(pair.answer) < 1500]
    with Server(deployment, site.log(f"accuracy-{deployment.stem}")) as server, ThreadPoolExecutor(CLIENTS) as pool:

        def ask(pair: skills.Sample) -> str:
            text: str = answer(server, "tensorrt_llm_bls", pair.prompt, 1000, temperature=0.0)
            return text.strip()

        first, second = (list(pool.map(ask, pairs)) for _ in range(2))
    right = [
        [text == pair.answer.strip() for text, pair in zip(texts, pairs, strict=True)] for texts in (first, second)
    ]
    exact, again = (100 * sum(each) / len(pairs) for each in right)
    data = {"prompts": len(pairs), "exact_percent": exact, "exact_percent_with_reuse": again, "least": least}
    line = f"{exact:.1f} % of {len(pairs)} held-out answers exact, {again:.1f} % when asked again; least is {least} %"
    if exact < least or exact - again > MOST_LOST:
        wrong = [pair.prompt for pair, good in itertools.islice(zip(pairs, right[1], strict=True), 400) if not good]
        raise StageError(line, *(f"wrong: {prompt[:80]}" for prompt in wrong[:10]), data=data)
    return Found([line], data)
