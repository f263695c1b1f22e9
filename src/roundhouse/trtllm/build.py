"""`roundhouse build`: the engines of a deployment, made once, held to the gate, put in place whole.

An engine is made in a folder beside its place and renamed at the end, so that the place holds a whole engine or none.
Beside the engine folder E lie E.lock, E.logs/ (kept), and while a build runs E.building/.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from roundhouse import gpus
from roundhouse.deployment import Deployment
from roundhouse.plan import PlanError, Shape, plan
from roundhouse.trtllm import engine_folder, gate, step
from roundhouse.trtllm.commands import TENSORRT_LLM, EngineBuild, builds
from roundhouse.trtllm.engine_folder import EngineFolder, EngineFolderError, Manifest
from roundhouse.trtllm.toolchain import Toolchain, ToolchainError
from roundhouse.trtllm.toolchain import find as find_toolchain


class BuildError(Exception):
    """An engine was not built. The first line says what is wrong and what to change."""


@dataclass(frozen=True)
class Places:
    """Where one engine goes, and what lies beside it."""

    engine: Path

    @property
    def working(self) -> Path:
        return self._beside("building")

    @property
    def logs(self) -> Path:
        return self._beside("logs")

    @property
    def lock(self) -> Path:
        return self._beside("lock")

    @property
    def replaced(self) -> Path:
        return self._beside("replaced")

    def _beside(self, what: str) -> Path:
        return self.engine.with_name(f"{self.engine.name}.{what}")


def build(deployment: Deployment, *, examples: Path, console: Console) -> None:
    """Build the engines of a deployment that are not there yet. Raises BuildError; what was there is then untouched."""
    try:
        wanted = builds(deployment)
        for each in wanted:
            check_checkpoint(Path(each.model), trust_remote_code=deployment.model.trust_remote_code)
        plan(deployment)  # hours of work for what does not fit the GPUs help nobody
        tools = find_toolchain(examples)
        check_machine(deployment, tools, console)
        for each in wanted:
            _build_one(deployment, each, tools, console)
    except (ValueError, PlanError, EngineFolderError, ToolchainError, gate.GateError, step.StepError) as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(f"{error.filename or 'build'}: {error.strerror}") from error


def dry_run(deployment: Deployment, *, examples: Path) -> list[str]:
    """The commands as lines for a shell, with a comment for each engine. Raises BuildError."""
    try:
        wanted = builds(deployment)
    except ValueError as error:
        raise BuildError(str(error)) from error
    lines = []
    for each in wanted:
        lines.append(f"# {each.role}: {each.model} -> {each.engine}")
        folders = _folders(each, Places(Path(each.engine)))
        for one in each.steps:
            lines.append(shell(one.filled({**folders, "quantize": str(examples / "quantization/quantize.py")})))
    return lines


def shell(command: list[str]) -> str:
    """One command for a shell, a flag a line."""
    return shlex.join(command).replace(" --", " \\\n    --")


def check_checkpoint(model: Path, *, trust_remote_code: bool) -> None:
    """Raises BuildError for a folder that quantize.py would not take, or would run code from."""
    try:
        config = json.loads((model / "config.json").read_bytes())
    except OSError as error:
        raise BuildError(
            f"model: {model}/config.json cannot be read ({error.strerror}); download the checkpoint there, for "
            f"instance with: hf download OWNER/{model.name} --local-dir {model}"
        ) from error
    engine_folder.checkpoint_files(model)
    if "quantization_config" in config or (model / "hf_quant_config.json").exists():
        raise BuildError(f"model: {model} is quantised already; give the checkpoint in 16 bits")
    if "auto_map" in config and not trust_remote_code:
        raise BuildError(
            f"model.trust_remote_code: {model} has Python code of its own, which quantize.py would run; read the code, "
            "then say true"
        )


def check_machine(deployment: Deployment, tools: Toolchain, console: Console) -> None:
    """Raises BuildError if engines for this deployment cannot be compiled here."""
    assert deployment.gpu is not None, "checked by the schema"
    if tools.version != TENSORRT_LLM:
        raise BuildError(
            f"tensorrt_llm: {tools.version} is installed, and builds are written for {TENSORRT_LLM}; use the image of "
            "build/Dockerfile"
        )
    wanted = gpus.find(deployment.gpu.product)
    found = tools.gpus[0]
    if any(gpu.compute_capability != wanted.compute_capability for gpu in tools.gpus):
        raise BuildError(
            f"gpu.product: {deployment.gpu.product} has compute capability {wanted.compute_capability}, and this "
            f"machine has {found.name} with {found.compute_capability}; an engine runs only where it was compiled for"
        )
    if len(tools.gpus) < deployment.gpu.per_node:  # ranks of other machines are compiled here too, one after the other
        raise BuildError(
            f"gpu.tensor_parallel: {deployment.gpu.per_node} GPUs are needed to compile, and this machine has "
            f"{len(tools.gpus)}"
        )
    if found.product != deployment.gpu.product:
        console.print(f"note: tuned for {found.name}, which is not {deployment.gpu.product}", highlight=False)


def key_of(each: EngineBuild, checkpoint_hash: str, version: str, compute_capability: str) -> str:
    """Equal keys mean equal engines: the same checkpoint, TensorRT-LLM, compute capability and flags."""
    inputs = [checkpoint_hash, version, compute_capability, [one.command for one in each.steps]]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _build_one(deployment: Deployment, each: EngineBuild, tools: Toolchain, console: Console) -> None:
    places = Places(Path(each.engine))
    with _locked(places, console) as lock:
        _recover(places)
        present = _present(places.engine)
        inputs = _inputs(each, present.manifest if present else None, tools, console)
        if present is not None and _is_current(present, each, inputs, tools, console):
            console.print(f"{places.engine}: is up to date", highlight=False)
            return
        _check_room(deployment, each, places)
        try:
            seconds = _run_steps(each, places, tools, lock, console)
            _check_built(places, each, tools)
            _write_manifest(places.working / "engine", each, inputs, tools, seconds)
            _put_in_place(places)
        finally:
            shutil.rmtree(places.working, ignore_errors=True)
        console.print(f"{places.engine}: built; logs in {places.logs}", highlight=False)


@dataclass(frozen=True)
class _Inputs:
    """What an engine is made from: `files` have size in bytes and mtime in ns; `key` as in the manifest."""

    files: dict[str, tuple[int, int]]
    checkpoint_hash: str
    key: str


def _inputs(each: EngineBuild, manifest: Manifest | None, tools: Toolchain, console: Console) -> _Inputs:
    """Files that have not changed since they were last hashed are not read again."""
    files = engine_folder.checkpoint_files(each.model)
    if manifest is not None and manifest.checkpoint_files == files:
        checkpoint_hash = manifest.checkpoint_hash
    else:
        checkpoint_hash = _hash(Path(each.model), files, console)
    return _Inputs(files, checkpoint_hash, key_of(each, checkpoint_hash, tools.version, tools.compute_capability))


def _is_current(present: EngineFolder, each: EngineBuild, inputs: _Inputs, tools: Toolchain, console: Console) -> bool:
    """Whether the engine in place is the one that would be built, and is whole."""
    if present.manifest is None or present.manifest.key != inputs.key:
        console.print(f"{present.path}: was made otherwise; a new engine will replace it", highlight=False)
        return False
    found = gate.mismatches(present, each.wanted, version=tools.version, compute_capability=tools.compute_capability)
    for line in (lines := list(found)):
        console.print(f"{present.path}: {line}; it is built again", highlight=False, markup=False)
    return not lines


def _write_manifest(
    engine: Path, each: EngineBuild, inputs: _Inputs, tools: Toolchain, seconds: dict[str, float]
) -> None:
    manifest = Manifest(
        key=inputs.key,
        checkpoint=each.model,
        checkpoint_hash=inputs.checkpoint_hash,
        checkpoint_files=inputs.files,
        tensorrt_llm=tools.version,
        compute_capability=tools.compute_capability,
        gpu=tools.gpus[0].name,
        commands=[list(one.command) for one in each.steps],
        files=engine_folder.engine_files(engine),
        seconds=seconds,
        built_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        roundhouse=installed_version("roundhouse"),
    )
    engine_folder.write_manifest(engine, manifest)


def _run_steps(each: EngineBuild, places: Places, tools: Toolchain, lock: int, console: Console) -> dict[str, float]:
    """Seconds of each step. The checkpoint between the steps is removed: it is as large as the engine."""
    places.working.mkdir(parents=True)
    folders = {**_folders(each, places), "python": tools.python, "quantize": tools.quantize}
    seconds = {}
    for one in each.steps:
        command = one.filled(folders)
        if command[0] == "trtllm-build":
            command[0] = tools.trtllm_build
        log = places.logs / f"{one.name}.log"
        name = f"{each.role}: {one.name}"
        seconds[one.name] = round(
            step.run(name, command, cwd=places.working, log=log, console=console, keep_open=lock), 1
        )
    return seconds


def _check_built(places: Places, each: EngineBuild, tools: Toolchain) -> None:
    """The gate. Raises GateError; or EngineFolderError, if there is no engine although the tool reported success."""
    built = engine_folder.read(places.working / "engine")
    found = gate.mismatches(built, each.wanted, version=tools.version, compute_capability=tools.compute_capability)
    if lines := [f"{places.engine}: {line}" for line in found]:
        log = places.logs / f"{each.steps[-1].name}.log"
        raise gate.GateError("\n".join([*lines, f"the engine was compiled, and is not kept; whole log: {log}"]))


def _folders(each: EngineBuild, places: Places) -> dict[str, str]:
    return {
        "python": "python3",
        "model": each.model,
        "checkpoint": str(places.working / "checkpoint"),
        "engine": str(places.working / "engine"),
    }


def _present(engine: Path) -> EngineFolder | None:
    """The engine that is in place, if it can be read. Raises BuildError if something else is there."""
    if not engine.exists():
        return None
    if not engine.is_dir() or (any(engine.iterdir()) and not (engine / engine_folder.CONFIG).exists()):
        raise BuildError(f"{engine}: is there and is not an engine; choose another engine.path, or remove it")
    with suppress(EngineFolderError):
        return engine_folder.read(engine)
    return None


def _hash(model: Path, files: dict[str, tuple[int, int]], console: Console) -> str:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"reading {model.name}", total=sum(size for size, _ in files.values()))
        return engine_folder.checkpoint_hash(model, files, lambda count: progress.advance(task, count))


def _check_room(deployment: Deployment, each: EngineBuild, places: Places) -> None:
    """Raises BuildError unless the quantised checkpoint and the engine fit beside each other."""
    needed = 2 * Shape.read(Path(each.model)).weight_bytes(deployment.precision.weights)
    free = shutil.disk_usage(places.engine.parent).free
    if free < needed:
        raise BuildError(
            f"{places.engine.parent}: {free / 1e9:.1f} GB are free, and the build needs {needed / 1e9:.1f} GB (the "
            "quantised checkpoint, for a while, and the engine); free some space, or choose another engine.path"
        )


@contextmanager
def _locked(places: Places, console: Console) -> Iterator[int]:
    """Hold the lock of an engine; wait while another build holds it. The steps inherit it, so that what survives us
    still keeps others away."""
    places.lock.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
            with console.status(f"waiting for another build of {places.engine} ({holder})"):
                console.print(f"waiting for another build of {places.engine} ({holder})", highlight=False)
                fcntl.flock(lock, fcntl.LOCK_EX)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _recover(places: Places) -> None:
    """Clear what a build that was killed left behind; the lock says that it is no longer at work."""
    shutil.rmtree(places.working, ignore_errors=True)
    if places.replaced.exists() and not places.engine.exists():
        places.replaced.rename(places.engine)
    shutil.rmtree(places.replaced, ignore_errors=True)


def _put_in_place(places: Places) -> None:
    if places.engine.exists():
        places.engine.rename(places.replaced)
    (places.working / "engine").rename(places.engine)
    shutil.rmtree(places.replaced, ignore_errors=True)
