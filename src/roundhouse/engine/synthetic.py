"""The synthetic engine: emits tokens at a chosen rate and computes nothing. It measures the path around an engine.

Its answers can be checked: token i of a greedy answer is prompt token i modulo the prompt's length, so a lost, doubled
or mixed-up chunk shows. A sampled answer draws its tokens from the prompt, by seed. Scheduling, KV block bookkeeping
with prefix reuse, cancellation and deadlines are those of the embedded engine.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from dataclasses import dataclass
from importlib.metadata import version

import psutil

from roundhouse.engine import checks
from roundhouse.engine.base import Engine, EngineError
from roundhouse.engine.blocks import BlockManager
from roundhouse.engine.protocol import EngineInfo, Feature, Output, Request, Stats
from roundhouse.engine.scheduler import Scheduler, Sequence

MAX_BURST_STEPS = 3  # how far a late engine catches up: tokens that one stream may get at once

_NOTHING = "the synthetic engine computes no logits"
LACKS = {
    Feature.REPETITION_PENALTY: f"{_NOTHING}, so there is nothing to penalise; leave it at 1",
    Feature.PRESENCE_PENALTY: f"{_NOTHING}, so there is nothing to penalise; leave it at 0",
    Feature.FREQUENCY_PENALTY: f"{_NOTHING}, so there is nothing to penalise; leave it at 0",
    Feature.BAD_WORDS: f"{_NOTHING}, so there is nothing to forbid; leave them out",
    Feature.LOGIT_BIAS: f"{_NOTHING}, so there is nothing to add to; leave it out",
    Feature.TOP_LOG_PROBS: f"{_NOTHING}, so no other token has a probability",
    Feature.BEAM_SEARCH: f"{_NOTHING}, so there is nothing to search",
    Feature.GUIDED_DECODING: f"{_NOTHING}, so there is nothing to guide",
    Feature.LORA_WEIGHTS: "the synthetic engine has no weights to adapt",
    Feature.LORA: "the synthetic engine has no weights to adapt",
    Feature.CONTEXT_LOGITS: _NOTHING,
    Feature.GENERATION_LOGITS: _NOTHING,
    Feature.DRAFT_TOKENS: f"{_NOTHING}, so there is nothing to verify",
    Feature.RETENTION: "the synthetic engine keeps cached blocks by recency only",
    Feature.LOOKAHEAD: f"{_NOTHING}, so there is nothing to look ahead for",
}


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Attributes:
    vocab_size: token ids from 0; prompts with others are refused.
    tokens_per_second: over all sequences. Each step gives every running sequence one token.
    tokens_per_second_per_sequence: no sequence is faster than this; None is no such limit.
    load_seconds: what loading takes.
    fail_load: loading fails with this message.
    crash_after_tokens: SIGKILL to the own process after so many tokens in all.
    hang_after_tokens: `step` never returns after so many tokens in all.
    Others: as in EmbeddedConfig.
    """

    vocab_size: int
    model: str = "synthetic"
    tokens_per_second: float = 20_000.0
    tokens_per_second_per_sequence: float | None = None
    max_batch_size: int = 256
    max_seq_len: int = 2048
    max_queue: int = 512
    tokens_per_block: int = 32
    kv_tokens: int | None = None
    reuse: bool = True
    load_seconds: float = 0.0
    fail_load: str | None = None
    crash_after_tokens: int | None = None
    hang_after_tokens: int | None = None


class SyntheticEngine(Engine):
    def __init__(self, config: SyntheticConfig) -> None:
        time.sleep(config.load_seconds)
        if config.fail_load is not None:
            raise EngineError(config.fail_load)
        self._config = config
        blocks_per_sequence = -(-config.max_seq_len // config.tokens_per_block)
        num_blocks = config.max_batch_size * blocks_per_sequence
        if config.kv_tokens is not None:
            num_blocks = max(config.kv_tokens // config.tokens_per_block, 1)
        self.info = EngineInfo(
            engine="synthetic",
            version=version("roundhouse"),
            model=config.model,
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            max_batch_size=config.max_batch_size,
            max_queue=config.max_queue,
            tokens_per_block=config.tokens_per_block,
            max_blocks=num_blocks,
            lacks=LACKS,
        )
        self._scheduler = Scheduler(
            BlockManager(num_blocks, config.tokens_per_block, reuse=config.reuse),
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.max_batch_size * config.max_seq_len,  # a step's work takes no time: no need to split
            max_seq_len=config.max_seq_len,
        )
        self._seeds: dict[int, int] = {}
        self._emitted = 0
        self._due = 0.0
        self._idle = True
        self._process = psutil.Process()

    def submit(self, request: Request) -> None:
        checks.check(request, self.info)
        self._scheduler.add(request)
        if not request.sampling.greedy:
            seed = request.sampling.seed
            self._seeds[request.id] = int.from_bytes(os.urandom(8), "little") if seed is None else seed

    def cancel(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)

    def step(self) -> list[Output]:
        outputs = self._scheduler.sweep()
        batch = self._scheduler.schedule()
        if batch:
            sequences = list(batch.samples())
            self._wait(len(sequences))
            self._break_down(len(sequences))
            tokens = [self._next(sequence) for sequence in sequences]
            log_probs = [self._log_prob(*pair) for pair in zip(sequences, tokens, strict=True)]
            outputs += self._scheduler.advance(batch, tokens, log_probs)
        for output in outputs:
            if output.last:
                self._seeds.pop(output.id, None)
        self._idle = not self._scheduler.unfinished()
        return outputs

    def unfinished(self) -> int:
        return self._scheduler.unfinished()

    def stats(self) -> Stats:
        return self._scheduler.stats(memory_cpu_bytes=self._process.memory_info().rss)

    def close(self) -> None:
        self._seeds.clear()

    def _wait(self, tokens: int) -> None:
        """Sleep until the step is due that emits `tokens`."""
        interval = tokens / self._config.tokens_per_second
        if self._config.tokens_per_second_per_sequence is not None:
            interval = max(interval, 1 / self._config.tokens_per_second_per_sequence)
        now = time.monotonic()
        earliest = now if self._idle else now - MAX_BURST_STEPS * interval
        self._due = max(self._due, earliest) + interval
        if self._due > now:
            time.sleep(self._due - now)

    def _break_down(self, tokens: int) -> None:
        self._emitted += tokens
        crash, hang = self._config.crash_after_tokens, self._config.hang_after_tokens
        if crash is not None and self._emitted > crash:
            os.kill(os.getpid(), signal.SIGKILL)
        while hang is not None and self._emitted > hang:
            time.sleep(3600)

    def _next(self, sequence: Sequence) -> int:
        request, prompt = sequence.request, sequence.request.prompt
        index = sequence.generated
        seed = self._seeds.get(request.id)
        if seed is not None:
            noise = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
            index = int.from_bytes(noise, "little")
        token = prompt[index % len(prompt)]
        if token in request.end_ids and sequence.generated < request.sampling.min_tokens:
            allowed = (other for other in (*prompt, *range(self.info.vocab_size)) if other not in request.end_ids)
            token = next(allowed, -1)
        return token

    def _log_prob(self, sequence: Sequence, token: int) -> float:
        prompt = sequence.request.prompt
        if not sequence.request.log_probs or sequence.request.id not in self._seeds:
            return 0.0  # the answer is certain
        return math.log(max(prompt.count(token), 1) / len(prompt))
