"""Compiled TensorRT-LLM engines as files: what is built, how, and whether it is what the deployment asks for."""
