"""A stand-in for TensorRT-LLM 1.2.1, strict in what it takes. Only tests put it on their path; see README.md."""

from tensorrt_llm._surface import SURFACE

__version__: str = SURFACE["version"]
