"""`roundhouse serve`: one deployment on one Triton, in the foreground, from start-up to drain."""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

from roundhouse import deployment as deployments
from roundhouse import repository, tritonserver
from roundhouse.engine.client import EngineMonitor
from roundhouse.engine.runtime import DRAINING, ServerRecord, announce, runtime_dir

IDLE_SECONDS = 1.0  # how long the engine must be idle before all answers have surely reached their clients
EXIT_SECONDS = 2  # Triton's own time to end after that: requests whose clients have gone would keep it for ever
CRASH_SECONDS = 1.0  # from Triton's word of a crash to its end
POLL_SECONDS = 0.2
PROGRESS_SECONDS = 10.0
DOOR_SECONDS = 60.0  # for the OpenAI front door to open
CLOSED_APIS = "shared-memory,trace,logging"  # whoever reaches the port could map, or change, what is the server's own
CRASHES = {f"Signal ({number}) received.": number for number in (signal.SIGSEGV, signal.SIGABRT)}
NOISE = ("pinned memory", "CUDA memory", "CudaDriver", "CUDA driver", "NVML", "GPU metrics", "Cache metrics", "DCGM")


class ServeError(Exception):
    """The server cannot be started. The message says why."""


@dataclass(frozen=True)
class Addresses:
    """Where the server listens. Loopback unless said otherwise: there is no authentication."""

    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    openai_port: int = 9000
    http_address: str = "127.0.0.1"
    grpc_address: str = "127.0.0.1"
    metrics_address: str = "127.0.0.1"
    openai_address: str = "127.0.0.1"

    def check(self, *, openai: bool) -> None:
        """Raises ServeError if a port cannot be had. `openai`: whether that one is needed."""
        wanted = {
            "http": (self.http_address, self.http_port),
            "grpc": (self.grpc_address, self.grpc_port),
            "metrics": (self.metrics_address, self.metrics_port),
            **({"openai": (self.openai_address, self.openai_port)} if openai else {}),
        }
        taken: dict[tuple[str, int], str] = {}
        for name, address in wanted.items():
            if (other := taken.setdefault(address, name)) != name:
                raise ServeError(f"--{other}-port and --{name}-port are both {address[1]}; choose two")
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind(address)
                except OSError as error:
                    raise ServeError(
                        f"--{name}-port {address[1]} on {address[0]}: {error.strerror}; choose another one"
                    ) from error


