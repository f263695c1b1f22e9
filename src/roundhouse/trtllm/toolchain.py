"""What builds engines on this machine: TensorRT-LLM, its tools, the GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

IMAGE = "run this in the image of build/ (build/README.md)"
# The version without importing the library, which would take half a minute and start MPI.
VERSION = """
import importlib.util, pathlib, runpy, sys
spec = importlib.util.find_spec("tensorrt_llm")
if spec is None:
    sys.exit(3)
file = pathlib.Path(spec.submodule_search_locations[0], "version.py")
if file.exists():
    print(runpy.run_path(str(file))["__version__"])
else:
    import tensorrt_llm
    print(tensorrt_llm.__version__)
"""


class ToolchainError(Exception):
    """Something that building needs is missing here. One line that says what, and where it is found."""


@dataclass(frozen=True)
class Gpu:
    """`compute_capability` such as 9.0. `product` is the name as the node label nvidia.com/gpu.product spells it."""

    name: str
    compute_capability: str

    @property
    def product(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Toolchain:
    """`version`: of TensorRT-LLM. The others are paths of interpreter and tools."""

    version: str
    gpus: tuple[Gpu, ...]
    python: str
    quantize: str
    trtllm_build: str

    @property
    def compute_capability(self) -> str:
        return self.gpus[0].compute_capability


def find(examples: Path) -> Toolchain:
    """All that a build needs. Raises ToolchainError for what is missing."""
    interpreter = python()
    quantize = (examples / "quantization/quantize.py").absolute()  # tools run in a folder of their own
    if not quantize.is_file():
        raise ToolchainError(f"--examples {examples}: has no quantization/quantize.py; {IMAGE}, or name its folder")
    beside = Path(interpreter).parent / "trtllm-build"
    trtllm_build = shutil.which("trtllm-build") or (str(beside) if beside.is_file() else None)
    if trtllm_build is None:
        raise ToolchainError(f"trtllm-build: not found; {IMAGE}")
    compiler = str(Path(trtllm_build).absolute())
    return Toolchain(tensorrt_llm_version(interpreter), gpus(), interpreter, str(quantize), compiler)


def python() -> str:
    """The interpreter that has TensorRT-LLM: ROUNDHOUSE_ENGINE_PYTHON, or ours."""
    return os.environ.get("ROUNDHOUSE_ENGINE_PYTHON") or sys.executable


def tensorrt_llm_version(interpreter: str) -> str:
    """Raises ToolchainError if the interpreter has no TensorRT-LLM."""
    asked = _output([interpreter, "-c", VERSION], "ROUNDHOUSE_ENGINE_PYTHON")
    if asked.returncode == 3:
        raise ToolchainError(f"tensorrt_llm: {interpreter} does not have it; {IMAGE}, or set ROUNDHOUSE_ENGINE_PYTHON")
    if asked.returncode:
        raise ToolchainError(f"tensorrt_llm: cannot be loaded by {interpreter}: {_last_line(asked.stderr)}")
    return _last_line(asked.stdout)


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine, from nvidia-smi. Raises ToolchainError if there is none, or no driver."""
    asked = _output(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"], "nvidia-smi")
    if asked.returncode:
        raise ToolchainError(
            f"nvidia-smi: {_last_line(asked.stdout + asked.stderr)}; engines are compiled on their GPU"
        )
    rows = [line.rsplit(",", 1) for line in asked.stdout.splitlines() if "," in line]
    if not rows:
        raise ToolchainError("nvidia-smi: lists no GPU; engines are compiled on the GPU that will serve them")
    return tuple(Gpu(name.strip(), capability.strip()) for name, capability in rows)


def _output(command: list[str], what: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except OSError as error:
        raise ToolchainError(f"{what}: {command[0]} cannot be run: {error.strerror}; {IMAGE}") from error


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
