"""The deployment file: what is wrong is named by its key, and the shipped ones are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from roundhouse import deployment as deployments
from roundhouse.deployment import DeploymentError, TransformersEngine, VllmEngine

SHIPPED = sorted((Path(__file__).parents[1] / "deployments").glob("*.yaml"))
SMALL: dict[str, Any] = {"model": {"path": "m"}, "engine": {"kind": "transformers"}}


def parse(**changes: Any) -> deployments.Deployment:
    return deployments.parse({**SMALL, **changes}, source="x.yaml", base=Path("/base"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_deployments_are_right(path: Path) -> None:
    assert deployments.load(path)


def test_paths_start_at_the_file() -> None:
    parsed = parse()
    assert parsed.model.path == "/base/m"
    assert parsed.model.tokenizer == "/base/m"
    assert isinstance(parsed.engine, TransformersEngine)
    adapted = parse(engine={"kind": "vllm", "lora": {7: "adapters/a", 8: "/b"}})
    assert isinstance(adapted.engine, VllmEngine)
    assert adapted.engine.lora == {7: "/base/adapters/a", 8: "/b"}


def test_the_policy_is_the_engines_own_unless_the_file_says_one() -> None:
    assert parse().scheduling.policy == "guaranteed_no_evict"
    assert parse(engine={"kind": "vllm"}).scheduling.policy == "max_utilization"
    said = parse(engine={"kind": "vllm"}, scheduling={"chunked_prefill": False}).scheduling
    assert (said.policy, said.chunked_prefill) == ("max_utilization", False)


DRAFT = {"method": "draft_target", "draft_model": "d"}


def vllm(**keys: Any) -> dict[str, Any]:
    return {"engine": {"kind": "vllm", **keys}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"limit": {}}, "limit: unknown key; did you mean 'limits'?"),
        ({"limits": {"max_batch": 4}}, "limits.max_batch: unknown key; did you mean 'max_batch_size'?"),
        ({"limits": {"max_batch_size": 0}}, "limits.max_batch_size"),
        ({"limits": {"max_batch_size": "4"}}, "limits.max_batch_size"),
        ({"limits": {"max_batch_size": 64, "max_num_tokens": 32}}, "limits.max_num_tokens: 32 is less than"),
        ({"limits": {"max_seq_len": 4096}, "scheduling": {"chunked_prefill": False}}, "scheduling.chunked_prefill"),
        ({"engine": {"kind": "vlm"}}, "engine.kind: must be one of transformers, synthetic, tensorrt_llm, vllm"),
        ({"engine": {}}, "engine.kind: must be one of"),
        ({"engine": {"kind": "transformers", "thread": 2}}, "engine.thread: unknown key; did you mean 'threads'?"),
        ({"precision": {"weights": "fp8"}}, "precision.weights: engine transformers cannot do 'fp8'"),
        ({"kv_cache": {"tokens": 8}}, "kv_cache.tokens: 8 is less than one block"),
        (
            {"kv_cache": {"partial_reuse": True}},
            "kv_cache.partial_reuse: engine transformers cannot do this; remove the key, or choose engine tensorrt_llm",
        ),
        ({"gpu": {"product": "NVIDIA-H200"}}, "or choose engine tensorrt_llm or vllm"),
        ({"speculative": DRAFT}, "or choose engine tensorrt_llm or vllm"),
        ({"scheduling": {"policy": "max_utilization"}}, "or choose engine tensorrt_llm or vllm"),
        ({"serving": {"ensemble": "fast"}}, "serving.ensemble"),
        ({"slo": {"ttft_ms": 5}}, "slo.itl_ms: missing"),
        ({"gpu": {"product": "H200", "count": 2, "tensor_parallel": 1}}, "gpu.tensor_parallel: 1 is not gpu.count"),
        ({"engine": {"kind": "tensorrt_llm", "path": "e"}}, "gpu: missing"),
        (
            {**vllm(), "scheduling": {"policy": "guaranteed_no_evict"}},
            "scheduling.policy: vLLM admits what fits now",
        ),
        ({**vllm(), "scheduling": None}, "scheduling: "),
        (
            vllm(ngram={"draft_token": 3}),
            "engine.ngram.draft_token: unknown key; did you mean 'draft_tokens'? (allowed: draft_tokens, match_tokens)",
        ),
        (vllm(memory_fractions=0.9), "engine.memory_fractions: unknown key; did you mean 'memory_fraction'?"),
        (vllm(memory_fraction=1.5), "engine.memory_fraction"),
        (vllm(lora={0: "a"}), "engine.lora.0"),
        (vllm(fp8_kv_format="fp8_e5m2"), "engine.fp8_kv_format: fp8_e5m2 has no meaning without precision.kv_cache"),
        (
            {**vllm(fp8_kv_format="fp8_e5m2"), "precision": {"weights": "fp8", "kv_cache": "fp8"}},
            "engine.fp8_kv_format: vLLM takes fp8_e5m2 with weights in 16 bits",
        ),
        ({**vllm(), "precision": {"kv_cache": "float16"}}, "precision.kv_cache: 'float16' must be auto, fp8 or"),
        ({**vllm(), "kv_cache": {"free_memory_fraction": 0.9}}, "use engine.memory_fraction"),
        ({**vllm(), "kv_cache": {"host_memory_bytes": 1}}, "kv_cache.host_memory_bytes: engine vllm cannot do this"),
        ({**vllm(ngram={}), "speculative": DRAFT}, "engine.ngram: contradicts `speculative`"),
        ({**vllm(), "speculative": {**DRAFT, "draft_engine": "e"}}, "speculative.draft_engine: vLLM loads"),
        ({**vllm(), "speculative": {**DRAFT, "method": "medusa"}}, "speculative.method"),
        (
            {
                "engine": {"kind": "tensorrt_llm", "path": "e"},
                "gpu": {"product": "NVIDIA-H200"},
                "limits": {"max_seq_len": 2048},
                "speculative": {**DRAFT, "method": "eagle"},
            },
            "speculative.method: engine tensorrt_llm cannot do 'eagle'",
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DeploymentError) as caught:
        parse(**changes)
    assert says in str(caught.value)


def test_every_problem_has_its_line() -> None:
    with pytest.raises(DeploymentError) as caught:
        parse(limits={"queue": -1, "max_batch_size": 0}, nonsense=1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("x.yaml: ") for line in lines)


@pytest.mark.parametrize(("text", "says"), [("[1]", "must be a mapping"), ("a: [", "not valid YAML")])
def test_what_is_no_deployment_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    with pytest.raises(DeploymentError, match=says):
        deployments.load(path)
    with pytest.raises(DeploymentError, match="cannot be read"):
        deployments.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("limits: {queue: 1}\nengine:\n  kind: vllm\nlimits: {queue: 2}\n", "limits: is in line 1 and again in line 4"),
        ("limits:\n  queue: 1\n  queue: 2\n", "queue: is in line 2 and again in line 3"),
        ("limits: {queue: 1, queue: 2}", "queue: is in line 1 and again in line 1"),
        ("engine: {lora: {7: a, 7: b}}", "7: is in line 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    with pytest.raises(DeploymentError, match=says):
        deployments.load(path)


def test_a_merged_key_may_be_said_again(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "limits: {<<: {queue: 1, max_batch_size: 3}, queue: 2}\n")
    limits = deployments.load(path).limits
    assert (limits.queue, limits.max_batch_size) == (2, 3)


def test_what_check_prints_is_a_deployment_again() -> None:
    parsed = deployments.load(SHIPPED[0])
    again = yaml.safe_load(yaml.safe_dump(parsed.model_dump(exclude_none=True)))
    assert deployments.parse(again, source="x", base=Path("/")) == parsed
