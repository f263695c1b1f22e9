"""What the model.py files call: Triton's tensors to engine requests, and the engine's tokens back to Triton."""
