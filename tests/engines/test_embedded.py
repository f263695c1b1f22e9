"""The embedded engine against transformers' own generate: the same model must give the same answers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from roundhouse.deployment import parse
from roundhouse.engine.base import EngineError
from roundhouse.engine.embedded import kernels, runner
from roundhouse.engine.embedded.engine import EmbeddedConfig, EmbeddedEngine
from roundhouse.engine.load import load_engine
from tests.engines.conftest import build_model, prompt, request, run, run_one

ARCHITECTURES = {
    "llama": {},
    "llama-mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-rope-scaled": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
}  # fmt: skip
OTHERS = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "gemma2": transformers.Gemma2Config,
    "phi3": transformers.Phi3Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi": transformers.PhiConfig,
    "granite": transformers.GraniteConfig,
    "olmo2": transformers.Olmo2Config,
}
TINY = Path(__file__).parents[2] / "models" / "tiny"
WINDOWED = {"mistral", "gemma2", "gemma3_text", "phi3"}


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *OTHERS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ARCHITECTURES:
        return build_model(folder, **ARCHITECTURES[request.param])
    return build_other(folder, OTHERS[request.param])


def build_other(folder: Path, kind: type[transformers.PretrainedConfig], **changes: object) -> Path:
    torch.manual_seed(1)
    settings = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind.model_type in WINDOWED:
        settings["sliding_window"] = 24
    transformers.AutoModelForCausalLM.from_config(kind(**settings, **changes)).save_pretrained(folder)
    return folder


def reference(model: Path, tokens: tuple[int, ...], count: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens of transformers' generate, and the raw logits that each was chosen from."""
    transformers.utils.logging.disable_progress_bar()
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    result = plain.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[0, len(tokens) :].tolist(), torch.cat(result.logits).double().log_softmax(-1).numpy()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "generic"])
def test_greedy_answers_and_log_probs_are_those_of_generate(model: Path, fused: bool) -> None:
    engine = EmbeddedEngine(EmbeddedConfig(model=model, max_batch_size=4, max_num_tokens=50, fused=fused))
    requests = [
        request(i, prompt=prompt(i, length), max_tokens=40, log_probs=True, top_log_probs=3)
        for i, length in enumerate((1, 31, 90))
    ]
    answers = run(engine, *requests)
    for each in requests:
        tokens, log_probs = reference(model, each.prompt, 40)
        top2 = np.sort(log_probs, axis=1)[:, -2:]
        margins = top2[:, 1] - top2[:, 0]
        same = next((i for i in range(40) if answers[each.id].tokens[i] != tokens[i]), 40)
        assert same == 40 or margins[same] < 1e-3, f"differs at {same} with margin {margins[same]}"
        assert np.allclose(answers[each.id].log_probs[:same], log_probs[np.arange(same), tokens[:same]], atol=2e-3)
        tops = [top for output in answers[each.id].outputs for top in output.top_log_probs or ()]
        for row, top in zip(log_probs[:same], tops, strict=False):
            assert np.allclose([value for _, value in top], np.sort(row)[:-4:-1], atol=2e-3)
            assert np.allclose([value for _, value in top], row[[token for token, _ in top]], atol=2e-3)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "generic"])
@pytest.mark.parametrize("max_num_tokens", [8, 33, 1000])
def test_chunked_prefill_changes_nothing(random_model: Path, max_num_tokens: int, fused: bool) -> None:
    settings = {"model": random_model, "max_batch_size": 8, "fused": fused}
    requests = [request(i, prompt=prompt(i, 150), max_tokens=30, log_probs=True) for i in range(6)]
    whole = EmbeddedEngine(EmbeddedConfig(**settings))
    chunked = EmbeddedEngine(EmbeddedConfig(**settings, max_num_tokens=max_num_tokens))
    expected, answers = run(whole, *requests), run(chunked, *requests)
    for i in expected:
        assert answers[i].tokens == expected[i].tokens
        assert np.allclose(answers[i].log_probs, expected[i].log_probs, atol=1e-4)


def test_without_chunked_prefill(random_model: Path) -> None:
    from roundhouse.engine.base import RequestError

    engine = EmbeddedEngine(
        EmbeddedConfig(model=random_model, max_batch_size=4, max_num_tokens=100, chunked_prefill=False)
    )
    with pytest.raises(RequestError, match="prompt: 101 tokens exceed max_num_tokens 100"):
        engine.submit(request(1, prompt=prompt(1, 101)))
    answers = run(engine, *(request(i, prompt=prompt(i, 60)) for i in range(6)))
    assert all(len(answer.tokens) == 8 for answer in answers.values())


