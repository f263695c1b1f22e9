"""What the model.py files call: tensors to requests, pacing, metrics."""
