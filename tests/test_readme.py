"""What the README says is so: its commands exist, its tensors are served, its figures are the measured ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gpu_report
import pytest
from typer.testing import CliRunner

from roundhouse import repository
from roundhouse.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def measured(part: str) -> Any:
    return json.loads((ROOT / f"docs/benchmarks/path-{part}.json").read_text())


def test_it_opens_with_the_two_commands() -> None:
    assert README.index("scripts/quickstart") < README.index("scripts/test") < 300


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:scripts|deployments)/[\w./-]+\w", README))))
def test_the_files_exist(name: str) -> None:
    assert (ROOT / name).exists() or name == "deployments/mine.yaml"


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_python_scripts_are_given_to_the_python_that_has_what_they_need(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    given = re.findall(r"^(?:taskset \S+ \S+ )?scripts/\w+\.py\b|`scripts/\w+\.py [^`]+`", text, flags=re.MULTILINE)
    assert given == []


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_the_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("folder", re.findall(r"^(\w+)/ ", README, flags=re.MULTILINE))
def test_the_folders_exist(folder: str) -> None:
    assert any((ROOT / folder).iterdir())


def test_the_tensors_of_the_contract_are_served() -> None:
    config = repository.read(ROOT / "model_repository/ensemble")
    served = {tensor.name for tensor in (*config.input, *config.output)}
    contract = README[README.index("## The contract") : README.index("`tensorrt_llm` takes and gives")]
    rows = [line.split("|")[1] for line in contract.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"lora_", "guided_decoding_"}
    assert len(named) > 25
    assert named <= served


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`roundhouse (\w+)`", README)) | {"serve", "check", "plan"}))
def test_the_commands_exist(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_figures_are_the_measured_ones() -> None:
    capacity, latency, embedded = measured("capacity"), measured("latency"), measured("embedded")["64 streams"]
    models = ("tensorrt_llm_bls", "ensemble")
    alone = embedded["engine alone"]["median"]["tokens_per_second"]
    one = measured("embedded")["1 stream"]
    first = one["engine alone"]["median"]["ttft_p50_ms"]
    rows = [
        [f"{capacity[model]['median']['delivered_percent']:.0f} %" for model in models],
        [f"{latency[model]['added_ms']['p50']:.1f} ms" for model in models],
        [f"{one[model]['median']['ttft_p50_ms'] - first:.1f} ms" for model in models],
        [f"{100 * embedded[model]['median']['tokens_per_second'] / alone:.0f} %" for model in models],
        [f"{embedded[model]['median']['percent_of_cores']:.0f} %" for model in models],
    ]
    for row in rows:
        assert f"| {row[0]} | {row[1]} |" in README
    assert f"({alone:,.0f} tokens/s)" in README
    cores = embedded["engine alone"]["median"]["engine_cores"], embedded[models[0]]["median"]["path_cores"]
    assert "uses {:.2f} of the two cores when it is alone, and server and client take {:.2f}".format(*cores) in README


def test_nothing_is_said_twice() -> None:
    lines = [line for line in README.splitlines() if len(line) > 60]
    assert sorted(set(lines)) == sorted(lines)


def share_of(targets: dict[str, Any], streams: str) -> float:
    """Percent of the best `vllm serve`'s rate that `tensorrt_llm_bls` has."""
    return 100 * targets["tensorrt_llm_bls"][streams]["tokens_per_second"] / gpu_report.best_vllm(targets, streams)


def spread_of(point: dict[str, Any]) -> float:
    """Percent by which the fastest run of a load is above the slowest."""
    return 100 * (max(point["runs"]) / min(point["runs"]) - 1)


def medians(points: dict[str, Any], name: str) -> dict[str, float]:
    """By streams."""
    return {streams: point[name]["p50"] for streams, point in points.items()}


def test_the_gpu_figures_are_the_measured_ones() -> None:
    told = " ".join(README.split())
    assert "\n".join(gpu_report.summary()) in README
    assert "\n".join(gpu_report.comparison()) in README
    names = ("fp8-side-by-side", "bf16-rust/gpu-bf16-side-by-side", "bf16-four/gpu-bf16-side-by-side")
    tables = [gpu_report.read(name)["targets"] for name in names]
    shares = [{streams: share_of(table, streams) for streams in table["tensorrt_llm_bls"]} for table in tables]
    of_rust, of_four = ([f"{its[count]:.1f}" for count in sorted(its, key=int)] for its in shares[1:])
    assert "has {}, {}, {} and {} % of the Rust front end's rate at 1, 64".format(*of_rust) in told
    assert "{}, {} and {} % of that of four API servers from 64 on".format(*of_four) in told
    assert f"misses by {100 - shares[0].pop('1'):.1f} % with one stream and FP8" in told
    elsewhere = [share for its in shares for share in its.values()]
    spread = max(spread_of(point) for table in tables for points in table.values() for point in points.values())
    assert f"from {100 - min(elsewhere):.1f} % below to {max(elsewhere) - 100:.1f} % above" in told
    assert f"differ by up to {spread:.1f} %." in told
    at_256 = {name: points["256"] for name, points in gpu_report.read("fp8")["targets"].items()}
    ensemble, fused = (round(at_256[name]["chunks_per_answer"]) for name in ("ensemble", "tensorrt_llm_bls"))
    assert f"it sends {ensemble} an answer, `tensorrt_llm_bls` {fused}." in README


