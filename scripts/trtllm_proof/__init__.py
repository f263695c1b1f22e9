"""The proof of the TensorRT-LLM path on a machine that has it: `scripts/prove-trtllm`.

Everything before it ran over stand-ins that were made from NVIDIA's published sources. Here the installed package is
compared with what was recorded of it, engines are built and served, and the project's own tests run on them.
"""
