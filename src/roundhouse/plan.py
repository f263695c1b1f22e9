"""What fits on the GPUs of a deployment: weights, KV cache, sequences. Arithmetic only, nothing is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from roundhouse import gpus
from roundhouse.deployment import Deployment, VllmEngine

# Activations and run-time buffers of one GPU, in bytes. An assumption, not a measurement: the true figure grows with
# max_num_tokens and with max_batch_size x max_seq_len.
WORKSPACE = int(3.5 * gpus.GIB)
DEFAULT_FRACTION = 0.9  # TensorRT-LLM's, of what is free after the weights
VLLM_FRACTION = 0.92  # vLLM's, of the whole memory
TENSOR_PARALLEL = (1, 2, 4, 8)
# INT4-AWQ keeps half a byte a weight and one 16-bit scale for each group of 128.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int4_awq": 0.5 + 2 / 128, "auto": 2.0}


class PlanError(Exception):
    """The deployment cannot be planned, or does not fit. The message names the key and the number that would."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool

    @classmethod
    def read(cls, model: Path, key: str = "model.path") -> Shape:
        """From a checkpoint's config.json. Raises PlanError, naming `key`, if it is not there or lacks a size."""
        try:
            config = json.loads((model / "config.json").read_text(encoding="utf-8"))
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                intermediate=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_size=config.get("head_dim") or hidden // heads,
                vocab=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except OSError as error:
            raise PlanError(
                f"{key}: {model}/config.json cannot be read ({error.strerror}); a plan needs that file alone, for "
                f"instance from: hf download OWNER/{model.name} config.json --local-dir {model}"
            ) from error
        except (ValueError, KeyError) as error:
            raise PlanError(f"{key}: {model}/config.json is not that of a Llama-like model: {error}") from error

    def weight_bytes(self, precision: str) -> int:
        """All weights. Embedding and output head stay in 16 bits when the layers are quantised."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        layers = self.layers * (attention + 3 * self.hidden * self.intermediate)
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return round(layers * BYTES[precision] + tables * max(2.0, BYTES[precision]))

    def kv_bytes_per_token(self, precision: str) -> int:
        return int(self.layers * self.kv_heads * self.head_size * 2 * BYTES[precision])


@dataclass(frozen=True)
class Plan:
    """Bytes are per GPU. `sequences` are those of max_seq_len tokens that the KV cache holds at the same time.

    draft_kv: bytes of the KV cache that a draft has for itself; where it shares the model's they are in
        `kv_bytes_per_token`.
    """

    product: str
    gpus: int
    memory: int
    weights: int
    draft_kv: int
    kv_bytes_per_token: int
    kv_tokens: int
    max_seq_len: int

    @property
    def sequences(self) -> int:
        return self.kv_tokens // self.max_seq_len

    def lines(self) -> list[str]:
        return [
            f"GPUs                  {self.gpus} x {self.product}, {self.memory / gpus.GIB:.1f} GiB each",
            f"weights per GPU       {self.weights / 1e9:.1f} GB",
            f"activations, buffers  {WORKSPACE / gpus.GIB:.1f} GiB (assumed)",
            *([f"draft's KV cache      {self.draft_kv / 1e9:.1f} GB per GPU"] if self.draft_kv else []),
            f"KV bytes per token    {self.kv_bytes_per_token / 1024:.0f} KiB per GPU",
            f"KV tokens             {self.kv_tokens:,}",
            f"sequences             {self.sequences:,} of {self.max_seq_len:,} tokens at the same time",
        ]


def plan(deployment: Deployment) -> Plan:
    """Raises PlanError if the deployment does not fit, with the number that would."""
    if deployment.gpu is None or deployment.limits.max_seq_len is None:
        missing = "gpu" if deployment.gpu is None else "limits.max_seq_len"
        raise PlanError(f"{missing}: missing; a plan needs it")
    try:
        product = gpus.find(deployment.gpu.product)
    except ValueError as error:
        raise PlanError(str(error)) from error
    shapes = [Shape.read(Path(deployment.model.path))]
    if deployment.speculative is not None:
        shapes.append(Shape.read(Path(deployment.speculative.draft_model), "speculative.draft_model"))
    result = _planned(deployment, shapes, deployment.gpu.tensor_parallel, product)
    _check_fits(deployment, shapes, result, product)
    return result


def _planned(deployment: Deployment, shapes: list[Shape], ranks: int, product: gpus.Product) -> Plan:
    engine, precision, cache = deployment.engine, deployment.precision, deployment.kv_cache
    max_seq_len = deployment.limits.max_seq_len or 1
    plain = "float32" if precision.weights == "float32" else "auto"
    kv_precision = plain if precision.kv_cache == "auto" else precision.kv_cache
    # vLLM quantises the model, not its draft
    precisions = [precision.weights, plain if isinstance(engine, VllmEngine) else precision.weights]
    weights = sum(s.weight_bytes(each) for s, each in zip(shapes, precisions, strict=False)) // ranks
    # a KV head is never split: more ranks than heads hold copies
    per_token, *draft = (s.kv_bytes_per_token(kv_precision) // min(ranks, s.kv_heads) for s in shapes)
    draft_kv = 0
    if isinstance(engine, VllmEngine):  # a draft's KV lies in the model's blocks
        per_token += sum(draft)
        free = product.memory * (engine.memory_fraction or VLLM_FRACTION) - weights - WORKSPACE
    else:
        if deployment.speculative is not None:  # a cache of its own, which is there before the model's
            draft_kv = sum(draft) * deployment.speculative.max_batch_size * max_seq_len
        free = (product.memory - weights - WORKSPACE - draft_kv) * (cache.free_memory_fraction or DEFAULT_FRACTION)
    fits = max(0, int(free / per_token))
    return Plan(
        product=deployment.gpu.product if deployment.gpu else "",
        gpus=ranks,
        memory=product.memory,
        weights=weights,
        draft_kv=draft_kv,
        kv_bytes_per_token=per_token,
        kv_tokens=fits if cache.tokens is None else min(fits, cache.tokens),
        max_seq_len=max_seq_len,
    )


def _check_fits(deployment: Deployment, shapes: list[Shape], result: Plan, product: gpus.Product) -> None:
    heads = shapes[0].heads
    if heads % result.gpus:
        raise PlanError(f"gpu.tensor_parallel: {result.gpus} does not divide the model's {heads} attention heads")
    wanted = deployment.kv_cache.tokens
    if wanted is not None and wanted > result.kv_tokens > 0:
        raise PlanError(f"kv_cache.tokens: {wanted:,} do not fit; {result.kv_tokens:,} would")
    if result.sequences >= 1:
        return
    if result.kv_tokens >= 1024:
        raise PlanError(f"limits.max_seq_len: {result.max_seq_len:,} tokens do not fit; {result.kv_tokens:,} would")
    ranks = (n for n in TENSOR_PARALLEL if n > result.gpus and heads % n == 0)
    enough = next((n for n in ranks if _planned(deployment, shapes, n, product).sequences >= 1), None)
    way_out = f"{enough} would do" if enough else "no number up to 8 would do; choose a larger gpu.product"
    share = deployment.engine.memory_fraction if isinstance(deployment.engine, VllmEngine) else None
    within = f" within engine.memory_fraction ({share})" if share is not None else ""
    draft = f", {result.draft_kv / 1e9:.1f} GB for speculative.max_batch_size" if result.draft_kv else ""
    raise PlanError(
        f"gpu.tensor_parallel: {result.gpus} x {result.product} cannot hold {result.weights / 1e9:.1f} GB of weights "
        f"per GPU{draft} and one sequence{within}; {way_out}"
    )
