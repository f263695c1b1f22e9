"""The deployment file: one YAML file says what is deployed.

Everything else is derived from it: the model repository, the engine's settings, the manifests, the load test's limits.
The schema is strict. Whatever is wrong is reported with the path of its key and what is allowed there.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails


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


EngineSection = Annotated[TransformersEngine | SyntheticEngine, Field(discriminator="kind")]


class Precision(Section):
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    kv_cache: Literal["auto", "float32", "bfloat16"] = "auto"


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


class Scheduling(Section):
    chunked_prefill: bool = Field(default=True, description="split long prompts over steps")


class Fronts(Section):
    """The Python models inside Triton. Each instance is a process of its own."""

    preprocessing: PositiveInt = 1
    tensorrt_llm: PositiveInt = 1
    tensorrt_llm_bls: PositiveInt = 1
    responses_per_second: PositiveInt = Field(
        default=4000, description="what one instance sends at most; beyond it, tokens travel together"
    )


class Serving(Section):
    """How clients see the models."""

    decoupled: bool = Field(default=True, description="false: unary `infer` clients, no streaming")
    ensemble: Literal["steps", "fused"] = Field(
        default="steps", description="what answers as `ensemble`: the three steps, or one fused model"
    )
    exclude_input_in_output: bool = Field(default=False, description="default of the request input of that name")


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
    slo: Slo | None = None

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
        return self


def load(path: Path | str) -> Deployment:
    """Read and check a deployment file. Its relative paths become absolute ones.

    Raises DeploymentError with one line per problem.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DeploymentError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise DeploymentError(f"{path}: must be a mapping with the keys {', '.join(Deployment.model_fields)}")
    return parse(raw, source=str(path), base=path.resolve().parent)


def parse(raw: dict[str, Any], *, source: str, base: Path) -> Deployment:
    """Check an already parsed deployment; `base` is the folder that its relative paths start at."""
    try:
        deployment = Deployment.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {_explain(detail)}" for detail in error.errors()]
        raise DeploymentError("\n".join(lines)) from None
    model = deployment.model
    absolute = model.model_copy(
        update={
            "path": str(base / model.path),
            "tokenizer": str(base / (model.tokenizer or model.path)),
        }
    )
    return deployment.model_copy(update={"model": absolute})


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


ENGINES: dict[str, type[Section]] = {"transformers": TransformersEngine, "synthetic": SyntheticEngine}


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed where `loc`'s last key was found."""
    if len(loc) == 1:
        return list(Deployment.model_fields)
    if loc[0] == "engine":
        return list(ENGINES[str(loc[1])].model_fields)
    section: Any = Deployment.model_fields[str(loc[0])].annotation
    options = get_args(section) or (section,)  # `Slo | None` has two
    return [name for option in options if issubclass(option, Section) for name in option.model_fields]
