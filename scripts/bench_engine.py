"""Measure the embedded engine alone (no Triton, no network) beside other ways to run the same model on this CPU.

    .venv/bin/python scripts/bench_engine.py --model random-7m
    .venv/bin/python scripts/bench_engine.py --model models/tiny --vllm-python OTHER_VENV/bin/python

Closed set: N prompts of 32 random tokens are submitted at once, each gets 64 greedy tokens; the rate counts new tokens
over the time until the last one. Each engine runs in a process of its own, once to warm up and then `--repeats` times.
Writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PROMPT, ANSWER = 32, 64
ENGINES = {
    "embedded": "embedded engine, float32",
    "embedded-bf16kv": "embedded engine, float32, KV cache bfloat16",
    "embedded-bf16": "embedded engine, bfloat16",
    "embedded-generic": "embedded engine without its fused path",
    "transformers-cb": "transformers continuous batching (SDPA)",
    "transformers-sequential": "transformers generate, one after another",
    "vllm": "vLLM on the CPU, float32",
    "vllm-bf16": "vLLM on the CPU, bfloat16",
}
RANDOM = {
    "random-7m": {"num_hidden_layers": 6, "num_key_value_heads": 8, "vocab_size": 4096},
    "random-tiny": {"num_hidden_layers": 4, "num_key_value_heads": 4, "vocab_size": 1536, "tie_word_embeddings": True},
}
Generate = Callable[[list[list[int]]], int]


def prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, vocab_size) for _ in range(PROMPT)] for _ in range(count)]


# --- one engine each: a function that generates for all prompts and returns the number of new tokens ----------------


def embedded(model: str, streams: int, **settings: Any) -> Generate:
    from roundhouse.engine.embedded.engine import EmbeddedConfig, EmbeddedEngine
    from roundhouse.engine.protocol import Request, Sampling

    engine = EmbeddedEngine(EmbeddedConfig(model=model, max_batch_size=max(streams, 1), max_seq_len=512, **settings))

    def generate(batch: list[list[int]]) -> int:
        for i, prompt in enumerate(batch):
            engine.submit(Request(i, tuple(prompt), ANSWER, sampling=Sampling(temperature=0.0)))
        count = 0
        while engine.unfinished():
            count += sum(len(output.tokens) for output in engine.step())
        return count

    return generate


def transformers_model(model: str) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    config = transformers.GenerationConfig(max_new_tokens=ANSWER, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return loaded, config


def transformers_cb(model: str, streams: int) -> Generate:
    from transformers import ContinuousBatchingConfig

    loaded, config = transformers_model(model)
    # the best of what was tried; a larger pool makes it slower, for its attention runs over padded keys
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=4 * streams, max_batch_tokens=512)

    def generate(batch: list[list[int]]) -> int:
        results = loaded.generate_batch(batch, config, batching, persistent_manager=True)
        return sum(len(result.generated_tokens) for result in results.values())

    return generate


def transformers_sequential(model: str, streams: int) -> Generate:
    import torch

    loaded, config = transformers_model(model)
    config.eos_token_id = None

    def generate(batch: list[list[int]]) -> int:
        count = 0
        for prompt in batch[:8]:  # the rate does not depend on how many
            ids = torch.tensor([prompt])
            count += loaded.generate(ids, config, attention_mask=torch.ones_like(ids)).shape[1] - PROMPT
        return count

    return generate


def vllm(model: str, streams: int, dtype: str = "float32") -> Generate:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model, skip_tokenizer_init=True, dtype=dtype, max_model_len=512, max_num_seqs=streams, seed=0,
        max_num_batched_tokens=max(2048, PROMPT * streams), enable_prefix_caching=True, disable_log_stats=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)

    def generate(batch: list[list[int]]) -> int:
        results = engine.generate([{"prompt_token_ids": prompt} for prompt in batch], params, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    return generate


def build(name: str, model: str, streams: int) -> Generate:
    match name:
        case "embedded":
            return embedded(model, streams, dtype="float32")
        case "embedded-bf16kv":
            return embedded(model, streams, dtype="float32", kv_dtype="bfloat16")
        case "embedded-bf16":
            return embedded(model, streams, dtype="bfloat16")
        case "embedded-generic":
            return embedded(model, streams, dtype="float32", fused=False)
        case "transformers-cb":
            return transformers_cb(model, streams)
        case "transformers-sequential":
            return transformers_sequential(model, streams)
        case "vllm":
            return vllm(model, streams)
        case _:
            return vllm(model, streams, dtype="bfloat16")


def work(name: str, model: str, streams: list[int], repeats: int) -> None:
    """In the engine's own process: measure and print one JSON line."""
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    generate = build(name, model, max(streams))
    rates: dict[int, list[float]] = {}
    for count in streams:
        generate(prompts(count, vocab_size, seed=0))
        rates[count] = []
        for repeat in range(repeats):
            batch = prompts(count, vocab_size, seed=1000 * count + repeat)
            start = time.perf_counter()
            tokens = generate(batch)
            rates[count].append(tokens / (time.perf_counter() - start))
    print("RESULT " + json.dumps(rates), flush=True)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)  # the threads of some engines do not end by themselves


