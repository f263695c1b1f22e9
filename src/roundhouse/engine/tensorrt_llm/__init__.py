"""The TensorRT-LLM engine: compiled engines, run by the Executor of TensorRT-LLM 1.2.1's bindings."""
