"""One load on one server: processes of asyncio clients that start together, and what they saw."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from roundhouse.bench import metrics, wire
from roundhouse.bench.clients import CLIENTS, Client, Target
from roundhouse.bench.metrics import Trace
from roundhouse.bench.scenario import Closed, Level, Request, Session, arrivals

START_SECONDS = 60.0  # for the processes to import what they need
TICK_SECONDS = 0.01
BACK_OFF_SECONDS = 0.1  # after a failure: a server that refuses at once is not to be flooded

Progress = Callable[[float, int, int], None]  # seconds since the start, requests that ended, tokens


class LoadError(Exception):
    """The clients could not be run. The message says why."""


@dataclass(frozen=True)
class Plan:
    """Attributes:
    sessions: sent in order, and again from the first if there are too few.
    warm_up: seconds before what counts. seconds: of what counts. patience: seconds for open answers after that.
    """

    target: Target
    level: Level
    sessions: list[Session]
    seed: int
    warm_up: float
    seconds: float
    patience: float = 60.0
    processes: int = 1


@dataclass(frozen=True)
class Overhead:
    """What the clients themselves cost.

    Attributes:
        cores: CPU time over wall time, of all processes together.
        lag_ms: how late their event loops woke up from a short sleep: a bound on how late a token was noticed.
    """

    processes: int
    cores: float
    microseconds_per_response: float
    lag_ms: dict[str, float]

    def warning(self) -> str | None:
        """What to do if the clients may have been the limit."""
        if self.cores > 0.8 * self.processes:
            return f"the client's {self.processes} processes were busy ({self.cores:.2f} cores): raise --processes"
        if self.lag_ms.get("p99", 0.0) > 10:
            return f"the client noticed tokens up to {self.lag_ms['p99']:.0f} ms late (p99): this machine is too busy"
        return None


@dataclass(frozen=True)
class Seen:
    """All traces; `start` and `end` of the part that counts, on the clock of the traces."""

    traces: list[Trace]
    start: float
    end: float
    overhead: Overhead
    repeated: bool


def default_processes() -> int:
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def run(plan: Plan, progress: Progress | None = None) -> Seen:
    """Load the target. Raises LoadError if a client process fails."""
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2 * plan.processes, lock=False)
    pipes, workers = [], []
    for index in range(plan.processes):
        ours, theirs = context.Pipe()
        part = replace(plan, sessions=plan.sessions[index :: plan.processes])
        worker = context.Process(target=_work, args=(part, index, theirs, counts), daemon=True)
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    try:
        for pipe in pipes:
            _receive(pipe, START_SECONDS, "ready")
        began = time.monotonic() + 0.1
        for pipe in pipes:
            pipe.send(began)
        deadline = began + plan.warm_up + plan.seconds + plan.patience + 30
        while not all(pipe.poll(0.1) for pipe in pipes) and time.monotonic() < deadline:
            if progress is not None:
                progress(time.monotonic() - began, sum(counts[0::2]), sum(counts[1::2]))
        parts = [_receive(pipe, max(0.0, deadline - time.monotonic()), "done") for pipe in pipes]
    finally:
        for worker in workers:
            worker.join(timeout=2)
            worker.kill()
            worker.join()
    return _joined(plan, began, parts)


def _joined(plan: Plan, began: float, parts: list[tuple[list[Trace], float, list[float], int]]) -> Seen:
    traces = [trace for part in parts for trace in part[0]]
    wall = max([trace.ended for trace in traces], default=time.monotonic()) - began
    responses = sum(len(trace.times) for trace in traces)
    cpu = sum(part[1] for part in parts)
    overhead = Overhead(
        processes=plan.processes,
        cores=round(cpu / max(wall, 1e-9), 3),
        microseconds_per_response=round(1e6 * cpu / max(responses, 1), 1),
        lag_ms=metrics.quantiles((lag for part in parts for lag in part[2]), 1e3),
    )
    start = began + plan.warm_up
    return Seen(traces, start, start + plan.seconds, overhead, any(part[3] > len(plan.sessions) for part in parts))


def _receive(pipe: Connection, seconds: float, what: str) -> Any:
    if not pipe.poll(seconds):
        raise LoadError(f"a client process was not {what} within {seconds:.0f} s")
    try:
        received = pipe.recv()
    except EOFError as error:
        raise LoadError(f"a client process ended before it was {what}") from error
    if isinstance(received, Exception):
        raise LoadError(f"a client process failed: {received!r}") from received
    return received


def _work(plan: Plan, index: int, pipe: Connection, counts: Any) -> None:
    """A client process."""
    try:
        pipe.send(asyncio.run(_Driver(plan, index, pipe, counts).run()))
    except KeyboardInterrupt:
        return
    except Exception as error:  # the parent has to hear of everything
        with suppress(Exception):
            pipe.send(LoadError(repr(error)))


class _Driver:
    """The clients of one process."""

    def __init__(self, plan: Plan, index: int, pipe: Connection, counts: Any) -> None:
        self._plan = plan
        self._index = index
        self._pipe = pipe
        self._counts = counts
        self._traces: list[Trace] = []
        self._numbers = itertools.count()
        self._lags: list[float] = []
        self._cpu = 0.0

    async def run(self) -> tuple[list[Trace], float, list[float], int]:
        """Traces, CPU seconds, lags, how many sessions were sent."""
        plan = self._plan
        async with CLIENTS[plan.target.protocol](plan.target) as client:
            self._pipe.send("ready")
            began = await asyncio.get_running_loop().run_in_executor(None, self._pipe.recv)
            await asyncio.sleep(began - time.monotonic())
            cpu = time.process_time()
            ends = began + plan.warm_up + plan.seconds
            ticker = asyncio.create_task(self._tick())
            tasks = [asyncio.create_task(task) for task in self._loops(client, began, ends)]
            _, late = await asyncio.wait(tasks, timeout=ends + plan.patience - time.monotonic()) if tasks else ((), ())
            ticker.cancel()
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            cpu = time.process_time() - cpu
        for task in tasks:
            if not task.cancelled() and (failed := task.exception()) is not None:
                raise failed
        return self._traces, cpu, self._lags, next(self._numbers)

    def _loops(self, client: Client, began: float, ends: float) -> Iterator[Any]:
        level = self._plan.level
        if isinstance(level, Closed):
            for stream in range(self._index, level.streams, self._plan.processes):
                yield self._stream(client, ends, (stream + 1) / level.streams)
            return
        mine = itertools.islice(arrivals(level, self._plan.seed), self._index, None, self._plan.processes)
        yield self._arrive(client, (began + at for at in mine), ends)

    async def _stream(self, client: Client, ends: float, part: float) -> None:
        """A closed loop. Its first answer is only a part of one, so that streams do not go in step."""
        first, *rest = self._session()
        first = replace(first, answer_tokens=max(1, round(part * first.answer_tokens)))
        await self._send(client, first, time.monotonic(), warm_up=True)
        turns = iter(rest)
        while time.monotonic() < ends:
            request = next(turns, None)
            if request is None:
                turns = iter(self._session())
                continue
            if not await self._send(client, request, time.monotonic()):
                turns = iter(())
                await asyncio.sleep(BACK_OFF_SECONDS)

    async def _arrive(self, client: Client, times: Iterator[float], ends: float) -> None:
        """An open loop: each session is a task of its own, started when it is due."""
        async with asyncio.TaskGroup() as group:
            for due in times:
                if due >= ends:
                    return
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self._converse(client, self._session(), due, ends))

    async def _converse(self, client: Client, session: Session, due: float, ends: float) -> None:
        for request in session:
            if due >= ends or not await self._send(client, request, due):
                return
            due = time.monotonic()

    async def _send(self, client: Client, request: Request, due: float, *, warm_up: bool = False) -> bool:
        """Whether the answer came."""
        now = time.monotonic()
        trace = Trace(request.kind, request.prompt_tokens, min(due, now), now, warm_up=warm_up)
        self._traces.append(trace)
        try:
            await client.send(request, trace)
            if not trace.times:
                trace.error = "the answer had no token"
        except asyncio.CancelledError:
            trace.error = f"no end within {self._plan.patience:g} s after the load"
            raise
        except (wire.ServerError, OSError) as error:
            trace.error = str(error) or type(error).__name__
        except Exception as error:  # aiohttp's, of a connection that broke
            trace.error = f"{type(error).__name__}: {error}"
        finally:
            trace.ended = time.monotonic()
            self._counts[2 * self._index] += 1
            self._counts[2 * self._index + 1] += metrics.output_tokens(trace)
        return trace.error is None

    def _session(self) -> Session:
        return self._plan.sessions[next(self._numbers) % len(self._plan.sessions)]

    async def _tick(self) -> None:
        while True:
            due = time.monotonic() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._lags.append(time.monotonic() - due)