# --- all of them ----------------------------------------------------------------------------------------------------


def measure(python: str, name: str, model: str, streams: list[int], repeats: int) -> dict[str, list[float]] | None:
    if name != "transformers-cb":
        return measure_in_one_process(python, name, model, streams, repeats)
    rates: dict[str, list[float]] = {}
    for count in streams:  # its pool is sized for the requests of its first batch
        rates |= measure_in_one_process(python, name, model, [count], repeats) or {}
    return rates or None


def measure_in_one_process(
    python: str, name: str, model: str, streams: list[int], repeats: int
) -> dict[str, list[float]] | None:
    command = [python, __file__, "--worker", name, "--model", model, "--repeats", str(repeats)]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--streams", ",".join(map(str, streams))], env=env, capture_output=True, text=True, timeout=1200
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
    return None


def hardware() -> dict[str, object]:
    cpu = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "?")
    amx = "amx_bf16" in cpu
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "amx_bf16": amx, "system": platform.platform()}


def versions(vllm_python: str | None) -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers", "numba", "numpy")}
    if vllm_python:
        script = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
        found["vllm"] = subprocess.run([vllm_python, "-c", script], capture_output=True, text=True).stdout.strip()
    return {"python": platform.python_version(), **found}


def random_model(name: str, folder: Path) -> str:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_attention_heads=8, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, initializer_range=0.05, **RANDOM[name],
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for result in report["results"].values():
        streams = [int(count) for count in result["tokens_per_second"]]
        axes.plot(streams, list(result["tokens_per_second"].values()), marker="o", label=result["label"])
    axes.set(xscale="log", yscale="log", xlabel="streams at once", ylabel="new tokens per second, all streams")
    axes.set_xticks(report["streams"], [str(count) for count in report["streams"]])
    axes.set_title(f"{report['model']}, {report['hardware']['cores']} cores, {PROMPT} prompt + {ANSWER} new tokens")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-7m", help=f"a model folder, or one of {', '.join(RANDOM)}")
    parser.add_argument("--streams", default="1,8,16,32,64,128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", default=",".join(name for name in ENGINES if not name.startswith("vllm")))
    parser.add_argument("--vllm-python", help="Python of an environment with vllm-cpu; adds the vllm engines")
    parser.add_argument("--out", default="docs/benchmarks/embedded-engine", help="without .json and .png")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    streams = [int(count) for count in options.streams.split(",")]
    if options.worker:
        work(options.worker, options.model, streams, options.repeats)
        return
    names = options.engines.split(",") + (["vllm", "vllm-bf16"] if options.vllm_python else [])
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = random_model(options.model, Path(folder)) if options.model in RANDOM else options.model
        for name in names:
            python = options.vllm_python if name.startswith("vllm") else sys.executable
            rates = measure(python, name, path, streams, options.repeats)
            if rates is not None:
                medians = {count: round(statistics.median(values), 1) for count, values in rates.items()}
                print(f"{ENGINES[name]:45}", *(f"{count}: {rate:.0f}" for count, rate in medians.items()), flush=True)
                runs = {count: [round(value, 1) for value in values] for count, values in rates.items()}
                results[name] = {"label": ENGINES[name], "tokens_per_second": medians, "runs": runs}
    arguments = f"--model {options.model} --streams {options.streams} --repeats {options.repeats}"
    report = {
        "command": f"scripts/bench_engine.py {arguments}" + (" --vllm-python ..." if options.vllm_python else ""),
        "model": options.model,
        "prompt_tokens": PROMPT,
        "new_tokens": ANSWER,
        "streams": streams,
        "hardware": hardware(),
        "versions": versions(options.vllm_python),
        "results": results,
    }
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
