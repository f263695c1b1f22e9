"""One worker of the front door: python -m roundhouse.openai.worker SETTINGS

SIGTERM drains: open answers are finished, new requests are refused, then the process ends. A second one ends it now.
"""

from __future__ import annotations

import logging
import resource
import socket
import sys
import time
from types import FrameType

import msgspec
import uvicorn

from roundhouse import deployment
from roundhouse.engine import runtime
from roundhouse.openai.app import Door, create

KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep idle connections, so that they close them, not we
EXIT_SECONDS = 2  # for what is being sent when nothing is being answered any more


class Settings(msgspec.Struct, frozen=True):
    """What the supervisor tells its workers. `server_pid`: of the tritonserver whose engine they join."""

    deployment: str
    server_pid: int
    metrics_url: str
    address: str
    port: int
    drain_seconds: int


class DrainingServer(uvicorn.Server):
    """Ends once nothing is being answered, after SIGTERM, or when the server that it belongs to has gone."""

    def __init__(self, config: uvicorn.Config, door: Door, settings: Settings) -> None:
        super().__init__(config)
        self._door = door
        self._settings = settings
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._door.stopping:
            self.should_exit = self.force_exit = True
        self._door.stopping = True
        self._deadline = time.monotonic() + self._settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        drained = not self._door.open or time.monotonic() > self._deadline
        if (self._door.stopping and drained) or not runtime.alive(self._settings.server_pid):
            self.should_exit = True
        return await super().on_tick(counter)


def listener(address: str, port: int, *, shared: bool) -> socket.socket:
    """A bound socket. `shared`: other workers may bind the same port; the kernel spreads connections over them.

    Raises OSError.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((address, port))
    return sock


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("roundhouse").setLevel(logging.INFO)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each client is an open file; 1024 is a usual default
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    parsed = deployment.load(settings.deployment)
    door = Door(parsed, settings.server_pid, settings.metrics_url)
    config = uvicorn.Config(
        create(door),
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=EXIT_SECONDS,
        ssl_certfile=parsed.openai_section.tls_certificate,
        ssl_keyfile=parsed.openai_section.tls_key,
    )
    sock = listener(settings.address, settings.port, shared=True)
    DrainingServer(config, door, settings).run(sockets=[sock])


if __name__ == "__main__":
    main()