def test_the_gpu_latencies_are_the_measured_ones() -> None:
    told = " ".join(README.split())
    fp8 = gpu_report.read("fp8-side-by-side")["targets"]
    bf16 = gpu_report.read("bf16-four/gpu-bf16-side-by-side")["targets"]
    ours, rust, four = (medians(fp8[name], "ttft_ms") for name in ("tensorrt_llm_bls", "vllm-rust", "vllm-4"))
    assert f"first token comes {ours['1'] - rust['1']:.1f} ms later than through the Rust front end" in told
    assert f"(and {four['1'] - ours['1']:.1f} ms earlier than through four API servers)" in told
    parts = fp8["tensorrt_llm_bls"]["1"]["first_token_ms"]
    assert f"Triton and its client alone take {parts['to_front'] + parts['to_client']:.1f} ms" in told
    assert [streams for streams in ours if ours[streams] >= four[streams]] == ["64"]
    assert f"except at 64 streams with FP8 ({ours['64']:.0f} ms, {four['64']:.0f})" in told
    most = 0.0
    for table in (fp8, bf16):
        (first, theirs), (tpot, their_tpot), (end, their_end) = (
            [medians(table[name], figure) for name in ("tensorrt_llm_bls", "vllm-4")]
            for figure in ("ttft_ms", "tpot_ms", "end_to_end_ms")
        )
        assert table is fp8 or all(first[streams] < theirs[streams] for streams in theirs)
        assert all(abs(end[streams] / their_end[streams] - 1) < 0.01 for streams in their_end)
        most = max(most, *(tpot[streams] / their_tpot[streams] - 1 for streams in their_tpot))
    assert f"TPOT p50 is up to {100 * most:.1f} % higher" in told
    for streams in ("64", "256", "512"):
        servers = [fp8[name][streams]["server_cores"] for name in ("tensorrt_llm_bls", "vllm-rust")]
        assert 1.7 < servers[0] / servers[1] < 2  # nearly twice


def test_the_fused_model_keeps_to_98_percent_of_the_raw_engine() -> None:
    """As the README says, at every point."""
    for precision in gpu_report.PRECISIONS:
        targets = gpu_report.read(precision)["targets"]
        for streams, raw in targets["raw"].items():
            fused = targets["tensorrt_llm_bls"][streams]["tokens_per_second"]
            assert fused >= 0.98 * raw["tokens_per_second"], f"{precision}, {streams} streams"


def test_where_a_first_token_goes_is_told_as_measured() -> None:
    told = " ".join((ROOT / "docs/decisions.md").read_text(encoding="utf-8").split())
    targets = gpu_report.read("fp8-side-by-side")["targets"]
    assert f"and on another host it is {share_of(targets, '64'):.1f} %" in told
    alone = {name: points["1"] for name, points in targets.items()}
    ours, rust, servers = (alone[name]["ttft_ms"]["p50"] for name in ("tensorrt_llm_bls", "vllm-rust", "vllm-4"))
    assert f"takes {ours:.1f} ms through `tensorrt_llm_bls`, {rust:.1f} through the Rust front end" in told
    assert f"{servers:.1f} with four API servers" in told
    parts = alone["tensorrt_llm_bls"]["first_token_ms"]
    assert f"{parts['in_engine']:.1f} of ours are the engine's" in told
    assert f"{parts['to_front'] + parts['to_client']:.1f} Triton's and the client's" in told
    assert f"{parts['to_engine']:.1f} tokenising and the way to the engine process" in told
    assert f"and takes {parts['to_engine']:.1f} since" in told
    assert f"takes {rust - parts['in_engine']:.1f} ms for all that is not the engine's" in told


def test_what_tokenising_takes_is_told_as_measured() -> None:
    told = " ".join((ROOT / "docs/decisions.md").read_text(encoding="utf-8").split())
    texts = json.loads((ROOT / "docs/benchmarks/tokenize.json").read_text())["texts"]

    def both(text: str, tokens: str, digits: int) -> str:
        point = texts[text]["lengths"][tokens]
        return "{:.{digits}f} instead of {:.{digits}f} ms for {:,} tokens".format(
            *(point[name]["p50_ms"] for name in ("fastokens", "tokenizers")),
            round(point["tokens"], -2 if text == "prose" else 0),
            digits=digits,
        )

    assert both("prose", "512", 2) in told
    assert both("prose", "8192", 1) in told
    assert both("made-up words", "512", 2) in told
    slow = texts["made-up words"]["lengths"]["512"]["tokenizers"]["p50_ms"]
    assert f"the last of four that come together waited for {4 * slow:.0f} ms there" in told
    load = texts["made-up words"]
    assert f"{load['load_seconds']:.0f} s with {load['entries']:,} entries on that core" in told
    assert f"and {load['load_mb']} MB in each process" in told


