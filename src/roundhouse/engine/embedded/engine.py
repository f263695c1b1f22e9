"""The embedded engine: scheduler, runner and sampler behind the engine interface."""

from __future__ import annotations

import os

import numba
import psutil
import torch
import transformers

from roundhouse.engine import checks
from roundhouse.engine.base import Engine, EngineError
from roundhouse.engine.blocks import BlockManager
from roundhouse.engine.embedded import model as models
from roundhouse.engine.embedded.config import EmbeddedConfig
from roundhouse.engine.embedded.runner import Runner
from roundhouse.engine.embedded.sampler import Sampler
from roundhouse.engine.protocol import EngineInfo, Feature, Output, Request, Stats
from roundhouse.engine.scheduler import Scheduler

LACKS = {
    Feature.BEAM_SEARCH: "the embedded engine samples single sequences only; use an engine with beam search",
    Feature.GUIDED_DECODING: "the embedded engine has no grammar backend; use an engine with guided decoding",
    Feature.LORA: "the embedded engine loads one set of weights; merge the adapter into the model folder",
    Feature.CONTEXT_LOGITS: "the embedded engine computes logits of the last prompt token only",
    Feature.GENERATION_LOGITS: "the embedded engine reports log probabilities, not whole rows of logits",
    Feature.DRAFT_TOKENS: "the embedded engine does not verify draft tokens yet",
    Feature.RETENTION: "the embedded engine keeps cached blocks by recency only",
    Feature.LOOKAHEAD: "the embedded engine has no lookahead decoding",
}


class EmbeddedEngine(Engine):
    def __init__(self, config: EmbeddedConfig) -> None:
        threads = config.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        numba.set_num_threads(min(threads, numba.get_num_threads()))
        self._model = models.load(config)
        text = self._model.config.get_text_config()
        max_seq_len = _max_seq_len(config, text.max_position_embeddings)
        num_blocks = _num_blocks(config, max_seq_len, text)
        self.scheduler = Scheduler(
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
        paged = models.Paged(text, num_blocks, config.tokens_per_block, self.scheduler.tables)
        self._runner = Runner(self._model, paged, config.tokens_per_block)
        self._sampler = Sampler(config.max_batch_size, max_seq_len, text.vocab_size)
        self._process = psutil.Process()

    def submit(self, request: Request) -> None:
        checks.check(request, self.info)
        self.scheduler.add(request)

    def cancel(self, request_id: int) -> None:
        self.scheduler.cancel(request_id)

    def step(self) -> list[Output]:
        outputs = self.scheduler.sweep()
        batch = self.scheduler.schedule()
        if batch:
            logits = self._runner.run(batch)
            tokens, log_probs = self._sampler.choose(logits, list(batch.samples()))
            outputs += self.scheduler.advance(batch, tokens, log_probs)
        return outputs

    def unfinished(self) -> int:
        return self.scheduler.unfinished()

    def stats(self) -> Stats:
        return self.scheduler.stats(memory_cpu_bytes=self._process.memory_info().rss)

    def close(self) -> None:
        del self._model, self._runner


def _max_seq_len(config: EmbeddedConfig, own: int) -> int:
    if config.max_seq_len is None:
        return own
    if config.max_seq_len > own:
        raise EngineError(f"limits.max_seq_len: {config.max_seq_len} exceeds the model's {own}; lower it")
    return config.max_seq_len


def _num_blocks(config: EmbeddedConfig, max_seq_len: int, text: transformers.PretrainedConfig) -> int:
    size = config.tokens_per_block
    if config.kv_tokens is not None:
        return max(config.kv_tokens // size, 1)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    block_bytes: int = text.num_hidden_layers * kv_heads * head_dim * size * 2 * 4
    wanted = config.max_batch_size * -(-max_seq_len // size)
    affordable: int = psutil.virtual_memory().total // 4 // block_bytes
    return max(min(wanted, affordable), 1)
