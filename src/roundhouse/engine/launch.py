"""How the engine process is started: alone, or as the first of several ranks."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

from roundhouse.deployment import Deployment, TensorrtLlmEngine

PR_SET_PDEATHSIG = 1  # of prctl


def ranks(deployment: Deployment) -> int:
    """Processes that mpirun starts: one for each GPU of an engine in leader mode; otherwise one, without mpirun."""
    engine, gpu = deployment.engine, deployment.gpu
    if isinstance(engine, TensorrtLlmEngine) and engine.launch == "leader" and gpu is not None:
        return gpu.tensor_parallel
    return 1


def command(count: int, deployment: Path, folder: Path, server_pid: int) -> list[str]:
    """`count`: ranks. Rank 0 is the engine process of the server; the others work for it."""
    host = [python(), "-m", "roundhouse.engine.host", "--deployment", str(deployment)]
    host += ["--folder", str(folder), "--server-pid", str(server_pid)]
    return host if count == 1 else ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(count), *host]


def die_with_mpirun() -> None:
    """Let the kernel end this process, if it is a rank, when mpirun is killed: mpirun itself could not."""
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def python() -> str:
    """The interpreter of the engine: ROUNDHOUSE_ENGINE_PYTHON, or that of the virtual environment.

    In Triton's stub `sys.executable` is not the interpreter's. Raises FileNotFoundError for one that is not there.
    """
    given = os.environ.get("ROUNDHOUSE_ENGINE_PYTHON")
    if given:
        found = shutil.which(given)
        if found is None:
            raise FileNotFoundError(f"ROUNDHOUSE_ENGINE_PYTHON: {given} does not exist, or is no program")
        return os.path.abspath(found)  # the engine runs in another folder
    prefix = os.environ.get("VIRTUAL_ENV") or sys.prefix
    return str(Path(prefix) / "bin/python")


def environment() -> dict[str, str]:
    """Ours, without the libraries that are meant for Triton alone."""
    ours = dict(os.environ)
    paths = ours.get("LD_LIBRARY_PATH", "").split(":")
    kept = [path for path in paths if path and "nvidia_pytriton.libs" not in path]
    ours["LD_LIBRARY_PATH"] = ":".join(kept)
    return ours