def test_what_a_slower_pace_gives_is_told_as_measured() -> None:
    told = " ".join((ROOT / "docs/decisions.md").read_text(encoding="utf-8").split())
    targets = gpu_report.read("eight-fronts/gpu-fp8-side-by-side")["targets"]
    slow, fast = (targets[f"tensorrt_llm_bls@{pace}"] for pace in (500, 2000))
    rates = [f"{its[count]['tokens_per_second']:,.0f}" for count in ("64", "256") for its in (slow, fast)]
    assert (
        "make {} tokens/s at 64 streams where eight of 2,000 make {}, and as much at 256 ({}, {})".format(*rates)
        in told
    )
    cores = slow["64"]["server_cores"], fast["64"]["server_cores"]
    assert "with {:.1f} cores instead of {:.1f}".format(*cores) in told


def test_the_tuning_on_the_h200_is_the_measured_one() -> None:
    folder = ROOT / "docs/benchmarks/tune-h200"
    told = (folder / "README.md").read_text(encoding="utf-8")
    running = " ".join(told.split())
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    few = json.loads((folder / "32-streams/trials.json").read_text())
    for trial in [*trials, *few["trials"]]:
        figures = trial["figures"]
        goodput = f"{figures['goodput']:.2f}" if figures["goodput"] else "0"
        cells = [goodput, f"{figures['tokens_per_second']:,.0f}", f"{figures['ttft_p95_ms']:,.0f}"]
        assert f"| {' | '.join(cells)} | {figures['tpot_p95_ms']:.1f} |" in told
    before, tuned = ([run["goodput"] for run in cell["runs"]] for cell in few["confirmation"]["results"])
    (gain,) = few["gains"]
    runs = [" and ".join(f"{goodput:.2f}" for goodput in its) for its in (before, tuned)]
    assert f"goodput {runs[0]} before, {runs[1]} tuned, {gain['ratio']:.2f} x." in running
    assert f"(95 %: {gain['from']:.2f} to {gain['to']:.2f})" in told
    assert f"at least {min(tuned) / max(before):.2f} x what any run of the start had" in running
    assert f"The whole took {few['minutes']:.1f} minutes" in told
    (effect,) = few["effects"]
    assert effect["key"] == "engine.ngram.draft_tokens"
    assert f"Without the n-grams the tuned deployment fell to {100 / effect['factor']:.0f} %" in told
    assert f"{gain['ratio']:.2f} x the goodput at 32 streams" in README
    assert f"(two runs of each; 95 %: {gain['from']:.2f} to {gain['to']:.2f})" in README
    seconds = sorted(trial["seconds"] for trial in trials)
    assert f"{seconds[0]:.0f} to {seconds[-1]:.0f} s each" in told
    assert "limits.max_num_tokens: 8192 -> 2048: brings less than 3 % (0.98 x)" in (folder / "tune.txt").read_text()


def test_the_figures_of_the_openai_door_are_the_measured_ones() -> None:
    told = (ROOT / "docs/openai.md").read_text(encoding="utf-8")
    median = json.loads((ROOT / "docs/benchmarks/openai.json").read_text())["256 streams"]["median"]
    assert f"door delivers {median['delivered_percent']:.0f} % of those 20,000 tokens/s to 256 streams" in README
    assert f"| delivered | {median['delivered_percent']:.0f} % |" in told
    assert f"| tokens in a chunk | {median['tokens_per_chunk']:.1f} |" in told
    assert f"{median['between_chunks_p50_ms']:.0f} ms, {median['between_chunks_p99_ms']:.0f} ms" in told
    cores = [f"{median[f'cores_{part}']:.2f}" for part in ("engine", "workers", "client")]
    assert ", ".join(cores) in told


def test_the_fields_of_the_openai_door_are_told() -> None:
    from roundhouse.openai import schema

    told = (ROOT / "docs/openai.md").read_text(encoding="utf-8")
    fields = {*schema.Completion.model_fields, *schema.Chat.model_fields} - {"model", "messages", "stream"}
    assert [name for name in sorted(fields) if f"`{name}`" not in told] == []


def test_the_gains_are_the_measured_ones() -> None:
    benchmarks = ROOT / "docs/benchmarks"
    gain = json.loads((benchmarks / "tune-embedded/trials.json").read_text())["gains"][-1]
    assert f"| {gain['start']:.1f} | {gain['tuned']:.1f} | {gain['ratio']:.1f} x |" in README
    pair = json.loads((benchmarks / "pair-embedded/report.json").read_text())["results"]
    for level in ("1 stream", "16 streams"):
        rates = [cell["median"]["output_tokens_per_second"] for cell in pair if cell["level"] == level]
        assert f"| {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[1] / rates[0]:.1f} x |" in README
