"""The engine client on an asyncio loop: requests go down, each output goes to the answer that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import count

import msgspec

from roundhouse.engine.client import TEND_SECONDS, EngineClient
from roundhouse.engine.protocol import EngineInfo, Output, Request


class AsyncEngine:
    """Joins the engine of a running server. It never starts one: that is for the server's own fronts."""

    def __init__(self, server_pid: int, name: str, *, log: Callable[[str], None]) -> None:
        self._client = EngineClient(None, name, server_pid, log=log)
        self._loop = asyncio.get_running_loop()
        self._takers: dict[int, Callable[[Output], None]] = {}
        self._ids = count(1)
        self._loop.add_reader(self._client.fileno(), self._poll)
        self._timer = self._loop.call_soon(self._tend)

    @property
    def info(self) -> EngineInfo | None:
        """What the engine is; None while it is not there."""
        return self._client.info if self._client.connected else None

    def submit(self, requests: Sequence[Request], take: Callable[[Output], None]) -> list[int]:
        """The ids under which `take` will be given their outputs: errors, if the engine is gone."""
        numbered = [msgspec.structs.replace(request, id=next(self._ids)) for request in requests]
        ids = [request.id for request in numbered]
        self._takers.update(dict.fromkeys(ids, take))
        self._client.submit(numbered)
        self._loop.call_soon(self._poll)  # sending may have swallowed the sign that something had come
        return ids

    def cancel(self, ids: Sequence[int]) -> None:
        self._client.cancel(ids)
        self._loop.call_soon(self._poll)

    def close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._client.fileno())
        self._client.close()

    def _poll(self) -> None:
        for output in self._client.poll(0):
            take = self._takers.pop(output.id) if output.last else self._takers[output.id]
            take(output)

    def _tend(self) -> None:
        self._poll()
        self._timer = self._loop.call_later(TEND_SECONDS, self._tend)
