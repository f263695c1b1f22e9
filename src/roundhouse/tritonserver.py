"""Finding a Triton: the one of NVIDIA's container, or the one inside the nvidia-pytriton wheel, put together to run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/opt/tritonserver")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class TritonError(Exception):
    """There is no Triton that can run here. The message says what to install."""


@dataclass(frozen=True)
class Triton:
    """A Triton that can be started: the binary, the folder of its backends, the environment that it needs."""

    binary: Path
    backends: Path
    environment: dict[str, str]


def find() -> Triton:
    """The container's Triton if there is one, else the wheel's. Raises TritonError."""
    binary = SYSTEM / "bin/tritonserver"
    if binary.is_file():
        return Triton(binary, SYSTEM / "backends", _environment([]))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise TritonError("there is no Triton here: run scripts/setup, or pip install --no-deps nvidia-pytriton==0.7.0")
    package = Path(spec.origin).parent
    return _of_wheel(package / "tritonserver", package.parent / "nvidia_pytriton.libs")


def _of_wheel(server: Path, libraries: Path) -> Triton:
    backends = _assemble(server)
    binary = server / "bin/tritonserver"
    if not os.access(binary, os.X_OK):
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    folders = [libraries, server / "external_libs", server / "lib", libpython_folder()]
    return Triton(binary, backends, _environment([folder for folder in folders if folder.is_dir()]))


def libpython_folder() -> Path:
    """The folder of libpython3.X.so.1.0, which Triton's Python stub is linked to. Raises TritonError."""
    name = f"libpython{PYTHON}.so.1.0"
    places = [
        sysconfig.get_config_var("LIBDIR"),
        sysconfig.get_config_var("LIBPL"),
        f"{sys.base_prefix}/lib",
        f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ]
    for place in places:
        if place and (Path(place) / name).is_file():
            return Path(place)
    raise TritonError(
        f"{name} is missing: Triton's Python backend needs Python as a shared library. On Debian and Ubuntu: "
        f"apt install libpython{PYTHON}. With pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install {PYTHON}"
    )


def _assemble(server: Path) -> Path:
    """A backends folder with the Python backend and the stub of this Python side by side, made once a machine."""
    stub = server / f"python_backend_stubs/{PYTHON}/triton_python_backend_stub"
    if not stub.is_file():
        raise TritonError(f"the nvidia-pytriton wheel has no stub for Python {PYTHON}: use Python 3.11 or 3.12")
    backends = Path(sys.prefix) / f"share/roundhouse/backends-{PYTHON}"
    if (backends / "python/triton_python_backend_stub").is_file():
        return backends
    backends.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=backends.parent))
    shutil.copytree(server / "backends/python", beside / "python")
    shutil.copy2(stub, beside / "python")
    (beside / "python/triton_python_backend_stub").chmod(0o755)
    beside.chmod(0o755)
    try:
        beside.rename(backends)
    except OSError:  # another process was faster
        shutil.rmtree(beside)
    return backends


def _environment(libraries: list[Path]) -> dict[str, str]:
    """Ours, with the virtual environment where Triton's stub looks for it."""
    environment = dict(os.environ)
    paths = [str(path) for path in libraries] + environment.get("LD_LIBRARY_PATH", "").split(":")
    environment["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    environment["VIRTUAL_ENV"] = sys.prefix
    environment["PATH"] = f"{sys.prefix}/bin:{environment.get('PATH', '')}"
    return environment
