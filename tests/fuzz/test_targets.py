"""The short form of fuzzing; `scripts/fuzz` is the long one. Found cases are kept as examples."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_nothing_but_refusals(target: object) -> None:
    @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=400))
    def check(data: bytes) -> None:
        target(data)  # type: ignore[operator]

    check()
