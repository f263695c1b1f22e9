"""Roundhouse: LLM serving on Triton, from one deployment file."""
