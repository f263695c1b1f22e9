"""The scheduler: what runs in the next step, and the life of each sequence from its queue to its last Output.

Continuous batching: each step, every running sequence in decode gets one token, and what is left of the step's token
budget goes to prompts, which may be split over steps (chunked prefill). The queue is ordered by priority, then arrival;
its head is admitted when a slot is free and the pool has blocks for its whole length, so a running sequence never
loses its blocks and nothing overtakes a long request for ever.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from roundhouse.engine.base import RequestError
from roundhouse.engine.blocks import BlockManager, BlockTable
from roundhouse.engine.protocol import Error, ErrorCode, FinishReason, Output, Perf, Request, Stats

NEVER = 2**63 - 1


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way.

    Attributes:
        tokens: prompt and generated token ids.
        computed: how many of `tokens` have keys and values in the pool.
        reused_tokens: how many of them were computed for an earlier sequence.
        slot: row of this sequence in the engine's per-sequence arrays; -1 while it waits.
        ending: how it ends at the next step, if its end is decided outside a step (cancel, deadline).
    """

    request: Request
    tokens: list[int]
    table: BlockTable | None = None
    computed: int = 0
    reused_tokens: int = 0
    slot: int = -1
    ending: FinishReason | None = None
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def perf(self) -> Perf:
        blocks, reused = (len(self.table.blocks), self.table.reused) if self.table else (0, 0)
        return Perf(
            arrival_ns=self.request.arrival_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
            new_blocks=blocks - reused,
            reused_blocks=reused,
            reused_tokens=self.reused_tokens,
        )


