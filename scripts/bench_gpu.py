"""Measure on a GPU what a serving path leaves of the engine's token rate, closed loop, streaming.

    .venv/bin/python scripts/bench_gpu.py --precision fp8 --targets raw,vllm-4,roundhouse --streams 1,64,256,512

Targets: `raw` (vLLM's engine core stepped without a server; requests are made ready between steps), `raw-attended` (the
same, but while the GPU computes, as ours does behind a server), `vllm-1` and `vllm-4` (`vllm serve` with so many API
servers), `vllm-rust` (its Rust front end), `roundhouse` (`tensorrt_llm_bls`, `ensemble` and the OpenAI-compatible door
of one server). All of them get the same model (Llama-3-8B shape, random weights, a tokenizer of 128,256 entries that
this script makes), the same engine settings, prompts of 512 tokens and answers of 256, sampled at temperature 1. All
streams start at once, and each sends its next request when it has its answer. Clients are processes of their own on the
same machine, which start together. With --side-by-side all servers are up at once, and each run of one is followed by
one of the next, so that they share the GPU and the minutes:

    .venv/bin/python scripts/bench_gpu.py --side-by-side --memory-fraction 0.3 --targets roundhouse,vllm-4,vllm-rust

and one of ours for each of --responses-per-second 4000,1000. With --client-cores the clients keep to these cores, and
taskset keeps the servers off them:

    taskset -c 0-9 .venv/bin/python scripts/bench_gpu.py --client-cores 10-15

ROUNDHOUSE_ENGINE_PYTHON names the interpreter that has vLLM (default: this one). Writes
docs/benchmarks/gpu-PRECISION.json, or gpu-PRECISION-side-by-side.json; what was not asked for keeps its figures there.
scripts/gpu_report.py makes plots and a page of both, also on another machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from bench_path import machine, wait_ready

from roundhouse.bench.servers import free_ports

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs/benchmarks"
ENGINE_PYTHON = os.environ.get("ROUNDHOUSE_ENGINE_PYTHON", sys.executable)
PROMPT, ANSWER = 512, 256  # tokens
CLIENTS = 8  # processes
VOCABULARY, SPECIAL = 128256, 256
LONGEST_START, LONGEST_ENDING = 8, 4  # characters of what an entry of the vocabulary is merged from
OURS = {"tensorrt_llm_bls": "grpc", "ensemble": "grpc", "openai": "sse"}  # what one server offers -> kind of client
RAW = ("raw", "raw-attended")
TARGETS = r"raw|raw-attended|roundhouse|vllm-(\d+|rust)"
PERCENTILES = (50, 95, 99)
ROUNDS = {1: 12, 64: 6, 256: 4, 1 << 20: 2}  # streams, at most -> requests of each
LOAD_SECONDS = 120  # a load that takes longer has failed
MEMORY_TOGETHER = 0.94  # of the GPU, for all servers: what vLLM does not count, contexts and graphs, takes the rest
START_SECONDS = 400  # vLLM's first start on a machine, which compiles
SETTINGS = {"max_batch_size": 512, "max_seq_len": 2048, "max_num_tokens": 8192}
FRONTS = ("preprocessing", "tensorrt_llm", "tensorrt_llm_bls")


# --- the model: a real shape and a real tokenizer, random weights -----------------------------------------


def make_model(folder: Path) -> None:
    """A model folder without weights, for `load_format: dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": VOCABULARY - SPECIAL,
        "eos_token_id": VOCABULARY - SPECIAL + 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(make_tokenizer())
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special(0), "eos_token": special(1)}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def special(index: int) -> str:
    return f"<|special_{index}|>"


def make_tokenizer() -> str:
    """A byte-level BPE tokenizer as JSON: 256 bytes, merges of made-up words, special tokens; 128,256 entries."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    chance = random.Random(3)
    vocabulary = {entry: index for index, entry in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    endings = list("abcdefghijklmnopqrstuvwxyz")  # what a merge may end with
    starts = {"\u0120": ["\u0120"], "": list(endings)}  # what it may start with: a leading space, or in a word
    merges: list[tuple[str, str]] = []
    while len(vocabulary) < VOCABULARY - SPECIAL:
        kind = chance.choice(("\u0120", ""))
        left, right = chance.choice(starts[kind]), chance.choice(endings)
        if left + right in vocabulary:
            continue
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
        if len(left + right) <= LONGEST_START:
            starts[kind].append(left + right)
        if kind == "" and len(left + right) <= LONGEST_ENDING:
            endings.append(left + right)
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special(index), special=True) for index in range(SPECIAL)])
    return str(tokenizer.to_str())


@dataclass(frozen=True)
class Prompts:
    """Texts of exactly PROMPT tokens: an opener of one token, then one of `bodies`.

    Each load has an opener of its own, so that no prefix cache has seen any of its prompts before.
    """

    openers: list[str]
    bodies: list[str]


def make_prompts(model: Path, count: int, seed: int) -> Prompts:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    chance = random.Random(seed)
    words = [entry.replace("\u0120", " ") for entry in tokenizer.get_vocab() if entry.startswith("\u0120")]
    # Merged in order some of these entries come out as two tokens. vLLM's Rust front end takes them whole: with such
    # words its prompts would be shorter than those of all others.
    whole_words = [
        word for word, its in zip(words, tokenizer.encode_batch_fast(words), strict=True) if len(its.ids) == 1
    ]
    bodies = ["".join(chance.choices(whole_words, k=PROMPT - 1)) for _ in range(count)]
    openers = chance.sample(whole_words, 100)
    prompts = [openers[index % len(openers)] + body for index, body in enumerate(bodies)]
    assert all(len(encoding.ids) == PROMPT for encoding in tokenizer.encode_batch_fast(prompts))
    return Prompts(openers, bodies)


# --- clients ---------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """When a request was sent, and when each chunk with text or tokens came. `server`: its own times, by tensor."""

    sent: float
    times: list[float] = field(default_factory=list)
    server: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """One client process's part of a load. `kind`: grpc (a Triton model) or sse (an OpenAI completions server).
    `timed`: ask for the server's own times too; grpc only."""

    kind: str
    address: str
    model: str
    streams: int
    rounds: int
    opener: str
    bodies: list[str]
    timed: bool = False


@dataclass(frozen=True)
class Served:
    """Something to measure. `model`, `kind`: see Load. `process`: the server's."""

    name: str
    model: str
    kind: str
    address: str
    process: psutil.Process


@dataclass(frozen=True)
class Run:
    """One load: its answers, and CPU seconds of all clients and of the server."""

    answers: list[Answer]
    client: float
    server: float


def run_load(
    served: Served,
    streams: int,
    rounds: int,
    prompts: Prompts,
    *,
    cores: frozenset[int] | None = None,
    timed: bool = False,
) -> Run:
    """A closed loop. Uses up one opener. `cores`: where the clients run; None for anywhere."""
    clients = min(CLIENTS, streams)
    opener = prompts.openers.pop()
    shares = [streams // clients + (index < streams % clients) for index in range(clients)]
    loads = [
        Load(served.kind, served.address, served.model, share, rounds, opener, prompts.bodies[index::clients], timed)
        for index, share in enumerate(shares)
    ]
    before = cpu_seconds(served.process)
    context = multiprocessing.get_context("spawn")
    with context.Pool(clients, prepare_client, (context.Barrier(clients), cores)) as pool:
        parts = pool.map(client, loads, chunksize=1)
    spent = sum(value - before.get(pid, 0.0) for pid, value in cpu_seconds(served.process).items())
    return Run([answer for answers, _ in parts for answer in answers], sum(cpu for _, cpu in parts), spent)


def prepare_client(barrier: Any, cores: frozenset[int] | None) -> None:
    """In a client process: remember where all of them meet before they start."""
    global _barrier
    _barrier = barrier
    if cores is not None:
        os.sched_setaffinity(0, cores)


_barrier: Any = None


def client(load: Load) -> tuple[list[Answer], float]:
    return asyncio.run(closed_loop(load))


async def closed_loop(load: Load) -> tuple[list[Answer], float]:
    """Answers, and CPU seconds; both from when all clients have imported and connected what they need."""
    answers: list[Answer] = []
    send = await (grpc_sender(load) if load.kind == "grpc" else sse_sender(load))

    async def stream(index: int) -> None:
        for number in range(load.rounds):
            answers.append(answer := Answer(time.monotonic()))
            await send(load.opener + load.bodies[(index + number * load.streams) % len(load.bodies)], answer)

    await asyncio.to_thread(_barrier.wait, LOAD_SECONDS)
    begun = time.process_time()
    async with asyncio.timeout(LOAD_SECONDS), asyncio.TaskGroup() as group:
        for index in range(load.streams):
            group.create_task(stream(index))
    return answers, time.process_time() - begun


async def grpc_sender(load: Load) -> Any:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    channels = [grpc.aio.insecure_channel(load.address, options=[("channel", index)]) for index in range(4)]
    stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))

    def message(text: str) -> Any:
        request = service_pb2.ModelInferRequest(model_name=load.model)
        data = text.encode()
        inputs = [
            ("text_input", "BYTES", len(data).to_bytes(4, "little") + data),
            ("max_tokens", "INT32", ANSWER.to_bytes(4, "little")),
            ("stream", "BOOL", b"\1"),
            ("end_id", "INT32", (1 << 20).to_bytes(4, "little")),
            ("temperature", "FP32", np.float32(1).tobytes()),
        ]
        if load.timed:
            inputs.append(("return_perf_metrics", "BOOL", b"\1"))
        for name, datatype, raw in inputs:
            request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
            request.raw_input_contents.append(raw)
        return request

    async def send(text: str, answer: Answer) -> None:
        stub = stubs[id(answer) // 64 % len(stubs)]
        async for response in stub.ModelStreamInfer(iter([message(text)])):
            if response.error_message:
                raise RuntimeError(response.error_message)
            answer.times.append(time.monotonic())
        if load.timed:
            given = response.infer_response
            for output, raw in zip(given.outputs, given.raw_output_contents, strict=True):
                if output.name.endswith("_time_ns"):
                    answer.server[output.name] = int.from_bytes(raw, "little") / 1e9

    return send


async def sse_sender(load: Load) -> Any:
    host, port = load.address.split(":")

    async def send(text: str, answer: Answer) -> None:
        fields = {"model": load.model, "prompt": text, "max_tokens": ANSWER, "temperature": 1.0}
        body = json.dumps({**fields, "stream": True, "ignore_eos": True}).encode()
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {load.address}\r\nContent-Type: application/json\r\n"
            writer.write(head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError((status + await reader.read(2000)).decode(errors="replace"))
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    if b'"error"' in line:
                        raise RuntimeError(line.decode(errors="replace"))
                    answer.times.append(time.monotonic())
                elif line.startswith(b"data: [DONE]"):
                    return
            raise RuntimeError("the connection ended in the middle of an answer")
        finally:
            writer.close()

    return send


# --- figures -----------------------------------------------------------------------------------------------


def figures(runs: list[list[Answer]]) -> dict[str, Any]:
    """Rate and latencies of whole answers, of all runs together.

    tokens/s: all tokens, from the first request to the last chunk. TTFT: from sending to the first chunk. TPOT:
    (last - first chunk) / (tokens - 1). ITL: between neighbouring chunks, all of them together.
    """
    answers = [answer for run in runs for answer in run]
    measured = {
        "ttft_ms": [a.times[0] - a.sent for a in answers],
        "tpot_ms": [(a.times[-1] - a.times[0]) / (ANSWER - 1) for a in answers],
        "itl_ms": np.concatenate([np.diff(a.times) for a in answers]),
        "end_to_end_ms": [a.times[-1] - a.sent for a in answers],
    }
    lengths = [max(a.times[-1] for a in run) - min(a.sent for a in run) for run in runs]
    seconds = sum(lengths)
    result: dict[str, Any] = {
        "tokens_per_second": round(len(answers) * ANSWER / seconds, 1),
        "runs": [round(len(run) * ANSWER / length, 1) for run, length in zip(runs, lengths, strict=True)],
        "seconds": round(seconds, 2),
        "answers": len(answers),
        "chunks_per_answer": round(sum(len(a.times) for a in answers) / len(answers), 1),
    }
    for name, values in measured.items():
        result[name] = {f"p{p}": round(1e3 * float(np.percentile(values, p)), 2) for p in PERCENTILES}
    return result


def first_token_parts(answers: Sequence[Answer]) -> dict[str, float]:
    """Where the time to a first token goes, ms in the median: on the way to the front that has the request, from there
    until the engine has scheduled it (`tensorrt_llm_bls` tokenises here, the ensemble before), in the engine, on the
    way to the client. All processes read one clock."""
    marks = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns")
    times = np.array([[a.sent, *(a.server[mark] for mark in marks), a.times[0]] for a in answers])
    parts = 1e3 * np.median(np.diff(times), axis=0)
    names = ("to_front", "to_engine", "in_engine", "to_client")
    return {name: round(float(part), 2) for name, part in zip(names, parts, strict=True)}


def cpu_seconds(process: psutil.Process) -> dict[int, float]:
    """CPU time of each process of a tree, by process id."""
    spent = {}
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            times = one.cpu_times()
            spent[one.pid] = times.user + times.system
    return spent


def core_list(text: str) -> frozenset[int]:
    """The cores of a list as taskset has it: 10-15,26."""
    ranges = (part.partition("-") for part in text.split(","))
    return frozenset(core for first, _, last in ranges for core in range(int(first), int(last or first) + 1))


def rounds(streams: int) -> int:
    """Requests that each stream sends: more where they are short."""
    return next(count for limit, count in ROUNDS.items() if streams <= limit)


Measured = Iterator[tuple[str, int, dict[str, Any]]]  # target, streams, its figures


def measure(served: Sequence[Served], prompts: Prompts, args: argparse.Namespace) -> Measured:
    """All numbers of streams on all that is served; run by run in turn, so that all of them meet the same minutes."""
    load = partial(run_load, prompts=prompts, cores=args.client_cores)
    for one in served:
        if one.kind == "sse":
            check_lengths(one, prompts)
        load(one, 8, 2)  # the first requests compile and fill caches
    for streams in args.streams:
        runs: dict[str, list[Run]] = {one.name: [] for one in served}
        for turn in range(args.repeats):
            for one in served if turn % 2 == 0 else reversed(served):  # none always comes after the same other
                runs[one.name].append(load(one, streams, rounds(streams)))
        timed = {
            one.name: first_token_parts(load(one, 1, rounds(1), timed=True).answers)
            for one in served
            if streams == 1 and one.kind == "grpc"
        }
        for name, its in runs.items():
            point = figures([run.answers for run in its])
            if name in timed:
                point["first_token_ms"] = timed[name]
            point["server_cores"] = round(sum(run.server for run in its) / point["seconds"], 2)
            point["client_cores"] = round(sum(run.client for run in its) / point["seconds"], 2)
            tell(name, streams, point)
            yield name, streams, point


def check_lengths(one: Served, prompts: Prompts) -> None:
    """Raises ValueError if the server counts other tokens in some of the prompts than we do. Uses up one opener."""
    opener = prompts.openers.pop()
    for body in prompts.bodies[:16]:
        fields = {"model": one.model, "prompt": opener + body, "max_tokens": 1}
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://{one.address}/v1/completions", json.dumps(fields).encode(), headers)
        with urllib.request.urlopen(asked, timeout=LOAD_SECONDS) as answer:
            counted = json.load(answer)["usage"]["prompt_tokens"]
        if counted != PROMPT:
            raise ValueError(f"{one.name}: a prompt of {PROMPT} tokens has {counted} there; the load is not the same")


def tell(name: str, streams: int, point: dict[str, Any]) -> None:
    shown = {key: value.get("p50", value) if isinstance(value, dict) else value for key, value in point.items()}
    print(f"{time.strftime('%H:%M:%S')} {name} {streams}: {shown}", flush=True)


# --- targets -----------------------------------------------------------------------------------------------


def target_raw(model: Path, args: argparse.Namespace, names: Sequence[str]) -> Measured:
    """vLLM's engine core in a process of its own: token ids in, token ids out."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "deployment.yaml", Path(folder) / "raw.json"
        path.write_text(yaml.safe_dump(deployment(model, args, args.responses_per_second[0])))
        asked = [",".join(names), ",".join(map(str, args.streams)), str(args.repeats)]
        subprocess.run([ENGINE_PYTHON, __file__, "--step-engine", str(path), *asked, str(out)], check=True)
        yield from json.loads(out.read_text())


def step_engine(path: str, names: str, streams: str, repeats: str, out: str) -> None:
    """The process of `raw` and `raw-attended`: closed loops around `step`."""
    from roundhouse import deployment as deployments
    from roundhouse.engine.load import load_engine
    from roundhouse.engine.protocol import Request, Sampling

    engine = load_engine(deployments.load(path))
    chance = np.random.default_rng(5)

    def closed_loop(streams: int, rounds: int, submitting: list[float], *, attended: bool) -> list[Answer]:
        """`submitting`: gets the seconds of each request."""
        answers: list[Answer] = []
        left = dict.fromkeys(range(streams), rounds)
        live: dict[int, int] = {}  # request -> stream
        due = list(left)  # streams whose next request is due, from the last step on

        def submit(waiting: list[int]) -> None:
            while waiting:
                left[stream := waiting.pop()] -= 1
                answers.append(Answer(time.monotonic()))
                prompt = tuple(chance.integers(0, VOCABULARY - SPECIAL, PROMPT).tolist())
                live[len(answers)] = stream
                request = Request(id=len(answers), prompt=prompt, max_tokens=ANSWER, sampling=Sampling())
                begun = time.perf_counter()
                engine.submit(request)
                submitting.append(time.perf_counter() - begun)

        while due or engine.unfinished():
            waiting, due = due, []
            if not attended or not engine.unfinished():
                submit(waiting)
            engine.meanwhile = partial(submit, waiting)
            outputs = engine.step()
            submit(waiting)  # those for whom the wait was too short
            for output in outputs:
                answers[output.id - 1].times += [time.monotonic()] * len(output.tokens)
                if output.last and left[live[output.id]]:
                    due.append(live[output.id])
        return answers

    closed_loop(8, 2, [], attended=False)
    points = []
    for count in map(int, streams.split(",")):
        runs: dict[str, list[list[Answer]]] = {name: [] for name in names.split(",")}
        submitting: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(int(repeats)):
            for name in runs if turn % 2 == 0 else reversed(runs):
                its = closed_loop(count, rounds(count), submitting[name], attended=name == "raw-attended")
                runs[name].append(its)
        for name, its_runs in runs.items():
            point = figures(its_runs)
            spent = np.percentile(submitting[name], PERCENTILES)
            point["submit_ms"] = {f"p{p}": round(1e3 * float(s), 3) for p, s in zip(PERCENTILES, spent, strict=True)}
            tell(name, count, point)
            points.append((name, count, point))
    Path(out).write_text(json.dumps(points))
    engine.close()


@contextmanager
def vllm_server(model: Path, args: argparse.Namespace, name: str) -> Iterator[list[Served]]:
    (port,) = free_ports(1)
    command = [ENGINE_PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy"]
    command += ["--max-model-len", str(SETTINGS["max_seq_len"]), "--max-num-seqs", str(SETTINGS["max_batch_size"])]
    command += ["--max-num-batched-tokens", str(SETTINGS["max_num_tokens"])]
    command += ["--gpu-memory-utilization", str(args.memory_fraction)]
    if args.precision == "fp8":
        command += ["--quantization", "fp8", "--kv-cache-dtype", "fp8"]
    environment = dict(os.environ)
    if name == "vllm-rust":
        environment["VLLM_USE_RUST_FRONTEND"] = "1"
    else:
        command += ["--api-server-count", name.removeprefix("vllm-"), "--disable-uvicorn-access-log"]
    with started(command, f"http://127.0.0.1:{port}/health", args.logs / f"{name}.log", environment) as process:
        yield [Served(name, name, "sse", f"127.0.0.1:{port}", process)]


@contextmanager
def roundhouse_server(model: Path, args: argparse.Namespace, pace: int) -> Iterator[list[Served]]:
    """`pace`: responses a second of each front; told in the names where there are several."""
    mark = f"@{pace}" if len(args.responses_per_second) > 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deployment.yaml"
        path.write_text(yaml.safe_dump(deployment(model, args, pace)))
        http, grpc, metrics, openai = free_ports(4)
        command = [sys.executable, "-m", "roundhouse.cli", "serve", str(path), "--http-port", str(http)]
        command += ["--grpc-port", str(grpc), "--metrics-port", str(metrics), "--openai-port", str(openai)]
        with started(command, f"http://127.0.0.1:{openai}/ready", args.logs / f"roundhouse{mark}.log") as process:
            ports = {"grpc": grpc, "sse": openai}
            yield [
                Served(name + mark, name, OURS[name], f"127.0.0.1:{ports[OURS[name]]}", process) for name in args.models
            ]


def servers(names: Sequence[str], prompts: Prompts, args: argparse.Namespace) -> Measured:
    """These servers at the same time."""
    with ExitStack() as stack:
        served: list[Served] = []
        for name in names:
            if name == "roundhouse":
                for pace in args.responses_per_second:
                    served += stack.enter_context(roundhouse_server(args.model, args, pace))
            else:
                served += stack.enter_context(vllm_server(args.model, args, name))
        yield from measure(served, prompts, args)


def deployment(model: Path, args: argparse.Namespace, pace: int) -> dict[str, Any]:
    fp8 = args.precision == "fp8"
    return {
        "model": {"path": str(model)},
        "engine": {"kind": "vllm", "memory_fraction": args.memory_fraction, "load_format": "dummy"},
        "precision": {"weights": "fp8" if fp8 else "bfloat16", "kv_cache": "fp8" if fp8 else "auto"},
        "limits": {
            **SETTINGS,
            "queue": 1024,
        },
        "kv_cache": {"tokens_per_block": 16},
        "scheduling": {"policy": "max_utilization"},
        "fronts": {**dict.fromkeys(FRONTS, args.fronts), "responses_per_second": pace},
        "openai": {"workers": 4, "models": ["openai"], "access_log": False},
    }


@contextmanager
def started(
    command: list[str], url: str, log: Path, environment: dict[str, str] | None = None
) -> Iterator[psutil.Process]:
    """A server that is ready; it and all that it started ends with the block."""
    print(f"{time.strftime('%H:%M:%S')} starting {' '.join(command)}", flush=True)
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    process = psutil.Process(server.pid)
    try:
        wait_ready(url, server, seconds=START_SECONDS)
        yield process
    except (Exception, SystemExit):
        print(f"--- the end of {log}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
        raise
    finally:
        family = [process]
        with suppress(psutil.Error):  # it may have ended by itself
            family += process.children(recursive=True)
        server.terminate()
        _, alive = psutil.wait_procs(family, timeout=15)
        for one in alive:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(alive, timeout=10)


# --- results -----------------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with suppress(OSError):
        return {**machine(), "gpu": subprocess.run(query, capture_output=True, text=True).stdout.strip()}
    return {**machine(), "gpu": "none"}


def versions() -> dict[str, str]:
    code = "import torch, vllm; print(torch.__version__, vllm.__version__)"
    given = subprocess.run([ENGINE_PYTHON, "-c", code], capture_output=True, text=True).stdout.split()
    return dict(zip(("torch", "vllm"), given[-2:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="fp8")
    parser.add_argument("--targets", default="raw,vllm-1,vllm-4,vllm-rust,roundhouse")
    parser.add_argument("--models", default=",".join(OURS), help="what of `roundhouse` is measured")
    parser.add_argument("--streams", default="1,64,256,512")
    parser.add_argument("--repeats", type=int, default=1, help="of each load; their answers count together")
    parser.add_argument("--fronts", type=int, default=4, help="instances of each model in front of the engine")
    parser.add_argument("--responses-per-second", default="4000", help="pace of each front; more: a server for each")
    parser.add_argument("--side-by-side", action="store_true", help="all servers at once, loaded in turn; without raw")
    parser.add_argument("--client-cores", type=core_list, help="of the clients alone, as 10-15,26-31; default: any")
    parser.add_argument("--memory-fraction", type=float, default=0.9, help="of the GPU, for each server")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "roundhouse-llama-3-8b-shape")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=BENCHMARKS)
    args = parser.parse_args()
    args.streams = [int(text) for text in args.streams.split(",")]
    args.models = args.models.split(",")
    args.responses_per_second = [int(text) for text in args.responses_per_second.split(",")]
    if unknown := set(args.models) - OURS.keys():
        parser.error(f"--models: unknown {', '.join(sorted(unknown))} (known: {', '.join(OURS)})")
    names = args.targets.split(",")
    if unknown := {name for name in names if not re.fullmatch(TARGETS, name)}:
        parser.error(
            f"--targets: unknown {', '.join(sorted(unknown))} (known: raw, raw-attended, vllm-1, vllm-4, ..., "
            "vllm-rust, roundhouse)"
        )
    if args.side_by_side and set(RAW) & set(names):
        parser.error("--targets: raw has no server, so it has no place in --side-by-side; leave it out")
    paces = len(args.responses_per_second)
    if paces > 1 and not args.side_by_side:
        parser.error("--responses-per-second: several are for --side-by-side")
    together = len(names) + (paces - 1) * ("roundhouse" in names) if args.side_by_side else 1
    if together * args.memory_fraction > MEMORY_TOGETHER:
        parser.error(
            f"--memory-fraction {args.memory_fraction}: {together} servers at once may have {MEMORY_TOGETHER} of the "
            f"GPU together; give each at most {int(100 * MEMORY_TOGETHER / together) / 100}"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its servers end with it
    if not (args.model / "tokenizer_config.json").exists():
        print(f"making the model folder {args.model}", flush=True)
        make_model(args.model)
    prompts = make_prompts(args.model, 4096, 1)
    path = args.output / f"gpu-{args.precision}{'-side-by-side' if args.side_by_side else ''}.json"
    result = json.loads(path.read_text()) if path.exists() else {"targets": {}, "commands": []}
    shown = {"prompt_tokens": PROMPT, "answer_tokens": ANSWER, "clients": CLIENTS, **SETTINGS}
    shown |= {"fronts": dict.fromkeys(FRONTS, args.fronts), "cores_of_servers": len(os.sched_getaffinity(0))}
    if args.client_cores is not None:
        shown["cores_of_clients"] = len(args.client_cores)
    result |= {"precision": args.precision, "hardware": hardware(), "versions": versions(), "settings": shown}
    result["commands"].append(" ".join(sys.argv))
    raw = [name for name in names if name in RAW]  # in one process, in turn
    alone = [[name] for name in names if name not in RAW]
    for group in [names] if args.side_by_side else filter(None, [raw, *alone]):
        measured = target_raw(args.model, args, raw) if group == raw else servers(group, prompts, args)
        try:
            for target, streams, point in measured:
                point["memory_fraction"] = args.memory_fraction
                result["targets"].setdefault(target, {})[str(streams)] = point
                path.write_text(json.dumps(result, indent=1) + "\n")
        except (Exception, SystemExit) as error:  # one target's failure costs no other its figures
            print(f"{', '.join(group)} failed: {error!r}", flush=True)
    print(f"written to {path}; scripts/gpu_report.py draws the plots and writes the page")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step-engine"]:
        step_engine(*sys.argv[2:])
    else:
        main()
