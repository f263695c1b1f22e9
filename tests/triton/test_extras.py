"""Draft tokens, retention and LoRA adapters: from tensors to a request, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import EngineInfo, ErrorCode, Feature, LoraWeights, Retention, RetentionRange
from roundhouse.triton import extras
from roundhouse.triton.fields import Fields

INFO = EngineInfo("test", "1", "m", 1024, 2048, 8, 8, 32, 512)
PARSERS = {
    Feature.DRAFT_TOKENS: (extras.draft_tokens, {"draft_input_ids": [3, 4]}),
    Feature.RETENTION: (extras.retention, {"retention_decode_priority": [90]}),
    Feature.LORA: (extras.lora_id, {"lora_task_id": [7]}),
    Feature.LORA_WEIGHTS: (extras.lora_weights, {"lora_weights": [[1.0]]}),
}
RANGES = {
    "retention_token_range_starts": [0, 10],
    "retention_token_range_ends": [10, -1],
    "retention_token_range_priorities": [100, 20],
}


def fields(**inputs: Any) -> Fields:
    return Fields({name: np.asarray(value) for name, value in inputs.items()})


@pytest.mark.parametrize("feature", PARSERS)
def test_nothing_given_is_nothing_asked(feature: Feature) -> None:
    parse, _ = PARSERS[feature]
    assert not parse(fields(), msgspec.structs.replace(INFO, lacks={feature: "no"}))


@pytest.mark.parametrize("feature", PARSERS)
def test_what_the_engine_lacks_is_refused_with_its_reason(feature: Feature) -> None:
    parse, given = PARSERS[feature]
    with pytest.raises(RequestError, match=rf"^{next(iter(given))}: not compiled for it") as caught:
        parse(fields(**given), msgspec.structs.replace(INFO, lacks={feature: "not compiled for it"}))
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_draft_tokens() -> None:
    assert extras.draft_tokens(fields(draft_input_ids=[3, 4]), INFO) == (3, 4)
    with pytest.raises(RequestError, match=r"^draft_logits: "):
        extras.draft_tokens(fields(draft_input_ids=[3], draft_logits=[[0.5]]), INFO)


def test_retention_of_ranges_and_of_the_answer() -> None:
    retention = extras.retention(fields(**RANGES, retention_decode_duration_ms=[500]), INFO)
    assert retention == Retention((RetentionRange(0, 10, 100), RetentionRange(10, -1, 20)), 35, 500)
    timed = extras.retention(fields(**RANGES, retention_token_range_durations_ms=[7, -1]), INFO)
    assert timed is not None
    assert [each.duration_ms for each in timed.ranges] == [7, -1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"retention_token_range_ends": [10]}, "retention_token_range_ends has 1"),
        ({"retention_token_range_priorities": []}, "retention_token_range_priorities: missing"),
    ],
)
def test_ranges_that_do_not_fit_together_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        extras.retention(fields(**{**RANGES, **changes}), INFO)


def test_an_adapter_by_number_and_its_weights() -> None:
    assert extras.lora_id(fields(lora_task_id=[7]), INFO) == 7
    weights = np.arange(8, dtype=np.float16).reshape(2, 4)
    given = extras.lora_weights(fields(lora_weights=weights, lora_config=[[0, 1, 8], [1, 1, 8]]), INFO)
    assert given == LoraWeights(weights.tobytes(), ((0, 1, 8), (1, 1, 8)))
    with pytest.raises(RequestError, match=r"^lora_task_id: 0 is not allowed"):
        extras.lora_id(fields(lora_task_id=[0]), INFO)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"lora_config": [[0, 1, 8]]}, "lora_weights: missing"),
        ({"lora_weights": [[1.0]]}, "lora_config: missing"),
        ({"lora_weights": [[1.0]], "lora_config": [[0, 1]]}, "lora_weights, lora_config: have"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(inputs: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=rf"^{named}"):
        extras.lora_weights(fields(**inputs), INFO)
