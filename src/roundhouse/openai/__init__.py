"""The OpenAI-compatible front door: worker processes that are fronts of a running server's engine."""
