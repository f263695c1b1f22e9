"""Triton's entry point of the model `tensorrt_llm_bls`; the code is in roundhouse.triton.tensorrt_llm_bls."""

import locale

locale.setlocale(locale.LC_ALL, "C.UTF-8")  # Triton's interpreter starts with "C", in which UTF-8 files cannot be read

from roundhouse.triton.tensorrt_llm_bls import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
