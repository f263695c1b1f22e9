"""`tensorrt_llm.bindings.executor`: every class and enum of the surface, and an Executor that computes."""

from __future__ import annotations

from tensorrt_llm import _executor, _library

for _name, _member in _library.LIBRARY.members.items():
    if "." not in _name:
        globals()[_name] = _member
Executor = _executor.Executor
KvCacheRetentionConfig = _executor.KvCacheRetentionConfig
Response = _executor.Response
IterationStats = _executor.IterationStats
