"""python -m trtllm_proof: see scripts/prove-trtllm."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml

from roundhouse.trtllm import toolchain
from trtllm_proof import deployments, stages
from trtllm_proof.report import Stage, as_json, as_markdown, verdict


class Proof:
    """The stages so far. A stage whose needs failed is skipped; all others run whatever came before."""

    def __init__(self, site: stages.Site) -> None:
        self.site = site
        self.stages: list[Stage] = []

    def run(
        self, name: str, function: Callable[..., stages.Found | None], *args: object, needs: str | None = None
    ) -> None:
        if needs is not None and self.outcome(needs) != "passed":
            self._add(Stage(name, "skipped", 0.0, [f"needs {needs}"]))
            return
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            found = function(self.site, *args)
        except stages.StageError as failure:
            self._add(Stage(name, "failed", time.monotonic() - started, failure.details, self._log(name), failure.data))
        except Exception as error:  # the report says what happened; the other stages go on
            details = [line[:300] for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()][:10]
            self._add(Stage(name, "failed", time.monotonic() - started, details, self._log(name)))
        else:
            details, data = (found.details, found.data) if found is not None else ([], {})
            self._add(Stage(name, "passed", time.monotonic() - started, details, self._log(name), data))

    def outcome(self, name: str) -> str:
        return next(stage.outcome for stage in self.stages if stage.name == name)

    def _log(self, name: str) -> str | None:
        log = self.site.log(name)
        return log.name if log.exists() else None

    def _add(self, stage: Stage) -> None:
        self.stages.append(stage)
        first = f": {stage.details[0]}" if stage.details else ""
        print(f"{stage.name}: {stage.outcome} after {stage.seconds:.0f} s{first}", file=sys.stderr, flush=True)


def prove(site: stages.Site) -> list[Stage]:
    """Run everything. The names of stages are those of their logs."""
    proof = Proof(site)
    gpu = site.tools.gpus[0]
    proof.run("surface", stages.compare_surface)
    deployments.write_calibration(site.output / "calibration")
    chosen = deployments.deployments(stages.ROOT / "models", site.output, gpu)
    files = {name: write(site.output / f"{name}.yaml", raw) for name, raw in chosen.items()}
    for name, file in files.items():
        proof.run(f"build-{name}", stages.build, file)
    suite_file = write(site.output / "conformance.yaml", deployments.conformance(site.output, gpu))
    proof.run("random-model", stages.write_random_model, site.output / "random-model", deployments.HEAD_SIZE)
    proof.run("build-conformance", stages.build, suite_file, needs="random-model")
    tests = ["tests/engines/test_conformance.py", "-k", "tensorrt_llm" + (" and idle" if site.quick else "")]
    proof.run(
        "conformance",
        _with(ROUNDHOUSE_TEST_ENGINE=str(site.output / "engines/conformance")),
        "conformance",
        tests,
        needs="build-conformance",
    )
    for name, file in files.items():
        tests = ["tests/server/test_contract.py", *(["-k", "the_answer_is_right"] if site.quick else [])]
        proof.run(
            f"contract-{name}",
            _with(ROUNDHOUSE_TEST_DEPLOYMENT=str(file)),
            f"contract-{name}",
            tests,
            needs=f"build-{name}",
        )
        least = stages.LEAST_EXACT[str(chosen[name]["precision"]["weights"])]
        proof.run(f"accuracy-{name}", stages.accuracy, file, least, needs=f"build-{name}")
    return proof.stages


def _with(**environment: str) -> Callable[..., stages.Found]:
    return lambda site, name, tests: stages.suite(site, name, tests, **environment)


def write(path: Path, raw: object) -> Path:
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def environment(site: stages.Site) -> dict[str, str]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "roundhouse": version("roundhouse"),
        "TensorRT-LLM": site.tools.version,
        "base image": os.environ.get("ROUNDHOUSE_BASE_IMAGE", "not known"),
        "GPUs": ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in site.tools.gpus),
        "Python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/prove-trtllm", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("proof"), help="folder for the report, logs and engines")
    parser.add_argument(
        "--examples", type=Path, default=Path(os.environ.get("ROUNDHOUSE_TRTLLM_EXAMPLES", "/app/examples"))
    )
    parser.add_argument("--quick", action="store_true", help="one test of each suite: tries the script, proves little")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    try:
        tools = toolchain.find(arguments.examples)
        output.mkdir(parents=True, exist_ok=True)
    except (toolchain.ToolchainError, OSError) as error:
        sys.exit(str(error))
    site = stages.Site(tools, arguments.examples, output, arguments.quick)
    done = prove(site)
    stand_in = str(done[0].data.get("file", "")).startswith(str(stages.DOUBLES))
    result = verdict(done, quick=arguments.quick, stand_in=stand_in)
    facts = environment(site)
    (output / "proof.json").write_text(json.dumps(as_json(facts, done, result), indent=2), encoding="utf-8")
    (output / "proof.md").write_text(as_markdown(facts, done, result), encoding="utf-8")
    print(f"{result}: {output / 'proof.md'}")
    sys.exit(result == "failed")


if __name__ == "__main__":
    main()
