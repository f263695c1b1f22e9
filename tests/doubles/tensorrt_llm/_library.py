"""The generated classes, in one place for the modules that extend them."""

from __future__ import annotations

from tensorrt_llm._nanobind import Library
from tensorrt_llm._surface import EXECUTOR

LIBRARY = Library(EXECUTOR["classes"], EXECUTOR["enums"], "tensorrt_llm.bindings.executor")
