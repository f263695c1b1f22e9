"""The page of the GPU benchmark says what its JSON files say."""

from __future__ import annotations

import gpu_report


def test_the_page_is_that_of_the_figures() -> None:
    written = (gpu_report.BENCHMARKS / "gpu.md").read_text(encoding="utf-8")
    assert written == gpu_report.page(), "run scripts/gpu_report.py"
    for precision in gpu_report.PRECISIONS:
        for kind in gpu_report.KINDS:
            for name in gpu_report.read(precision + kind)["targets"]:
                assert gpu_report.TARGETS[name] in written


def test_side_by_side_the_best_vllm_serve_is_the_measure() -> None:
    targets = {
        "ensemble": {"1": {"tokens_per_second": 99.0}},
        "vllm-4": {"1": {"tokens_per_second": 80.0}},
        "vllm-rust": {"1": {"tokens_per_second": 90.0}},
    }
    assert gpu_report.best_vllm(targets, "1") == 90
