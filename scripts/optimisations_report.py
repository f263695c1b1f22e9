"""The page docs/benchmarks/optimisations.md, from what scripts/bench_optimisations.py measured."""

from __future__ import annotations

from typing import Any

NOT_MEASURED = "not measured: `.venv/bin/python scripts/bench_optimisations.py --only {}`"


def page(result: dict[str, Any], draft_tokens: int) -> str:
    """docs/benchmarks/optimisations.md: what each optimisation gave, and what is still to be measured."""
    of, settings = result["configurations"], result["settings"]
    rows = [
        ("continuous batching", "3-5 x", _told_batching(of)),
        ("FP8 KV cache", "half the memory", _told_crowd(of)),
        ("prefix caching", "", _told_prefix(of, settings)),
        ("chunked prefill", "", _told_stalls(of)),
        ("speculation, draft model", "1.5-2 x", _told_drafting(of)),
        ("speculation, n-grams", "", _told_ngram(of)),
        ("quality of an FP8 KV cache", "", _told_quality(of)),
    ]
    lines = [
        "# What each optimisation gives",
        "",
        "<!-- written by scripts/bench_optimisations.py from gpu-optimisations.json -->",
        "",
        f"vLLM {result['versions'].get('vllm')}, Llama-3-8B shape in bfloat16 with random weights, "
        f"{result['hardware']['gpu'].split(',')[0]}. The engine gets {result['memory_gib']['base']} GiB of the GPU, so "
        "that the",
        f"KV cache can be filled. Prompts of {settings['prompt']} tokens, answers of {settings['answer']}, "
        f"greedy, closed "
        "loop, no server.",
        "",
        "| optimisation | operators are told | measured |",
        "|---|---|---|",
        *(f"| {name} | {told} | {measured} |" for name, told, measured in rows),
    ]
    if "draft-model" in of:
        lines += ["", *_drafting_table(of, draft_tokens)]
    return "\n".join(lines) + "\n"


def _told_batching(of: dict[str, Any]) -> str:
    if "base" not in of:
        return NOT_MEASURED.format("base")
    points = of["base"]["batching"]
    alone = points["1"]["tokens_per_second"]
    parts = [f"{p['tokens_per_second']:,.0f} ({p['tokens_per_second'] / alone:.1f} x)" for p in points.values()]
    return f"tokens/s with {', '.join(points)} streams: {', '.join(parts)}"


def _told_crowd(of: dict[str, Any]) -> str:
    if not {"base", "fp8-kv"} <= of.keys():
        return NOT_MEASURED.format("fp8-kv")
    auto, small = of["base"]["crowd"], of["fp8-kv"]["crowd"]
    return (
        f"{small['kv_tokens']:,} tokens of cache instead of {auto['kv_tokens']:,} "
        f"({small['kv_tokens'] / auto['kv_tokens']:.2f} x), {small['streams_that_fit']} streams that fit instead of "
        f"{auto['streams_that_fit']}; {auto['streams']} streams get {small['tokens_per_second']:,.0f} tokens/s instead "
        f"of {auto['tokens_per_second']:,.0f}"
    )


def _told_prefix(of: dict[str, Any], settings: dict[str, Any]) -> str:
    if "base" not in of:
        return NOT_MEASURED.format("base")
    off, on = of["base"]["prefix"]["off"], of["base"]["prefix"]["on"]
    parts = [
        f"{n} stream{'s' * (n != '1')}: TTFT p50 {on[n]['ttft_ms']['p50']:.0f} ms instead of "
        f"{off[n]['ttft_ms']['p50']:.0f}, {on[n]['tokens_per_second']:,.0f} tokens/s instead of "
        f"{off[n]['tokens_per_second']:,.0f}"
        for n in off
    ]
    return f"{settings['prefix']:,} shared tokens, answers of {settings['prefix_answer']}; " + "; ".join(parts)


