"""What postprocessing takes: one call keeps it busy, and all streams of the ensemble wait."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from roundhouse.engine.base import RequestError

sys.modules.setdefault("triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
from roundhouse.triton.postprocessing import MOST, check_sizes  # noqa: E402  (it imports that module)


@pytest.mark.parametrize("name", MOST)
def test_a_call_that_would_keep_all_others_waiting_is_refused(name: str) -> None:
    check_sizes({name: np.zeros((1, 1, MOST[name]), dtype=np.int32)})
    with pytest.raises(RequestError, match=rf"^{name}: has {MOST[name] + 1} values; at most {MOST[name]} are allowed"):
        check_sizes({name: np.zeros((1, 1, MOST[name] + 1), dtype=np.int32)})
