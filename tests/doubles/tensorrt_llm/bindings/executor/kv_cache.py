"""`tensorrt_llm.bindings.executor.kv_cache`."""

from __future__ import annotations

from tensorrt_llm import _library

for _name, _member in _library.LIBRARY.members.items():
    if _name.startswith("kv_cache."):
        globals()[_name.removeprefix("kv_cache.")] = _member
