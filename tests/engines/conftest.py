"""The engines under test, and how to drive one."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from roundhouse.engine.base import Engine
from roundhouse.engine.protocol import Feature, Output, Request, Sampling
from tests.doubles.engines import DOUBLES, write_engine
from tests.engines import vllm_engines

GREEDY = Sampling(temperature=0.0)
VOCAB_SIZE = 256


class Limits:
    """What every engine under test is built with; a test changes what it is about."""

    def __init__(self, **changes: object) -> None:
        self.values: dict[str, object] = {
            "max_batch_size": 8,
            "max_seq_len": 256,
            "tokens_per_block": 16,
            "kv_tokens": 2048,
            **changes,
        }


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, scaled so that its choices are clear-cut."""
    return build_model(tmp_path_factory.mktemp("llama"))


def build_model(folder: Path, **changes: object) -> Path:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM has CPU kernels for
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.LlamaConfig(**{**settings, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_synthetic(model: Path, **settings: object) -> Engine:
    from roundhouse.engine.synthetic import SyntheticConfig, SyntheticEngine

    settings.pop("max_num_tokens", None)  # its prefill takes no time, so it has nothing to split
    return SyntheticEngine(
        SyntheticConfig(vocab_size=VOCAB_SIZE, **{"tokens_per_second": 1_000_000.0, **settings})  # type: ignore[arg-type]
    )


def make_embedded(model: Path, **settings: object) -> Engine:
    from roundhouse.engine.embedded.engine import EmbeddedConfig, EmbeddedEngine

    return EmbeddedEngine(EmbeddedConfig(model=model, **settings))  # type: ignore[arg-type]


def make_tensorrt_llm(model: Path, **settings: object) -> Engine:
    """Over the stand-in, unless TensorRT-LLM is installed: then ROUNDHOUSE_TEST_ENGINE names an engine of the model."""
    use_stand_in()
    from roundhouse.engine.tensorrt_llm.config import TensorrtLlmConfig
    from roundhouse.engine.tensorrt_llm.engine import TensorrtLlmEngine
    from roundhouse.trtllm import engine_folder

    changes = {"tokens_per_block": settings.pop("tokens_per_block"), "max_seq_len": settings["max_seq_len"]}
    with tempfile.TemporaryDirectory() as folder:
        path = os.environ.get("ROUNDHOUSE_TEST_ENGINE") or write_engine(Path(folder), model, **changes)
        config = TensorrtLlmConfig(engine=engine_folder.read(path), partial_reuse=False, **settings)  # type: ignore[arg-type]
        return TensorrtLlmEngine(config)


def use_stand_in() -> None:
    """Make `tensorrt_llm` the stand-in where there is none, with iterations that can be counted."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        sys.path.append(str(DOUBLES))
    import tensorrt_llm.bindings.executor as trtllm

    if hasattr(trtllm.Executor, "lockstep"):
        trtllm.Executor.lockstep = True


HAS_VLLM = importlib.util.find_spec("vllm") is not None  # it lives in an environment of its own
ENGINES = vllm_engines.variants() if HAS_VLLM else ["synthetic", "embedded", "tensorrt_llm"]
MAKERS: dict[str, Callable[..., Engine]] = {
    "synthetic": make_synthetic,
    "embedded": make_embedded,
    "tensorrt_llm": make_tensorrt_llm,
}

Make = Callable[..., Engine]


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest, random_model: Path) -> Iterator[Make]:
    """Builds the engine under test: `make(max_batch_size=2, ...)`. Closes what it built."""
    built: list[Engine] = []
    maker = MAKERS.get(request.param) or partial(vllm_engines.make, request.param)

    def build(**changes: object) -> Engine:
        built.append(maker(random_model, **Limits(**changes).values))
        return built[-1]

    yield build
    for engine in built:
        engine.close()


@pytest.fixture
def engine(make: Make) -> Engine:
    return make()


def prompt(seed: int, length: int = 20) -> tuple[int, ...]:
    """Token ids from 3 up, different for each seed."""
    return tuple((7 * seed + 3 * i + i * i * (seed % 5)) % (VOCAB_SIZE - 3) + 3 for i in range(length))


def request(request_id: int, **fields: object) -> Request:
    """A greedy request of 20 prompt tokens and 8 new ones, unless told otherwise."""
    defaults = {"prompt": prompt(request_id), "max_tokens": 8, "sampling": GREEDY}
    return Request(request_id, **{**defaults, **fields})  # type: ignore[arg-type]


class Answer:
    """Everything that one request gave, checked against the contract of `Output` as it comes."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.outputs: list[Output] = []

    def add(self, output: Output) -> None:
        assert not self.outputs or not self.outputs[-1].last, "an Output after the last one"
        if output.log_probs is not None:
            assert len(output.log_probs) == len(output.tokens)
            self.log_probs += output.log_probs
        if output.error is not None:
            assert output.finish_reason is None
        elif output.finish_reason is not None:
            assert output.perf is not None
        else:
            assert output.tokens, "an Output that says nothing"
            assert output.perf is None
        self.tokens += output.tokens
        self.outputs.append(output)

    @property
    def last(self) -> Output:
        assert self.outputs[-1].last
        return self.outputs[-1]


def drain(engine: Engine, answers: dict[int, Answer] | None = None, *, max_steps: int = 5000) -> dict[int, Answer]:
    """Step until nothing is unfinished."""
    answers = {} if answers is None else answers
    for _ in range(max_steps):
        if not engine.unfinished():
            break
        for output in engine.step():
            answers.setdefault(output.id, Answer()).add(output)
    assert engine.unfinished() == 0
    assert all(answer.last for answer in answers.values())
    return answers


def run(engine: Engine, *requests: Request) -> dict[int, Answer]:
    for each in requests:
        engine.submit(each)
    return drain(engine)


def run_one(engine: Engine, one: Request) -> Answer:
    return run(engine, one)[one.id]


def tokens_a_step(engine: Engine) -> int:
    """That one sequence may gain: more than one if the engine drafts."""
    return int(getattr(engine, "tokens_a_step", 1))


def blocks(engine: Engine, tokens: int) -> int:
    """KV blocks that hold so many tokens."""
    return -(-tokens // engine.info.tokens_per_block)


def needs(engine: Engine, *features: Feature) -> None:
    """Skip the test if the engine says that it lacks one of them; another test checks that it then refuses."""
    for feature in features:
        if feature in engine.info.lacks:
            pytest.skip(f"{engine.info.engine} lacks {feature.value}")