def _die_with_parent() -> None:
    """In the child: have the kernel kill it when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class ReadyFile:
    """A file that exists while requests are taken: what a container's readiness probe looks for.

    Triton's own health says yes while the engine behind its models is being started again.
    """

    def __init__(self, path: Path | None) -> None:
        """None for no file. Removes what an earlier server has left. Raises ServeError if it cannot be written."""
        self._path = path
        self._exists = False
        try:
            self._write(True)
            self._write(False)
        except OSError as error:
            raise ServeError(f"--ready-file {path}: {error.strerror}; name a file in a folder that exists") from error

    def set(self, ready: bool) -> None:
        """A full disk, or one that cannot be written, keeps no server from serving or draining; the next call tries
        again."""
        with suppress(OSError):
            self._write(ready)

    def _write(self, ready: bool) -> None:
        if self._path is not None and ready != self._exists:
            if ready:
                self._path.touch()
            else:
                self._path.unlink(missing_ok=True)
            self._exists = ready


class Server:
    """A running tritonserver and everything that it started."""

    def __init__(
        self,
        deployment: Path,
        addresses: Addresses,
        *,
        openai: bool = False,
        drain_seconds: int = 60,
        ready_file: Path | None = None,
        verbose: bool = False,
    ):
        """Start it. `openai`: open that door even if the deployment does not ask for it. `ready_file`: see ReadyFile.

        Raises DeploymentError, TritonError or ServeError.
        """
        parsed = deployments.load(deployment)
        _check_folders(deployment, parsed)
        triton = tritonserver.find()
        self._has_door = openai or parsed.openai is not None
        addresses.check(openai=self._has_door)
        self._ready_file = ReadyFile(ready_file)
        self.addresses = addresses
        self._deployment = deployment
        self._door: subprocess.Popen[bytes] | None = None
        self.drain_seconds = drain_seconds
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="roundhouse-repository-")
            models = Path(self._folder.name) / "model_repository"
            repository.render(parsed, deployment, models)
        except OSError as error:
            raise ServeError(f"the model repository cannot be written into {tempfile.gettempdir()}: {error}") from error
        self._verbose = verbose
        self._models: dict[int, str] = {}  # file descriptor of a process of Triton's -> the model that it runs
        self._regions: list[Path] = []  # shared memory that Triton leaves behind when it or one of those is killed
        self._crash: signal.Signals | None = None
        self.errors: deque[str] = deque(maxlen=200)
        self.process = subprocess.Popen(
            _command(triton, models, addresses),
            env=triton.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            text=True,
            errors="replace",
        )
        self._engine = EngineMonitor(self.process.pid)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def wait_ready(self, console: Console, stop: threading.Event | None = None) -> None:
        """Wait until all models are loaded and the doors are open, or `stop` is set.

        Raises ServeError if the server ends instead.
        """
        self._wait_loaded(console, stop)
        if stop is not None and stop.is_set():
            return
        addresses = self.addresses
        record = ServerRecord(
            deployment=str(self._deployment.resolve()),
            grpc=f"{addresses.grpc_address}:{addresses.grpc_port}",
            metrics_url=f"http://{_reachable(addresses.metrics_address)}:{addresses.metrics_port}/metrics",
        )
        try:
            announce(self.process.pid, record)
        except OSError as error:
            raise ServeError(f"the server's runtime folder cannot be written: {error}") from error
        if self._has_door:
            self._door = subprocess.Popen(
                _door_command(self._deployment, addresses, self.drain_seconds),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
            self._wait_door()

    def tell_ready(self) -> None:
        """Let the ready file say whether requests are taken. To be called a few times a second."""
        self._ready_file.set(self._engine.serving())

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether Triton, or the OpenAI front door, has ended by itself; Triton gets so many seconds to do so."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        return self.process.returncode is not None or (self._door is not None and self._door.poll() is not None)

    def _wait_door(self) -> None:
        deadline = time.monotonic() + DOOR_SECONDS
        while not self.ended() and time.monotonic() < deadline:
            with (
                suppress(OSError),
                socket.create_connection(
                    (_reachable(self.addresses.openai_address), self.addresses.openai_port), timeout=2
                ),
            ):
                return
            time.sleep(0.05)
        raise ServeError("the OpenAI front door does not open; its log says why")

    def _wait_loaded(self, console: Console, stop: threading.Event | None) -> None:
        url = f"http://{_reachable(self.addresses.http_address)}:{self.addresses.http_port}/v2/health/ready"
        started = told = time.monotonic()
        with console.status("starting Triton and loading the engine"):
            while stop is None or not stop.is_set():
                if self.process.poll() is not None:
                    self._reader.join(timeout=2)
                    raise ServeError(self.why())
                with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=2):
                    self._watch_models()
                    return
                now = time.monotonic()
                if now - told > PROGRESS_SECONDS:
                    told = now
                    console.print(f"still loading: {now - started:.0f} s")
                time.sleep(0.05)

    def _watch_models(self) -> None:
        """Remember the processes that run the Python models, once all of them are there to stay."""
        for child in psutil.Process(self.process.pid).children():
            stub = _stub(child)
            with suppress(OSError):
                if stub is not None:
                    self._models[os.pidfd_open(child.pid)] = stub[0]
                    self._regions.append(stub[1])

    def lost_model(self) -> str | None:
        """A model whose process has died: Triton 2.51 leaves its clients waiting, and cannot start it again."""
        ended = select.select(list(self._models), [], [], 0)[0] if self._models else ()
        return next((self._models[pidfd] for pidfd in ended), None)

    def why(self) -> str:
        """The reason that the server gave for its end."""
        causes = [line for line in self.errors if "failed to load" in line or line.startswith("engine: ")]
        if self._door is not None and self._door.poll() is not None:
            causes.insert(0, f"the OpenAI front door ended with code {self._door.returncode}; its log is above")
        if self.process.returncode is not None and self.process.returncode < 0:  # it was in no state to say anything
            cause = self._crash or signal.Signals(-self.process.returncode)
            causes.insert(0, f"tritonserver was ended by {cause.name}")
        return "\n".join(causes[:4] or list(self.errors)[-10:]) or f"tritonserver ended with {self.process.returncode}"

    def drain(self) -> int:
        """Let open streams finish, refuse new requests, end. Returns the exit code: 0 after a drain.

        Triton hears of it last: from its SIGTERM on it would refuse the steps of an ensemble that is still streaming.
        """
        self._ready_file.set(False)
        (runtime_dir(self.process.pid) / DRAINING).touch()
        if self._door is not None:
            self._door.terminate()
        deadline = time.monotonic() + self.drain_seconds
        self._wait_idle(deadline)
        if self._door is not None:  # its clients may still be reading
            with suppress(subprocess.TimeoutExpired):
                self._door.wait(timeout=max(deadline - time.monotonic(), 0.0))
        with suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(timeout=EXIT_SECONDS)
        self.kill()
        return 0

    def _wait_idle(self, deadline: float) -> None:
        """Until the engine has had nothing to do for IDLE_SECONDS, or the deadline has come."""
        idle_since = time.monotonic()
        while self.process.poll() is None and time.monotonic() < deadline:
            now = time.monotonic()
            if not self._engine.idle():
                idle_since = now
            elif now - idle_since > IDLE_SECONDS:
                break
            time.sleep(0.05)

    def kill(self) -> None:
        """End the server and all that it started, at once."""
        self._ready_file.set(False)
        self._engine.close()
        children = []
        processes: list[subprocess.Popen[str] | subprocess.Popen[bytes]] = [self.process]
        if self._door is not None:
            processes.append(self._door)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                children += psutil.Process(process.pid).children(recursive=True)
        self._regions += [stub[1] for child in children if (stub := _stub(child)) is not None]
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        _, alive = psutil.wait_procs(children, timeout=2)
        for child in alive:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._reader.join(timeout=2)
        self._folder.cleanup()
        for pidfd in self._models:
            os.close(pidfd)
        self._models.clear()
        for region in self._regions:
            region.unlink(missing_ok=True)

    def _read_log(self) -> None:
        """Pass errors and warnings on; everything, if verbose."""
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in map(str.rstrip, lines):
                if line in CRASHES:
                    self._crash = CRASHES[line]
                    self._end_crashed()
                if line.startswith(("E", "W", "engine: ", "error: ", "Traceback")):
                    self.errors.append(line)
                if self._verbose or (line.startswith(("E", "W", "engine: ")) and not _is_noise(line)):
                    with suppress(OSError, ValueError):  # nobody reads it any more, or the disk is full: read on,
                        print(line, file=sys.stderr, flush=True)  # or Triton would stop at its next line

    def _end_crashed(self) -> None:
        """Triton 2.51 answers a crash by printing its stack. If it crashed with the heap locked it waits for that lock
        instead, for ever, and so do its clients: so it is killed if it is still there after a while."""
        timer = threading.Timer(CRASH_SECONDS, self.process.kill)
        timer.daemon = True
        timer.start()


def _check_folders(path: Path, deployment: deployments.Deployment) -> None:
    """Raises DeploymentError if there is no model where the deployment, of the file `path`, has it.

    Each of Triton's models would say so with a stack of its own.
    """
    model = deployment.model
    for key, folder in (("model.path", model.path), ("model.tokenizer", model.tokenizer)):
        if folder is not None and not Path(folder).is_dir():
            raise deployments.DeploymentError(
                f"{path}: {key}: there is no folder {folder}; relative paths start at the deployment file"
            )
    if deployment.engine.kind in ("transformers", "vllm") and not (Path(model.path) / "config.json").is_file():
        raise deployments.DeploymentError(
            f"{path}: model.path: {model.path} has no config.json; it must be a model folder as on Hugging Face"
        )


def _stub(process: psutil.Process) -> tuple[str, Path] | None:
    """Model and shared memory of a process of Triton's Python backend; None if it is none."""
    with suppress(psutil.Error):
        command = process.cmdline()
        if len(command) > 2 and "triton_python_backend_stub" in command[0]:
            return Path(command[1]).parents[1].name, Path("/dev/shm") / command[2]
    return None