def _told_stalls(of: dict[str, Any]) -> str:
    if not {"base", "whole-prefill"} <= of.keys():
        return NOT_MEASURED.format("whole-prefill")
    on, off = of["base"]["stalls"], of["whole-prefill"]["stalls"]
    return (
        f"{on['running_streams']} streams while prompts of {on['long_prompt']:,} tokens arrive: ITL p99 "
        f"{on['itl_ms']['p99']:.0f} ms instead of {off['itl_ms']['p99']:.0f}; the long prompts' TTFT p50 "
        f"{on['long_ttft_ms']['p50']:.0f} ms instead of {off['long_ttft_ms']['p50']:.0f}"
    )


def _gains(of: dict[str, Any], points: dict[str, Any]) -> dict[str, float]:
    """Streams -> tokens/s over those without speculation."""
    alone = of["base"]["batching"]
    return {n: p["tokens_per_second"] / alone[n]["tokens_per_second"] for n, p in points.items() if n in alone}


def _told_drafting(of: dict[str, Any]) -> str:
    if not {"base", "draft-model"} <= of.keys():
        return NOT_MEASURED.format("draft-model")
    gains = {rate: _gains(of, points) for rate, points in of["draft-model"]["drafting"].items()}
    best = max(gain for each in gains.values() for gain in each.values())
    paying = sorted({int(n) for each in gains.values() for n, gain in each.items() if gain > 1})
    when = f"it pays up to {paying[-1]} streams" if paying else "it pays nowhere here"
    return f"at most {best:.2f} x, {when}: below"


def _told_ngram(of: dict[str, Any]) -> str:
    if not {"base", "ngram"} <= of.keys():
        return NOT_MEASURED.format("ngram")
    points = of["ngram"]["repeating"]
    gains = _gains(of, points)
    parts = [
        f"{n} stream{'s' * (n != '1')}: {gain:.2f} x ({points[n]['acceptance']:.0%} accepted)"
        for n, gain in gains.items()
    ]
    return "text that repeats; " + "; ".join(parts)


def _told_quality(of: dict[str, Any]) -> str:
    if "quality" not in of:
        return NOT_MEASURED.format("quality")
    q = of["quality"]
    lost = q["log_probs_not_finite"]
    return (
        f"models/tiny on {q['device']} answers {q['fp8']['exact_percent']} % exactly instead of "
        f"{q['auto']['exact_percent']} %; its log probs move by {q['log_prob_drift']['mean_absolute']} on average"
        + (f", and {lost} of {q['log_prob_tokens'] + lost:,} are lost: not numbers" if lost else "")
    )


def _drafting_table(of: dict[str, Any], draft_tokens: int) -> list[str]:
    """tokens/s by acceptance rate and streams, over those without speculation."""
    drafting = of["draft-model"]["drafting"]
    streams = list(next(iter(drafting.values())))
    lines = [
        f"A draft model of a Llama-3.2-1B shape, {draft_tokens} tokens a round, at acceptance rates that vLLM "
        f"makes up (of "
        "a token, given",
        "those before it). Tokens/s over those without speculation; tokens that a round gives; what it costs in plain "
        "steps:",
        "",
        "| acceptance | " + " | ".join(f"{n} stream{'s' * (n != '1')}" for n in streams) + " |",
        "|---|" + "---|" * len(streams),
    ]
    for rate, points in drafting.items():
        cells = []
        for n, gain in _gains(of, points).items():
            tokens = 1 + draft_tokens * points[n]["acceptance"]
            cells.append(f"{gain:.2f} x; {tokens:.1f}; {tokens / gain:.1f}")
        lines.append(f"| {rate} | " + " | ".join(cells) + " |")
    if "profile" in of["draft-model"]:
        profile = of["draft-model"]["profile"]
        lines += [
            "",
            f"Why it pays nowhere: {profile['draft_model_percent']} % of a round (py-spy, {profile['samples']} samples "
            "of the engine's thread) is",
            "the draft model's forward passes, which vLLM 0.25.1 calls from Python piece by piece, outside of the CUDA "
            "graph in",
            "which it replays the target's.",
        ]
    return lines
