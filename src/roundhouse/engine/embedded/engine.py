"""The embedded engine: scheduler, runner and sampler behind the engine interface."""

from __future__ import annotations

import os

import psutil
import torch
import transformers

from roundhouse.engine import checks
from roundhouse.engine.base import Engine, EngineError
from roundhouse.engine.blocks import BlockManager
from roundhouse.engine.embedded import fused
from roundhouse.engine.embedded import model as models
from roundhouse.engine.embedded.config import EmbeddedConfig
from roundhouse.engine.embedded.fused import FusedModel
from roundhouse.engine.embedded.generic import GenericModel
from roundhouse.engine.embedded.pool import Pool
from roundhouse.engine.embedded.runner import Model, Runner
from roundhouse.engine.embedded.sampler import Sampler, top_log_probs
from roundhouse.engine.protocol import EngineInfo, Feature, Output, Request, Stats
from roundhouse.engine.scheduler import Scheduler

LACKS = {
    Feature.BEAM_SEARCH: "the embedded engine samples single sequences only; use an engine with beam search",
    Feature.GUIDED_DECODING: "the embedded engine has no grammar backend; use an engine with guided decoding",
    Feature.LORA_WEIGHTS: "the embedded engine loads one set of weights; merge the adapter into the model folder",
    Feature.LORA: "the embedded engine loads one set of weights; merge the adapter into the model folder",
    Feature.CONTEXT_LOGITS: "the embedded engine computes logits of the last prompt token only",
    Feature.GENERATION_LOGITS: "the embedded engine reports log probabilities, not whole rows of logits",
    Feature.DRAFT_TOKENS: "the embedded engine does not verify draft tokens yet",
    Feature.RETENTION: "the embedded engine keeps cached blocks by recency only",
    Feature.LOOKAHEAD: "the embedded engine has no lookahead decoding",
}
WARM_UP_TOKENS = 64  # enough for the kernels of large steps, with hidden sizes from 256 up


class EmbeddedEngine(Engine):
    def __init__(self, config: EmbeddedConfig) -> None:
        if config.max_num_tokens < config.max_batch_size:
            raise EngineError(
                f"limits.max_num_tokens: {config.max_num_tokens} is less than limits.max_batch_size "
                f"({config.max_batch_size}); each running sequence needs one token a step"
            )
        model = models.load(config)
        weights = sum(parameter.numel() for parameter in model.parameters())
        text = model.config.get_text_config()
        max_seq_len = _max_seq_len(config, getattr(text, "max_position_embeddings", None), models.steady_length(text))
        half = config.kv_dtype == "bfloat16" or (config.kv_dtype == "auto" and model.dtype == torch.bfloat16)
        shape = models.shape(model)
        num_blocks = _num_blocks(config, max_seq_len, shape.block_bytes(config.tokens_per_block, half=half))
        self._scheduler = Scheduler(
            BlockManager(num_blocks, config.tokens_per_block, reuse=config.reuse),
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.max_num_tokens,
            max_seq_len=max_seq_len,
            chunked_prefill=config.chunked_prefill,
        )
        self.info = EngineInfo(
            engine="transformers",
            version=transformers.__version__,
            model=str(config.model),
            vocab_size=text.vocab_size,
            max_seq_len=max_seq_len,
            max_batch_size=config.max_batch_size,
            max_queue=config.max_queue,
            tokens_per_block=config.tokens_per_block,
            max_blocks=num_blocks,
            lacks=LACKS,
        )
        pool = Pool(shape, num_blocks, config.tokens_per_block, self._scheduler.tables, half=half)
        with torch.inference_mode():
            runnable: Model = (
                FusedModel(model, pool, config.max_num_tokens, max_seq_len)
                if config.fused and fused.fits(model.config)
                else GenericModel(model, pool)
            )
        threads = config.threads or len(os.sched_getaffinity(0))
        self._runner = Runner(runnable, pool, weights=weights, threads=threads)
        self._sampler = Sampler(config.max_batch_size, max_seq_len, text.vocab_size)
        self._process = psutil.Process()
        self._warm_up(pool, min(config.max_num_tokens, WARM_UP_TOKENS), model.config.model_type)

    def _warm_up(self, pool: Pool, tokens: int, model_type: str) -> None:
        """Compile the kernels, and find out whether the model can be run packed, with its attention replaced."""
        try:
            self._runner.warm_up(tokens)
        except Exception as error:  # whatever a foreign model raises
            raise EngineError(f"model.path: {model_type} does not run on packed sequences: {error}") from error
        if pool.attended != pool.shape.layers:
            raise EngineError(
                f"model.path: {model_type} computes {pool.shape.layers} layers with {pool.attended} calls of the "
                "attention interface of transformers; the embedded engine needs one in each layer"
            )
        self._sampler.warm_up()
        pool.populate()

    def submit(self, request: Request) -> None:
        checks.check(request, self.info)
        self._scheduler.add(request)

    def cancel(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)

    def step(self) -> list[Output]:
        outputs = self._scheduler.sweep()
        batch = self._scheduler.schedule()
        if batch:
            logits = self._runner.run(batch)
            sequences = list(batch.samples())
            top = top_log_probs(logits, sequences)
            tokens, log_probs = self._sampler.choose(logits, sequences)
            outputs += self._scheduler.advance(batch, tokens, log_probs, top)
        return outputs

    def unfinished(self) -> int:
        return self._scheduler.unfinished()

    def stats(self) -> Stats:
        return self._scheduler.stats(memory_cpu_bytes=self._process.memory_info().rss)

    def close(self) -> None:
        del self._runner


def _max_seq_len(config: EmbeddedConfig, own: int | None, steady: int | None) -> int:
    if own is None:
        raise EngineError("model.path: its config has no max_position_embeddings; the embedded engine cannot run it")
    length = own if config.max_seq_len is None else config.max_seq_len
    if length > own:
        raise EngineError(f"limits.max_seq_len: {length} exceeds the model's {own}; lower it")
    if steady is not None and length > steady:
        raise EngineError(
            f"limits.max_seq_len: {length} exceeds {steady}, beyond which this model's RoPE (longrope) changes for all "
            f"sequences of a step; set {steady} or less, or use engine.kind: vllm"
        )
    return length


def _num_blocks(config: EmbeddedConfig, max_seq_len: int, block_bytes: int) -> int:
    size = config.tokens_per_block
    if config.kv_tokens is not None:
        return max(config.kv_tokens // size, 1)
    wanted = config.max_batch_size * -(-max_seq_len // size)
    affordable: int = psutil.virtual_memory().total // 4 // block_bytes
    return max(min(wanted, affordable), 1)
