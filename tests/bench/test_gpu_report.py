"""The page of the GPU benchmark says what its JSON files say."""

from __future__ import annotations

import gpu_report


def test_the_page_is_that_of_the_figures() -> None:
    written = (gpu_report.BENCHMARKS / "gpu.md").read_text(encoding="utf-8")
    assert written == gpu_report.page(), "run scripts/gpu_report.py"
    for precision in gpu_report.PRECISIONS:
        for name in gpu_report.read(precision)["targets"]:
            assert gpu_report.TARGETS[name] in written
