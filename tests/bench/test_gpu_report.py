"""The page of the GPU benchmark says what its JSON files say."""

from __future__ import annotations

import gpu_report


def test_the_page_is_that_of_the_figures() -> None:
    written = (gpu_report.BENCHMARKS / "gpu.md").read_text(encoding="utf-8")
    assert written == gpu_report.page(), "run scripts/gpu_report.py"
    for table in gpu_report.TABLES:
        for name in gpu_report.read(table)["targets"]:
            assert gpu_report.title(name) in written
    found = {str(path.relative_to(gpu_report.BENCHMARKS)) for path in gpu_report.BENCHMARKS.rglob("gpu-*.json")}
    elsewhere = {"gpu-optimisations.json", "gpu-pace-1000/gpu-fp8.json"}  # optimisations.md, decisions.md
    assert found == {f"gpu-{table}.json" for table in gpu_report.TABLES} | elsewhere


def test_side_by_side_the_best_vllm_serve_is_the_measure() -> None:
    targets = {
        "ensemble": {"1": {"tokens_per_second": 99.0}},
        "vllm-4": {"1": {"tokens_per_second": 80.0}},
        "vllm-rust": {"1": {"tokens_per_second": 90.0}},
    }
    assert gpu_report.best_vllm(targets, "1") == 90


def test_a_longer_tpot_is_an_earlier_first_token() -> None:
    """As the page says, of `tensorrt_llm_bls` beside four API servers, with one exception."""
    longer, later = 0, []
    for table in ("fp8-side-by-side", "bf16-four/gpu-bf16-side-by-side"):
        targets = gpu_report.read(table)["targets"]
        for streams, four in targets["vllm-4"].items():
            ours = targets["tensorrt_llm_bls"][streams]
            if ours["tpot_ms"]["p50"] > four["tpot_ms"]["p50"]:
                longer += 1
                assert ours["end_to_end_ms"]["p50"] < 1.01 * four["end_to_end_ms"]["p50"], (table, streams)
                if ours["ttft_ms"]["p50"] >= four["ttft_ms"]["p50"]:
                    later.append((table, streams))
                    assert ours["end_to_end_ms"]["p50"] < four["end_to_end_ms"]["p50"]
    assert longer > 1
    assert later == [("fp8-side-by-side", "64")]