def products_keep_their_order() -> bool:
    """Whether the matrix library sums in one order for any number of rows from 2 up. On AMD processors MKL does not."""
    torch.manual_seed(0)
    weights, rows = torch.randn(64, 128), torch.randn(300, 64)
    whole = torch.mm(rows, weights)
    return all(torch.equal(torch.mm(rows[:count], weights), whole[:count]) for count in range(2, 300))


def test_bit_for_bit_the_same_in_any_batch(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log probabilities show what equal tokens would hide: not one bit depends on the batch, chunks or reuse.

    As far as the matrix library keeps its order; where it does not, the last digits of 32 bits may differ.
    """
    tolerance = {"abs": 0.0, "rel": 0.0} if products_keep_their_order() else {"abs": 1e-4}
    settings = {"model": random_model, "max_batch_size": 16}
    requests = [request(i, prompt=prompt(i, 3 + 11 * i), max_tokens=25, log_probs=True) for i in range(16)]
    alone = EmbeddedEngine(EmbeddedConfig(**settings, reuse=False))
    expected = {each.id: run_one(alone, each).log_probs for each in requests}
    for changes in ({}, {"max_num_tokens": 17}, {"max_num_tokens": 101, "max_batch_size": 5}, {"threads": 1}):
        monkeypatch.setattr(kernels, "PARALLEL_FROM", 64 * 20)  # of 64 numbers each: some steps are large, some small
        engine = EmbeddedEngine(EmbeddedConfig(**{**settings, **changes}))
        monkeypatch.setattr(runner, "ALONE", 10 * engine._runner._weights)  # the same of threads
        for _ in range(2):  # the second time with reused blocks
            answers = run(engine, *requests)
            for i, log_probs in expected.items():
                assert answers[i].log_probs == pytest.approx(log_probs, **tolerance)


def test_small_steps_leave_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    deployment = {"model": {"path": str(TINY)}, "engine": {"kind": "transformers", "threads": 2}}
    engine = load_engine(parse({**deployment, "limits": {"max_seq_len": 512}}, source="test", base=TINY))
    assert os.environ["GOMP_SPINCOUNT"] == "1000"

    def threads(streams: int) -> tuple[int, int]:
        """Of a step with their prompts, and of the next one."""
        for index in range(streams):
            engine.submit(request(index, prompt=prompt(index, 20)))
        engine.step()
        first = torch.get_num_threads()
        engine.step()
        second = torch.get_num_threads()
        while engine.unfinished():
            engine.step()
        return first, second

    assert threads(1) == (2, 1)
    assert threads(16) == (2, 2)


def test_bfloat16_weights_and_pool(random_model: Path) -> None:
    exact = run_one(EmbeddedEngine(EmbeddedConfig(model=random_model)), request(1, log_probs=True))
    for settings in ({"kv_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        engine = EmbeddedEngine(EmbeddedConfig(model=random_model, **settings))
        answer = run_one(engine, request(1, log_probs=True))
        assert answer.log_probs[0] == pytest.approx(exact.log_probs[0], abs=0.5)
        assert answer.log_probs != exact.log_probs


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"model\.path: .* has no config\.json"):
        EmbeddedEngine(EmbeddedConfig(model=tmp_path))


def test_no_weights_there(tmp_path: Path, random_model: Path) -> None:
    (tmp_path / "config.json").write_text((random_model / "config.json").read_text())
    with pytest.raises(EngineError, match=r"model\.path: .* cannot be loaded"):
        EmbeddedEngine(EmbeddedConfig(model=tmp_path))


def test_max_seq_len_beyond_the_model(random_model: Path) -> None:
    with pytest.raises(EngineError, match=r"limits\.max_seq_len: 513 exceeds the model's 512"):
        EmbeddedEngine(EmbeddedConfig(model=random_model, max_seq_len=513))


def rope(kind: str) -> dict[str, object]:
    """For heads of 16; `longrope` with 64 original tokens."""
    longrope = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0, **(longrope if kind == "longrope" else {})}


@pytest.mark.parametrize("kind", ["flat", "by layer type"])
def test_longrope_is_served_up_to_its_original_length(tmp_path: Path, kind: str) -> None:
    """Beyond, transformers takes other frequencies for a whole step: a long request changed its neighbours' answers."""
    if kind == "flat":
        build_model(tmp_path, head_dim=16, rope_parameters=rope("longrope"))
    else:
        default = {"rope_type": "default", "rope_theta": 10000.0}
        by_type = {"sliding_attention": default, "full_attention": rope("longrope")}
        build_other(
            tmp_path,
            transformers.Gemma3TextConfig,
            rope_parameters=by_type,
            layer_types=["sliding_attention", "full_attention"],
        )
    for length in (None, 65):
        with pytest.raises(EngineError, match=rf"limits\.max_seq_len: {length or 512} exceeds 64, .* set 64 or less"):
            EmbeddedEngine(EmbeddedConfig(model=tmp_path, max_seq_len=length))
    engine = EmbeddedEngine(EmbeddedConfig(model=tmp_path, max_seq_len=64))
    one = request(1, prompt=prompt(1, 30), max_tokens=30)
    assert run_one(engine, one).tokens == reference(tmp_path, one.prompt, 30)[0]


def test_dynamic_rope_is_served_up_to_where_it_changes(tmp_path: Path) -> None:
    build_model(tmp_path, head_dim=16, rope_parameters=rope("dynamic"))
    with pytest.raises(EngineError, match=r"limits\.max_seq_len: 513 exceeds the model's 512"):
        EmbeddedEngine(EmbeddedConfig(model=tmp_path, max_seq_len=513))
    engine = EmbeddedEngine(EmbeddedConfig(model=tmp_path, reuse=False))
    long, short = request(1, prompt=prompt(1, 482), max_tokens=30), request(2, max_tokens=30)
    alone = {each.id: run_one(engine, each).tokens for each in (short, long)}
    assert {i: answer.tokens for i, answer in run(engine, long, short).items()} == alone


@pytest.mark.parametrize("changes", [{"model_type": "own"}, {}], ids=["its own code", "code that transformers has"])
def test_no_code_of_a_model_folder_is_run(tmp_path: Path, random_model: Path, changes: dict[str, str]) -> None:
    shutil.copytree(random_model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": own, **changes}))
    raw = {"model": {"path": str(tmp_path), "trust_remote_code": True}, "engine": {"kind": "transformers"}}
    deployment = parse(raw, source="test", base=tmp_path)
    if not changes:
        assert len(run_one(load_engine(deployment), request(1)).tokens) == 8
        return
    with pytest.raises(EngineError, match=r"^model\.trust_remote_code: the embedded engine .* use engine\.kind: vllm$"):
        load_engine(deployment)


SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
REFUSED = {
    "no attention": (transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1), "mamba"),
    "linear attention": (transformers.Qwen3NextConfig(**SMALL, layer_types=["linear_attention"]), "linear_attention"),
    "sinks": (transformers.GptOssConfig(**SMALL, num_key_value_heads=2, num_local_experts=2), "attention sinks"),
    "kwargs": (transformers.StableLmConfig(**SMALL, num_key_value_heads=2), "do not pass arguments"),
    "heads": (transformers.GPTNeoXConfig(**SMALL, num_key_value_heads=2), r"heads \(4, 16\)"),
    "positions": (transformers.BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4), "max_position"),
    "own attention": (
        transformers.BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4, max_position_embeddings=64),
        "bloom",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")  # some of these warn while they are built
def test_models_that_cannot_be_run_are_refused_at_load(tmp_path: Path, case: str) -> None:
    config, reason = REFUSED[case]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=rf"model\.path: .*{reason}"):
        EmbeddedEngine(EmbeddedConfig(model=tmp_path))


def test_fewer_tokens_a_step_than_slots(random_model: Path) -> None:
    with pytest.raises(EngineError, match=r"limits\.max_num_tokens: 4 is less than limits\.max_batch_size \(8\)"):
        EmbeddedEngine(EmbeddedConfig(model=random_model, max_batch_size=8, max_num_tokens=4))


@pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="models/tiny is not trained yet")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_shipped_model_answers_like_generate(dtype: str) -> None:
    """A trained model's choices are clear: exact in float32, and in bfloat16 at its first tokens."""
    vocab_size = transformers.AutoConfig.from_pretrained(TINY).vocab_size
    engine = EmbeddedEngine(EmbeddedConfig(model=TINY, dtype=dtype, max_seq_len=512))
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    texts = ["Sort: 5 3 9 1", "What is 12 + 30?", "Copy: hello world", "Count from 3 to 9"]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    assert all(token < vocab_size for ids in prompts for token in ids)
    answers = run(engine, *(request(i, prompt=ids, max_tokens=40) for i, ids in enumerate(prompts)))
    for i, ids in enumerate(prompts):
        tokens, _ = reference(TINY, ids, 40)
        same = 40 if dtype == "auto" else 1
        assert answers[i].tokens[:same] == tokens[:same]
