"""Measure on a GPU what each optimisation of the vLLM engine gives, without a server: token ids in, token ids out.

    .venv/bin/python scripts/bench_optimisations.py            # everything: about 8 minutes on an H200
        --only base,fp8-kv         # some configurations; the others keep their figures
        --smoke --output /tmp/x    # the same on models/tiny, also on a CPU: is it in order?
        --only ''                  # only draw the plot again

A configuration is one engine in a process of its own, and what is measured on it:

    base           continuous batching against one request after the other; a shared prefix, with and without reuse
                   (without: a cache salt for each request); ITL while long prompts arrive; more streams than the KV
                   cache holds
    fp8-kv         more streams than the KV cache holds, with an FP8 KV cache in the same memory
    whole-prefill  ITL while long prompts arrive, without chunked prefill
    draft-model    speculation with a draft model of a Llama-3.2-1B shape, at acceptance rates that vLLM makes up
    ngram          speculation from n-grams of text that repeats
    quality        exact answers and log probs of models/tiny, FP8 KV cache against that of the activations

The model has the Llama-3-8B shape and random weights (load_format dummy); the KV cache is what is left of MEMORY_GIB,
as on a smaller card, so that its limits can be reached. ROUNDHOUSE_ENGINE_PYTHON names the interpreter that has vLLM
(default: this one). Writes docs/benchmarks/gpu-optimisations.json after each configuration, a plot and a page.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_gpu import BENCHMARKS, ENGINE_PYTHON, ROOT, hardware, make_model, versions
from optimisations_report import page

if TYPE_CHECKING:
    from roundhouse.engine.base import Engine

MEMORY_GIB = 32  # weights, activations and KV cache of `base`, `fp8-kv` and `whole-prefill`
SPECULATION_GIB = 64  # a draft model and its cache come on top
DRAFT_TOKENS = 5
ACCEPTANCE = (0.5, 0.7, 0.9)  # of a draft token, given that those before it were accepted
DRAFT_SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the loads, in tokens and streams."""

    prompt: int = 512
    answer: int = 256
    streams: tuple[int, ...] = (1, 8, 32, 64, 128)
    drafting_streams: tuple[int, ...] = (1, 8, 32, 128)
    crowd: int = 256  # streams that the KV cache does not hold
    prefix: int = 2048
    suffix: int = 64
    prefix_answer: int = 64
    prefix_streams: int = 32
    long_prompt: int = 6144
    long_every: float = 0.5  # seconds
    running: int = 32  # streams that run while long prompts arrive
    max_seq_len: int = 8192
    max_num_tokens: int = 2048
    questions: int = 50  # per skill
    settle: float = 0.5  # seconds after the first token of every stream, before measuring
    seconds: float = 3.0  # of each measurement


LLAMA = Scale()
SMOKE = Scale(
    prompt=32,
    answer=16,
    streams=(1, 4, 8),
    drafting_streams=(1, 4),
    crowd=24,
    prefix=256,
    suffix=8,
    prefix_answer=4,
    prefix_streams=4,
    long_prompt=400,
    long_every=0.2,
    running=4,
    max_seq_len=512,
    max_num_tokens=128,
    questions=2,
    seconds=1.0,
)


# --- loads ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    salt: str = ""


@dataclass
class Answer:
    """When a request was submitted, and when each of its tokens came."""

    sent: float
    times: list[float] = field(default_factory=list)
    done: bool = False


@dataclass
class Window:
    """What came from `start` to `end`, in monotonic seconds. `active`: sequences that held a slot, on average."""

    start: float
    end: float
    answers: list[Answer]
    active: float

    def figures(self) -> dict[str, Any]:
        """Tokens that came in the window; TTFT of requests that began to come in it, TPOT of those that ended in it."""
        tokens = sum(self.start <= at < self.end for answer in self.answers for at in answer.times)
        first = [a.times[0] - a.sent for a in self.answers if a.times and self.start <= a.times[0] < self.end]
        ended = [a for a in self.answers if a.done and len(a.times) > 1 and self.start <= a.times[-1] < self.end]
        each = [(a.times[-1] - a.times[0]) / (len(a.times) - 1) for a in ended]
        return {
            "tokens_per_second": round(tokens / (self.end - self.start), 1),
            "mean_active": round(self.active, 1),
            "ttft_ms": percentiles(first),
            "tpot_ms": percentiles(each),
        }


def percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    values = list(seconds)
    return {f"p{p}": round(1e3 * float(np.percentile(values, p)), 2) for p in (50, 95, 99)} if values else None


class Driver:
    """Steps an engine under a load. Answers have their full length: there are no end ids."""

    def __init__(self, engine: Engine, scale: Scale) -> None:
        self.engine, self.scale = engine, scale
        self._chance = np.random.default_rng(5)
        self._last_id = 0
        self._live: dict[int, Answer] = {}

    def random_ids(self, count: int) -> tuple[int, ...]:
        """Ids below the special tokens at the end of the vocabulary."""
        return tuple(self._chance.integers(0, self.engine.info.vocab_size - 256, count).tolist())

    def submit(self, prompt: Prompt, max_tokens: int) -> Answer:
        from roundhouse.engine.protocol import Request, Sampling

        self._last_id += 1
        self.engine.submit(
            Request(
                self._last_id,
                prompt=prompt.ids,
                max_tokens=max_tokens,
                sampling=Sampling(temperature=0.0),
                cache_salt=prompt.salt,
            )
        )
        answer = self._live[self._last_id] = Answer(time.monotonic())
        return answer

    def step(self) -> int:
        """Advance once. Returns how many answers ended."""
        ended = 0
        for output in self.engine.step():
            if output.error is not None:
                raise RuntimeError(output.error.message)
            answer = self._live[output.id]
            answer.times += [time.monotonic()] * len(output.tokens)
            if output.last:
                answer.done = True
                del self._live[output.id]
                ended += 1
        return ended

    def stop(self) -> None:
        for id in list(self._live):
            self.engine.cancel(id)
        while self.engine.unfinished():
            self.step()

    def closed_loop(self, streams: int, answer: int, prompt: Callable[[], Prompt]) -> Window:
        """So many requests at all times. First answers have spread lengths, so that streams do not end in step."""
        answers = [self.submit(prompt(), max(answer * (n + 1) // streams, 1)) for n in range(streams)]

        def advance() -> None:
            answers.extend(self.submit(prompt(), answer) for _ in range(self.step()))

        wave = list(answers)
        while not all(each.times for each in wave):
            advance()
        start, samples = time.monotonic() + self.scale.settle, []
        end = start + self.scale.seconds
        while (now := time.monotonic()) < end:
            advance()
            if now >= start:
                samples.append(self.engine.stats().active)
        self.stop()
        return Window(start, end, answers, float(np.mean(samples or [streams])))

    def streams(self, streams: int) -> dict[str, Any]:
        """Figures of the standard load: nothing in common between the prompts."""
        return self.closed_loop(
            streams, self.scale.answer, lambda: Prompt(self.random_ids(self.scale.prompt))
        ).figures()


# --- what is measured ---------------------------------------------------------------------------------------

Figures = dict[str, Any]


def batching(driver: Driver) -> Figures:
    """One stream is one request after the other."""
    return {str(streams): driver.streams(streams) for streams in driver.scale.streams}


def crowd(driver: Driver) -> Figures:
    """More streams than a KV cache in the activations' type holds."""
    scale, info = driver.scale, driver.engine.info
    tokens = info.max_blocks * info.tokens_per_block
    fit = tokens // (scale.prompt + scale.answer)
    return {"kv_tokens": tokens, "streams_that_fit": fit, "streams": scale.crowd, **driver.streams(scale.crowd)}


def prefix(driver: Driver) -> Figures:
    """Prompts that begin alike, without and with reuse of the blocks that they share."""
    return {"off": prefix_load(driver, salted=True), "on": prefix_load(driver, salted=False)}


def prefix_load(driver: Driver, salted: bool) -> Figures:
    """By streams. `salted`: each prompt has a cache salt of its own, so that nothing is shared."""
    scale = driver.scale
    shared = driver.random_ids(scale.prefix)
    salts = itertools.count()

    def prompt() -> Prompt:
        return Prompt(shared + driver.random_ids(scale.suffix), str(next(salts)) if salted else "")

    def load(streams: int) -> Figures:
        return driver.closed_loop(streams, scale.prefix_answer, prompt).figures()

    return {str(streams): load(streams) for streams in (1, scale.prefix_streams)}


def stalls(driver: Driver) -> Figures:
    """Streams that generate, while every now and then a long prompt comes in between."""
    scale = driver.scale
    long, short = scale.max_seq_len - 2, scale.prompt // 4
    running = [driver.submit(Prompt(driver.random_ids(short)), long - short) for _ in range(scale.running)]
    while not all(answer.times for answer in running):
        driver.step()
    start = time.monotonic() + scale.settle
    due, end, arrivals = start, start + 2 * scale.seconds, []
    while (now := time.monotonic()) < end:
        if now >= due:
            due += scale.long_every
            arrivals.append(driver.submit(Prompt(driver.random_ids(scale.long_prompt)), 1))
        driver.step()
    driver.stop()
    gaps = np.concatenate([np.diff([at for at in answer.times if start <= at < end]) for answer in running])
    first = [answer.times[0] - answer.sent for answer in arrivals if answer.times]
    return {
        "running_streams": scale.running,
        "long_prompt": scale.long_prompt,
        "long_prompts": len(arrivals),
        "itl_ms": percentiles(gaps),
        "long_ttft_ms": percentiles(first),
        "tokens_per_second": round(len(gaps) / (end - start), 1),
    }


def drafting(driver: Driver) -> Figures:
    """Tokens/s of a draft model by acceptance rate and streams.

    The rate is vLLM's, made up: nothing is compared. One engine start costs a minute, so the rates are changed in
    place: a tensor with one value a draft position. vLLM on a CPU cannot make them up: there it is the draft's own.
    """
    worker = driver.engine._core.model_executor.driver_worker.worker  # type: ignore[attr-defined]
    sampler = worker.model_runner.rejection_sampler
    if getattr(sampler, "synthetic_conditional_rates", None) is None:
        return {"its own": _by_streams(driver, driver.streams)}
    result = {}
    for rate in ACCEPTANCE:
        sampler.synthetic_conditional_rates.fill_(rate)
        result[str(rate)] = _by_streams(driver, driver.streams)
    return result


def repeating(driver: Driver) -> Figures:
    """Prompts of a few words over and over: the best case for n-grams. Greedy answers of random weights loop too."""
    scale = driver.scale

    def prompt() -> Prompt:
        words = driver.random_ids(scale.prompt // 16)
        return Prompt(words * 16)

    def load(streams: int) -> Figures:
        return driver.closed_loop(streams, scale.answer, prompt).figures()

    return _by_streams(driver, load)


def _by_streams(driver: Driver, load: Callable[[int], Figures]) -> Figures:
    """Figures of a load by streams, with the draft tokens that were proposed and the share that was accepted."""
    result = {}
    for streams in driver.scale.drafting_streams:
        before = driver.engine.stats()
        figures = load(streams)
        after = driver.engine.stats()
        proposed = after.draft_tokens - before.draft_tokens
        accepted = after.accepted_draft_tokens - before.accepted_draft_tokens
        acceptance = round(accepted / proposed, 3) if proposed else None
        result[str(streams)] = {**figures, "draft_tokens": proposed, "acceptance": acceptance}
    return result


# --- configurations -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """`settings` of VllmConfig, and what is measured, in this order."""

    measured: tuple[Callable[[Driver], Figures], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    memory_gib: int = MEMORY_GIB


SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": DRAFT_TOKENS}
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFT_TOKENS, "prompt_lookup_max": 4}
CONFIGURATIONS = {
    "base": Configuration(measured=(batching, prefix, stalls, crowd)),
    "fp8-kv": Configuration(measured=(crowd,), settings={"kv_dtype": "fp8"}),
    "whole-prefill": Configuration(measured=(stalls,), settings={"chunked_prefill": False}),
    "draft-model": Configuration(measured=(drafting,), memory_gib=SPECULATION_GIB),
    "quality": Configuration(),
    "ngram": Configuration(measured=(repeating,), settings={"speculative": NGRAM}, memory_gib=SPECULATION_GIB),
}


def engine_settings(name: str, smoke: bool, models: Path) -> dict[str, Any]:
    """The keyword arguments of VllmConfig."""
    import torch

    configuration, scale = CONFIGURATIONS[name], SMOKE if smoke else LLAMA
    settings: dict[str, Any] = {
        "model": models / "target",
        "dtype": "bfloat16",
        "max_batch_size": scale.crowd,
        "max_seq_len": scale.max_seq_len,
        "max_num_tokens": scale.max_num_tokens,
        "load_format": "dummy",
        **configuration.settings,
    }
    if not settings.get("chunked_prefill", True):
        settings["max_num_tokens"] = scale.max_seq_len  # a prompt has to fit into one step
    if name == "draft-model":
        synthetic = SYNTHETIC if torch.cuda.is_available() else {}
        settings["speculative"] = {**DRAFT_MODEL, **synthetic, "model": str(models / "draft")}
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        settings["memory_fraction"] = min(configuration.memory_gib * 2**30 / total, 0.9)
    if smoke:
        width = 2 if settings.get("kv_dtype") == "fp8" else 1  # the same bytes hold twice as many tokens
        settings |= {"eager": True, "kv_tokens": 1024 * width, "load_format": "auto"}
        settings["tokens_per_block"] = 32  # what vLLM's FP8 kernels for CPUs want
    return settings


def worker(name: str, smoke: str, models: str, out: str) -> None:
    """The process of one configuration: writes what it has after each measurement."""
    from roundhouse.engine.vllm.config import VllmConfig
    from roundhouse.engine.vllm.engine import VllmEngine

    result: dict[str, Any] = {}
    small = smoke == "smoke"
    if name == "quality":
        Path(out).write_text(json.dumps(quality(SMOKE if small else LLAMA)))
        return
    begun = time.monotonic()
    engine = VllmEngine(VllmConfig(**engine_settings(name, small, Path(models))))
    result["load_seconds"] = round(time.monotonic() - begun, 1)
    result["kv_tokens"] = engine.info.max_blocks * engine.info.tokens_per_block
    driver = Driver(engine, SMOKE if small else LLAMA)
    driver.streams(4)  # first steps compile and fill caches
    for measure in CONFIGURATIONS[name].measured:
        print(f"{time.strftime('%H:%M:%S')} {name}: {measure.__name__}", flush=True)
        result[measure.__name__] = measure(driver)
        Path(out).write_text(json.dumps(result))
    engine.close()


# --- quality --------------------------------------------------------------------------------------------------


def quality(scale: Scale) -> dict[str, Any]:
    """models/tiny answers its held-out questions with both types of KV cache; then each expected answer's tokens get
    their log probs."""
    import torch
    from tiny_model import evaluate, skills
    from tokenizers import Tokenizer

    from roundhouse.engine.vllm.config import VllmConfig
    from roundhouse.engine.vllm.engine import VllmEngine

    model = ROOT / "models/tiny"
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    asked = [q for skill in skills.EXACT_SKILLS for q in evaluate.draw_questions(tokenizer, skill, scale.questions, 1)]
    settings: dict[str, Any] = {"model": model, "dtype": "bfloat16", "max_batch_size": 256, "eager": True}
    settings |= {"kv_tokens": 65536, "tokens_per_block": 32}
    if torch.cuda.is_available():
        settings["memory_fraction"] = 0.2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result: dict[str, Any] = {"device": device, "questions": len(asked)}
    answers, log_probs = {}, {}
    for kv_dtype in ("auto", "fp8"):
        engine = VllmEngine(VllmConfig(kv_dtype=kv_dtype, **settings))
        answers[kv_dtype] = exact_answers(engine, asked, evaluate.END_IDS)
        log_probs[kv_dtype] = expected_log_probs(engine, asked[:: max(len(asked) // 60, 1)])
        engine.close()
        right = sum(given == q.expected for given, q in zip(answers[kv_dtype], asked, strict=True))
        result[kv_dtype] = {"exact_percent": round(100 * right / len(asked), 2)}
    same = sum(a == b for a, b in zip(answers["auto"], answers["fp8"], strict=True))
    moved = np.subtract(log_probs["fp8"], log_probs["auto"])
    drift = moved[np.isfinite(moved)]
    return result | {
        "equal_answers_percent": round(100 * same / len(asked), 2),
        "log_prob_tokens": len(drift),
        "log_probs_not_finite": len(moved) - len(drift),
        "log_prob_drift": {
            "mean": round(float(drift.mean()), 5),
            "mean_absolute": round(float(np.abs(drift).mean()), 5),
            "p99_absolute": round(float(np.percentile(np.abs(drift), 99)), 5),
        },
    }


def exact_answers(engine: Engine, asked: list[Any], end_ids: tuple[int, ...]) -> list[list[int]]:
    """Greedy answers, up to the length of the expected ones."""
    from roundhouse.engine.protocol import Request, Sampling

    given: list[list[int]] = [[] for _ in asked]
    for id, question in enumerate(asked):
        length = len(question.expected)
        prompt, sampling = tuple(question.ids), Sampling(temperature=0.0)
        engine.submit(Request(id, prompt=prompt, max_tokens=length, end_ids=end_ids, sampling=sampling))
    while engine.unfinished():
        for output in engine.step():
            given[output.id] += output.tokens
    return given


def expected_log_probs(engine: Engine, asked: list[Any]) -> list[float]:
    """The log prob of every token of every expected answer, after those before it.

    A bias makes the engine choose that token; log probs are those of the model, before the bias.
    """
    from roundhouse.engine.protocol import Request, Sampling

    pairs = [(q.ids + q.expected[:n], token) for q in asked for n, token in enumerate(q.expected)]
    for id, (prompt, token) in enumerate(pairs):
        sampling = Sampling(temperature=0.0, logit_bias={token: 1000.0})
        engine.submit(Request(id, prompt=tuple(prompt), max_tokens=1, log_probs=True, sampling=sampling))
    values = [0.0] * len(pairs)
    while engine.unfinished():
        for output in engine.step():
            if output.log_probs:
                values[output.id] = output.log_probs[0]
    return values


# --- results --------------------------------------------------------------------------------------------------


def plot(configurations: dict[str, Any], path: Path, title: str) -> None:
    """One picture for each optimisation that has figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.5))
    panels = (_plot_batching, _plot_crowd, _plot_prefix, _plot_stalls, _plot_speculation, _plot_quality)
    for axis, draw in zip(axes.flat, panels, strict=True):
        try:
            draw(axis, configurations)
        except (KeyError, TypeError):  # a cut-off run, or nothing came in its time
            axis.set_title(f"not measured ({draw.__name__.removeprefix('_plot_')})")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


def _bars(axis: Any, names: list[str], values: list[float], label: str, title: str) -> None:
    axis.bar_label(axis.bar(names, values), fmt="{:,.4g}")
    axis.set(ylabel=label, title=title)
    axis.margins(y=0.15)


def _rates(points: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [int(key) for key in points], [point["tokens_per_second"] for point in points.values()]


def _plot_batching(axis: Any, of: dict[str, Any]) -> None:
    axis.plot(*_rates(of["base"]["batching"]), marker="o")
    axis.set(xlabel="streams", ylabel="tokens/s", ylim=(0, None), title="continuous batching")


def _plot_crowd(axis: Any, of: dict[str, Any]) -> None:
    crowds = {"KV auto": of["base"]["crowd"], "KV FP8": of["fp8-kv"]["crowd"]}
    names = [f"{name}\n{point['kv_tokens']:,} tokens" for name, point in crowds.items()]
    streams = of["base"]["crowd"]["streams"]
    _bars(axis, names, [p["tokens_per_second"] for p in crowds.values()], "tokens/s", f"{streams} streams, same memory")


def _plot_prefix(axis: Any, of: dict[str, Any]) -> None:
    points = {
        f"{key}, {n} streams": of["base"]["prefix"][key][n] for key in ("off", "on") for n in of["base"]["prefix"][key]
    }
    names = [name.replace(", ", "\n") for name in points]
    _bars(axis, names, [p["ttft_ms"]["p50"] for p in points.values()], "TTFT p50, ms", "shared prefix: reuse off, on")


def _plot_stalls(axis: Any, of: dict[str, Any]) -> None:
    points = {"whole": of["whole-prefill"]["stalls"], "chunked": of["base"]["stalls"]}
    _bars(axis, list(points), [p["itl_ms"]["p99"] for p in points.values()], "ITL p99, ms", "while long prompts arrive")


def _plot_speculation(axis: Any, of: dict[str, Any]) -> None:
    alone = of["base"]["batching"]
    curves = {f"draft model, {rate}": points for rate, points in of["draft-model"]["drafting"].items()}
    if "ngram" in of:
        curves["n-gram"] = of["ngram"]["repeating"]
    for name, points in curves.items():
        streams = [key for key in points if key in alone]
        gain = [points[key]["tokens_per_second"] / alone[key]["tokens_per_second"] for key in streams]
        axis.plot([int(key) for key in streams], gain, marker="o", label=name)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xlabel="streams", xscale="log", ylabel="tokens/s, times those without", title="speculation by acceptance")
    axis.legend()


def _plot_quality(axis: Any, of: dict[str, Any]) -> None:
    measured = of["quality"]
    values = [measured[key]["exact_percent"] for key in ("auto", "fp8")]
    _bars(axis, ["KV auto", "KV FP8"], values, "exact answers, %", "models/tiny, held-out questions")


def make_models(smoke: bool, folder: Path) -> None:
    """Target and draft of the Llama shapes; for the smoke run, links to the shipped models."""
    folder.mkdir(parents=True, exist_ok=True)
    if smoke:
        for name, model in (("target", "tiny"), ("draft", "tiny-draft")):
            with suppress(FileExistsError):
                (folder / name).symlink_to(ROOT / "models" / model)
        return
    if (folder / "draft/config.json").exists():
        return
    print(f"making the model folders in {folder}", flush=True)
    make_model(folder / "target")
    make_model(folder / "draft")
    path = folder / "draft/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **DRAFT_SHAPE}, indent=1))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one configuration. What it measured before a failure or the time limit is kept, with an `error`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        kind = "smoke" if args.smoke else "full"
        command = [ENGINE_PYTHON, __file__, "--worker", name, kind, str(args.models), str(out)]
        log = args.logs / f"optimisations-{name}.log"
        print(f"{time.strftime('%H:%M:%S')} {name}: loading; its log is {log}", flush=True)
        begun, error = time.monotonic(), None
        with log.open("w") as output:
            try:
                subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True, timeout=args.timeout)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
                error = f"{type(problem).__name__}: {' '.join(log.read_text(errors='replace').splitlines()[-1:])}"
                print(f"{name} failed: {error}", flush=True)
        result = json.loads(out.read_text()) if out.exists() else {}
        result |= {"wall_seconds": round(time.monotonic() - begun, 1)} | ({"error": error} if error else {})
        print(f"{time.strftime('%H:%M:%S')} {name}: {json.dumps(result)}", flush=True)
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="configurations, in this order")
    parser.add_argument("--smoke", action="store_true", help="models/tiny and loads of a second")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one configuration may take")
    parser.add_argument("--models", type=Path, help="folder of the model shapes; made if need be")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=BENCHMARKS)
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    if unknown := set(names) - CONFIGURATIONS.keys():
        parser.error(f"--only: unknown {', '.join(sorted(unknown))} (known: {', '.join(CONFIGURATIONS)})")
    args.models = args.models or Path(tempfile.gettempdir()) / f"roundhouse-shapes{'-smoke' * args.smoke}"
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "gpu-optimisations.json"
    result = json.loads(path.read_text()) if path.exists() else {"configurations": {}}
    if names:
        make_models(args.smoke, args.models)
        scale = SMOKE if args.smoke else LLAMA
        result |= {"hardware": hardware(), "versions": versions(), "settings": asdict(scale), "smoke": args.smoke}
        result["memory_gib"] = {"base": MEMORY_GIB, "speculation": SPECULATION_GIB}
    failed = 0
    for name in names:
        measured = measure(name, args)
        failed += "error" in measured
        result["configurations"][name] = measured
        path.write_text(json.dumps(result, indent=1) + "\n")
    if not result["smoke"]:
        (args.output / "optimisations.md").write_text(page(result, DRAFT_TOKENS))
    with suppress(ImportError):  # a GPU host without matplotlib keeps the JSON; --only '' draws it elsewhere
        title = f"{'models/tiny (smoke)' if result['smoke'] else 'Llama-3-8B shape, bf16'}, {result['hardware']['gpu']}"
        plot(result["configurations"], path.with_suffix(".png"), title)
    print(f"written to {path}")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        sys.exit(main())
