"""The embedded engine: continuous batching and paged attention on transformers models, no GPU needed."""

from roundhouse.engine.embedded.config import EmbeddedConfig

__all__ = ["EmbeddedConfig"]
