"""The bodies that clients send: OpenAI's fields, and the extensions that vLLM made common.

Types are strict and unknown fields are refused, as OpenAI does. Fields that change nothing here (`user`, `metadata`,
...) are taken and ignored, as OpenAI documents them to have no effect on the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

MAX_SEQUENCES = 128
MAX_LOGPROBS = 5
MAX_TOP_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = Field(default=None, description="a last chunk with the usage of the whole answer")
    continuous_usage_stats: bool | None = Field(default=None, description="extension: usage so far in each chunk")
    include_obfuscation: bool | None = Field(default=None, description="taken and ignored")


class Generate(Body):
    """What the two ways to ask for an answer have in common."""

    model: str = Field(description="one of /v1/models")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = Field(default=None, description="samples of one prompt")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=None, description="default 1; 0 is greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, description="token id -> what is added to its logit"
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: str | None = Field(default=None, description="taken and ignored")

    # Extensions, spelled as vLLM spells them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(default=None, description="0 and -1: all tokens")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = Field(default=None, description="generate on after the model's end ids")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        default=None, description="lower is sooner, as in vLLM; default 0"
    )
    cache_salt: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        default=None, description="prompts share cached KV blocks only with prompts of an equal salt"
    )


def _form(prompt: Any) -> str:
    """Which of its four forms a prompt has: a union of lists would try each element as each type."""
    if not isinstance(prompt, list):
        return "a text"
    of = type(prompt[0]) if prompt else str
    return {int: "token ids", list: "lists of token ids"}.get(of, "a list of texts")


Prompt = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[list[str], Tag("a list of texts")]
    | Annotated[list[TokenId], Tag("token ids")]
    | Annotated[list[list[TokenId]], Tag("lists of token ids")],
    Discriminator(_form),
]


class Completion(Generate):
    """/v1/completions"""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = Field(default=None, description="refused: the models do not fill in")
    best_of: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = Field(default=None, description="must equal n")
    add_special_tokens: bool | None = Field(default=None, description="extension: BOS before a text; default true")


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    # What OpenAI's SDK writes into the answers that it has got. Taken while there is nothing in them, and ignored.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Chat(Generate):
    """/v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="extension: for the chat template")

    # Taken and ignored.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class Tokenize(Body):
    """/tokenize: a text, or a chat as its template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(default=None, description="default: for a prompt yes, for a chat no")
    chat_template_kwargs: dict[str, Any] | None = None


class Detokenize(Body):
    """/detokenize"""

    model: str | None = None
    tokens: list[TokenId]


class ErrorDetail(Body):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Body):
    """What is sent with every status of 400 and more."""

    error: ErrorDetail