def _is_noise(line: str) -> bool:
    """Warnings that say only that there is no GPU, or that cache metrics are off."""
    return any(text in line for text in NOISE)


def _command(triton: tritonserver.Triton, models: Path, addresses: Addresses) -> list[str]:
    nobody = f"{CLOSED_APIS}:roundhouse={secrets.token_hex(32)}"  # a header that nobody knows
    return [
        str(triton.binary),
        f"--model-repository={models}",
        f"--backend-directory={triton.backends}",
        f"--http-address={addresses.http_address}",
        f"--http-port={addresses.http_port}",
        f"--grpc-address={addresses.grpc_address}",
        f"--grpc-port={addresses.grpc_port}",
        f"--metrics-address={addresses.metrics_address}",
        f"--metrics-port={addresses.metrics_port}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        f"--http-restricted-api={nobody}",
        f"--grpc-restricted-protocol={nobody}",
        "--model-control-mode=none",
        "--exit-on-error=true",
        "--allow-cpu-metrics=false",
        "--backend-config=python,shm-default-byte-size=16777216",
        "--backend-config=python,shm-growth-byte-size=16777216",
    ]


def _door_command(deployment: Path, addresses: Addresses, drain_seconds: int) -> list[str]:
    return [
        *(sys.executable, "-m", "roundhouse.cli", "openai", str(deployment)),
        *("--port", str(addresses.openai_port), "--address", addresses.openai_address),
        *("--grpc-url", f"{addresses.grpc_address}:{addresses.grpc_port}"),
        *("--drain-seconds", str(drain_seconds)),
    ]