@dataclass(slots=True)
class Batch:
    """The work of one step.

    Attributes:
        decodes: sequences that compute their last token.
        prefills: (sequence, number of prompt tokens to compute now); they come after the decodes.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)

    def samples(self) -> Iterator[Sequence]:
        """The sequences that get a new token in this step, in order: decodes, then prompts that are completed."""
        yield from self.decodes
        for sequence, count in self.prefills:
            if sequence.computed + count == len(sequence.tokens):
                yield sequence

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """Args:
    max_batch_size: sequences that hold a slot at the same time.
    max_num_tokens: tokens of one step, at least `max_batch_size`.
    max_seq_len: tokens of a sequence, prompt and answer.
    chunked_prefill: split prompts that do not fit what is left of a step.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        chunked_prefill: bool = True,
    ) -> None:
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.chunked_prefill = chunked_prefill
        # int32 [max_batch_size, blocks of the longest sequence]: the block tables by slot, as the kernels read them
        self.tables = np.zeros((max_batch_size, blocks.blocks_for(max_seq_len)), dtype=np.int32)
        self._queue: list[tuple[int, int, Sequence]] = []  # heap: highest priority, then first come
        self._queue_dead = 0  # entries of the heap that have ended already
        self._arrivals = 0
        self._live: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._slots = list(range(max_batch_size - 1, -1, -1))
        self._endings: list[Sequence] = []
        self._next_deadline = NEVER
        self._steps = self._blocks_reused = self._prompt_tokens = self._generated_tokens = self._context_tokens = 0

    # --- in -----------------------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Queue a request that was checked. Raises RequestError if its prompt can never fit a step."""
        if not self.chunked_prefill and len(request.prompt) > self.max_num_tokens:
            raise RequestError(
                ErrorCode.INVALID_ARGUMENT,
                f"prompt: {len(request.prompt)} tokens exceed max_num_tokens {self.max_num_tokens} of a step, and "
                "chunked prefill is off; shorten it, or set scheduling.chunked_prefill of the deployment",
            )
        sequence = Sequence(request, list(request.prompt))
        self._live[request.id] = sequence
        heapq.heappush(self._queue, (-request.priority, self._arrivals, sequence))
        self._arrivals += 1
        if request.deadline_ns:
            self._next_deadline = min(self._next_deadline, request.deadline_ns)
        return sequence

    def cancel(self, request_id: int) -> None:
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._end(sequence, FinishReason.CANCELLED)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.ending is None:
            sequence.ending = reason
            self._endings.append(sequence)

    # --- a step -------------------------------------------------------------------------------------

    def sweep(self) -> list[Output]:
        """End what was cancelled or has passed its deadline, and return the last Outputs."""
        now = time.monotonic_ns()
        if now > self._next_deadline:
            self._expire(now)
        outputs = []
        for sequence in self._endings:
            if sequence.slot < 0:
                self._queue_dead += 1
            else:
                self._running.remove(sequence)
            outputs.append(Output(sequence.request.id, [], _no_log_probs(sequence), sequence.ending, sequence.perf()))
            self._forget(sequence)
        self._endings.clear()
        if self._queue_dead > len(self._queue) // 2:
            self._queue = [entry for entry in self._queue if entry[2].ending is None]
            heapq.heapify(self._queue)
            self._queue_dead = 0
        return outputs

    def _expire(self, now: int) -> None:
        self._next_deadline = NEVER
        for sequence in self._live.values():
            deadline = sequence.request.deadline_ns
            if deadline and now > deadline:
                self._end(sequence, FinishReason.TIMEOUT)
            elif deadline:
                self._next_deadline = min(self._next_deadline, deadline)

    def schedule(self) -> Batch:
        """Choose the work of the next step and give it its blocks. Call `sweep` before, `advance` after."""
        batch = Batch()
        budget = self.max_num_tokens
        half_done = []
        for sequence in self._running:
            if sequence.computed == len(sequence.tokens) - 1 and sequence.generated:
                self._extend(sequence, 1)
                batch.decodes.append(sequence)
            else:
                half_done.append(sequence)
        budget -= len(batch.decodes)
        for sequence in half_done:
            budget -= self._prefill(batch, sequence, budget)
        while budget > 0 and (admitted := self._admit(budget)) is not None:
            budget -= self._prefill(batch, admitted, budget)
        self._context_tokens = sum(count for _, count in batch.prefills)
        return batch

    def _prefill(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        if count > 0:
            self._extend(sequence, count)
            batch.prefills.append((sequence, count))
        return count

    def _admit(self, budget: int) -> Sequence | None:
        while self._queue and self._queue[0][2].ending is not None:
            heapq.heappop(self._queue)
            self._queue_dead -= 1
        if not self._queue or not self._slots:
            return None
        sequence = self._queue[0][2]
        request = sequence.request
        table = self.blocks.admit(request.prompt, len(request.prompt) + request.max_tokens, request.cache_salt)
        if table is None:
            return None
        reused = table.reused * self.blocks.block_size
        if not self.chunked_prefill and len(request.prompt) - reused > budget:
            self.blocks.release(table)
            return None
        heapq.heappop(self._queue)
        sequence.table = table
        sequence.computed = sequence.reused_tokens = reused
        sequence.slot = self._slots.pop()
        sequence.first_scheduled_ns = time.monotonic_ns()
        self.tables[sequence.slot, : len(table.blocks)] = table.blocks
        self._running.append(sequence)
        self._blocks_reused += table.reused
        self._prompt_tokens += len(request.prompt)
        return sequence

    def _extend(self, sequence: Sequence, count: int) -> None:
        table = sequence.table
        assert table is not None  # a running sequence has one
        had = len(table.blocks)
        if sequence.computed + count > had * self.blocks.block_size:
            self.blocks.grow(table, sequence.computed + count)
            self.tables[sequence.slot, had : len(table.blocks)] = table.blocks[had:]

    def advance(
        self,
        batch: Batch,
        tokens: list[int],
        log_probs: list[float] | None,
        top: dict[int, list[tuple[int, float]]] | None = None,
    ) -> list[Output]:
        """Record the step's new tokens, one for each of `batch.samples()`, and return the Outputs.

        A token of -1 means that none could be chosen: its request fails, the others go on.
        `log_probs` has a value for each token, or is None if no request of the batch asked. `top`: index of a token ->
        the likeliest tokens in its place, where a request asked for them.
        """
        now = time.monotonic_ns()
        self._steps += 1
        sampled = list(batch.samples())
        for sequence in batch.decodes:
            self._computed(sequence, 1)
        for sequence, count in batch.prefills:
            self._computed(sequence, count)
        outputs = []
        for i, (sequence, token) in enumerate(zip(sampled, tokens, strict=True)):
            if token < 0:
                outputs.append(self._fail(sequence))
                continue
            sequence.tokens.append(token)
            sequence.last_token_ns = now
            if sequence.generated == 1:
                sequence.first_token_ns = now
            given = [log_probs[i]] if log_probs is not None and sequence.request.log_probs else None
            alternatives = [top[i]] if top is not None and i in top else None
            outputs.append(self._output(sequence, token, given, alternatives))
        self._generated_tokens += len(sampled)
        return outputs

    def _computed(self, sequence: Sequence, count: int) -> None:
        table = sequence.table
        assert table is not None  # a running sequence has one
        sequence.computed += count
        if sequence.computed >= (table.registered + 1) * self.blocks.block_size:
            self.blocks.register(table, sequence.tokens, sequence.computed)

    def _output(
        self,
        sequence: Sequence,
        token: int,
        log_probs: list[float] | None,
        top: list[list[tuple[int, float]]] | None,
    ) -> Output:
        request = sequence.request
        if token in request.end_ids and sequence.generated > request.sampling.min_tokens:
            reason = FinishReason.STOP
        elif sequence.generated >= request.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return Output(request.id, [token], log_probs, top_log_probs=top)
        self._running.remove(sequence)
        output = Output(request.id, [token], log_probs, reason, sequence.perf(), top_log_probs=top)
        self._forget(sequence)
        return output

    def _fail(self, sequence: Sequence) -> Output:
        self._running.remove(sequence)
        error = Error(
            ErrorCode.INTERNAL,
            f"logits: the model gave none that is finite after {len(sequence.tokens)} tokens; "
            "bad_words or logit_bias may forbid every token, or the weights are broken",
        )
        output = Output(sequence.request.id, [], error=error)
        self._forget(sequence)
        return output

    def _forget(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.blocks.release(sequence.table)
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
        del self._live[sequence.request.id]

    # --- figures ------------------------------------------------------------------------------------

    def unfinished(self) -> int:
        return len(self._live)

    def stats(self, *, memory_cpu_bytes: int = 0) -> Stats:
        decoding = sum(1 for sequence in self._running if sequence.generated)
        return Stats(
            timestamp_ns=time.monotonic_ns(),
            steps=self._steps,
            active=len(self._running),
            waiting=len(self._live) - len(self._running),
            context=len(self._running) - decoding,
            generation=decoding,
            max_active=self.max_batch_size,
            context_tokens=self._context_tokens,
            blocks_max=self.blocks.num_blocks,
            blocks_used=self.blocks.used,
            tokens_per_block=self.blocks.block_size,
            blocks_reused=self._blocks_reused,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            memory_cpu_bytes=memory_cpu_bytes,
        )


def _no_log_probs(sequence: Sequence) -> list[float] | None:
    return [] if sequence.request.log_probs else None
