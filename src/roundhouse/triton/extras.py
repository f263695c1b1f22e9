"""The contract's inputs that few engines take: draft tokens, retention of KV blocks, LoRA adapters. Pure functions."""

from __future__ import annotations

import numpy as np

from roundhouse.engine.protocol import EngineInfo, Feature, LoraWeights, Retention, RetentionRange
from roundhouse.triton.fields import Fields, refuse, refuse_feature

RANGES = ("starts", "ends", "priorities", "durations_ms")
DEFAULT_PRIORITY = 35


def refuse_lacking(fields: Fields, name: str, feature: Feature, info: EngineInfo) -> None:
    reason = info.lacks.get(feature, f"this server does not pass it on to the {info.engine} engine")
    refuse_feature(fields.label(name), reason)


def draft_tokens(fields: Fields, info: EngineInfo) -> tuple[int, ...]:
    """`draft_input_ids` INT32 `[n]`. Raises RequestError."""
    names = ("draft_input_ids", "draft_logits", "draft_acceptance_threshold")
    given = _given(fields, names, Feature.DRAFT_TOKENS, info)
    for name in given:
        if name != "draft_input_ids":
            refuse_feature(fields.label(name), "draft tokens are accepted where they are the answer's; leave it out")
    array = fields.array("draft_input_ids")
    return () if array is None else tuple(array.reshape(-1).tolist())


def retention(fields: Fields, info: EngineInfo) -> Retention | None:
    """`retention_token_range_*` INT32 `[n]` and `retention_decode_*`; a duration of -1 is for ever.

    Raises RequestError.
    """
    names = [f"retention_token_range_{part}" for part in RANGES]
    decode = ("retention_decode_priority", "retention_decode_duration_ms")
    given = _given(fields, (*names, *decode), Feature.RETENTION, info)
    if not given:
        return None
    columns = {name: array.reshape(-1).tolist() for name in names if (array := fields.array(name)) is not None}
    if columns and (missing := [name for name in names[:3] if name not in columns]):
        refuse(f"{fields.label(missing[0])}: missing; each range needs a start, an end and a priority")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{fields.label(name)} has {length}" for name, length in lengths.items())
        refuse(f"{told} values; send one for each range")
    count = max(lengths.values(), default=0)
    durations = columns.get(names[3], [-1] * count)
    ranges = zip(*(columns.get(name, []) for name in names[:3]), durations, strict=True)
    priority, duration = (fields.integer(name) for name in decode)
    return Retention(
        tuple(RetentionRange(*values) for values in ranges),
        DEFAULT_PRIORITY if priority is None else priority,
        -1 if duration is None else duration,
    )


def lora_id(fields: Fields, info: EngineInfo) -> int:
    """`lora_task_id` UINT64, 0 if there is none. Raises RequestError."""
    if not _given(fields, ("lora_task_id",), Feature.LORA, info):
        return 0
    given = fields.integer("lora_task_id")
    if not given:
        refuse(f"{fields.label('lora_task_id')}: {given} is not allowed; it must be the id of an adapter, from 1 up")
    return given


def lora_weights(fields: Fields, info: EngineInfo) -> LoraWeights | None:
    """`lora_weights` FP16 `[rows, n]` and `lora_config` INT32 `[rows, 3]`, of an adapter that the engine is to keep.

    Raises RequestError.
    """
    if not _given(fields, ("lora_weights", "lora_config"), Feature.LORA_WEIGHTS, info):
        return None
    weights, config = fields.array("lora_weights"), fields.array("lora_config")
    if weights is None or config is None:
        refuse(f"lora_{'weights' if weights is None else 'config'}: missing; an adapter brings both, or neither")
    if weights.ndim != 2 or config.shape != (len(weights), 3):
        shapes = f"{list(weights.shape)} and {list(config.shape)}"
        refuse(f"lora_weights, lora_config: have shapes {shapes}; they must be [rows, n] and [rows, 3]")
    rows = tuple((int(module), int(layer), int(size)) for module, layer, size in config.tolist())
    return LoraWeights(weights.astype(np.float16).tobytes(), rows)


def _given(fields: Fields, names: tuple[str, ...], feature: Feature, info: EngineInfo) -> list[str]:
    """Those of the inputs that a request has. Raises RequestError if there is one, and the engine lacks the feature."""
    given = [name for name in names if fields.array(name) is not None]
    if given and feature in info.lacks:
        refuse_lacking(fields, given[0], feature, info)
    return given
