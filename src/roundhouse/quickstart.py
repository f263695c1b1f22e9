"""`roundhouse quickstart`: a real Triton with the embedded engine, and one answer streamed on the terminal."""

from __future__ import annotations

import queue
import shlex
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from rich.console import Console

from roundhouse.serve import Addresses, Server

MAX_TOKENS = 256


def run(deployment: Path, prompt: str, *, once: bool) -> int:
    """Returns the exit code. Raises what `Server` raises."""
    console = Console()
    addresses = Addresses(_port(8000), _port(8001), _port(8002))
    if addresses != Addresses():
        console.print("ports 8000 to 8002 are in use: others are taken", highlight=False)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    started = time.monotonic()
    server = Server(deployment, addresses)
    try:
        server.wait_ready(console)
        console.print(f"[green]ready[/green] after {time.monotonic() - started:.1f} s", highlight=False)
        stream_answer(console, f"127.0.0.1:{addresses.grpc_port}", prompt)
        if not once:
            console.print(next_steps(addresses, prompt), highlight=False, markup=False)
            console.print("serving; Ctrl-C stops")
            while not stop.wait(0.2):
                if server.ended():
                    console.print(server.why(), markup=False)
                    server.kill()
                    return 1
    except BaseException:
        server.kill()
        raise
    return server.drain()


def stream_answer(console: Console, grpc_url: str, prompt: str) -> None:
    """Print an answer as it comes, and how fast it came. Raises InferenceServerException."""
    replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(grpc_url) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        console.print(f"\n[bold]{prompt}[/bold]", highlight=False)
        sent = time.monotonic()
        client.async_stream_infer("ensemble", _inputs(prompt), enable_empty_final_response=True)
        first = 0.0
        tokens = 0
        while True:
            result, error = replies.get(timeout=120)
            if error is not None:
                raise error
            text = result.as_numpy("text_output")
            if text is not None:
                first = first or time.monotonic()
                tokens += int(result.as_numpy("num_output_tokens").item())
                console.print(text[0].decode(), end="", highlight=False, markup=False, soft_wrap=True)
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        seconds = time.monotonic() - sent
        client.stop_stream()
    console.print(
        f"\n\n[dim]time to first token {1e3 * (first - sent):.1f} ms, {tokens} tokens, "
        f"{tokens / seconds:.0f} tokens/s[/dim]",
        highlight=False,
    )


def next_steps(addresses: Addresses, prompt: str) -> str:
    """What to type next: curl and Python."""
    body = f'{{"text_input": "{prompt}", "max_tokens": 256, "stream": true}}'
    return f"""
Ask with curl:
  curl -N localhost:{addresses.http_port}/v2/models/ensemble/generate_stream -d {shlex.quote(body)}

Ask with Python:
  import requests
  url = "http://localhost:{addresses.http_port}/v2/models/ensemble/generate"
  body = {{"text_input": "{prompt}", "max_tokens": 256, "exclude_input_in_output": True}}
  print(requests.post(url, json=body).json()["text_output"])
"""


def _inputs(prompt: str) -> list[grpcclient.InferInput]:
    values = {
        "text_input": ("BYTES", np.array([[prompt.encode()]], dtype=np.object_)),
        "max_tokens": ("INT32", np.array([[MAX_TOKENS]], dtype=np.int32)),
        "stream": ("BOOL", np.array([[True]])),
        "return_num_output_tokens": ("BOOL", np.array([[True]])),
    }
    inputs = []
    for name, (datatype, array) in values.items():
        inputs.append(grpcclient.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def _port(preferred: int) -> int:
    """A free port, the preferred one if it is."""
    for port in (preferred, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise OSError("no free port")