def _reachable(address: str) -> str:
    return "127.0.0.1" if address in ("0.0.0.0", "") else address


def serve(
    deployment: Path,
    addresses: Addresses,
    *,
    openai: bool,
    drain_seconds: int,
    ready_file: Path | None = None,
    verbose: bool,
) -> int:
    """Run a server until SIGTERM or Ctrl-C. Returns the exit code; a second signal ends it at once."""
    console = Console(stderr=True)
    stop = threading.Event()
    server: Server | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and server is not None:
            server.kill()
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        server = Server(
            deployment, addresses, openai=openai, drain_seconds=drain_seconds, ready_file=ready_file, verbose=verbose
        )
        server.wait_ready(console, stop)
    except (deployments.DeploymentError, tritonserver.TritonError, ServeError) as error:
        if server is not None:
            server.kill()
        _say(console, f"cannot serve {deployment}\n{error}")
        return 1
    host = _reachable(addresses.http_address)
    if stop.is_set():
        server.kill()
        return 0
    _say(
        console,
        f"ready: HTTP {host}:{addresses.http_port}, gRPC {_reachable(addresses.grpc_address)}:{addresses.grpc_port}, "
        f"metrics {_reachable(addresses.metrics_address)}:{addresses.metrics_port}",
    )
    while not stop.wait(POLL_SECONDS):
        server.tell_ready()
        model = server.lost_model()
        if server.ended(EXIT_SECONDS if model is not None else 0):  # its models end before it does
            _say(console, f"the server has ended by itself\n{server.why()}")
            server.kill()
            return 1
        if model is not None:
            _say(console, f"the process of {model} has died: open streams finish, then the server ends")
            server.drain()
            return 1
    _say(console, "draining: open streams finish, new requests are refused (once more to stop at once)")
    return server.drain()


def _say(console: Console, text: str) -> None:
    """To whoever reads it: a closed pipe or a full disk must not keep a server from serving or draining."""
    with suppress(OSError):
        console.print(text, highlight=False, markup=False)
