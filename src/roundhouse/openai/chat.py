"""Chats: messages as a chat template wants them, and guides for JSON answers and for calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from roundhouse.engine.protocol import EngineInfo, Feature, Guide
from roundhouse.openai.errors import ApiError
from roundhouse.openai.schema import Chat, Message, NamedTool, Tool
from roundhouse.text.tokenizer import Tokenizer

# Names that mean something to the renderer, and that a client therefore cannot give to a template.
RESERVED = ("conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt")
RESERVED_FLAGS = ("return_assistant_tokens_mask", "continue_final_message")
TEMPLATE_REFUSES = 422


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    model: str,
    *,
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt's text. Raises ApiError: 404 without a template, as OpenAI for such models; 422 if it refuses."""
    if not tokenizer.has_chat_template:
        raise ApiError(
            404,
            f"The model '{model}' has no chat template, so it cannot be used with /v1/chat/completions. "
            "Send a finished prompt to /v1/completions.",
            param="model",
        )
    for name in variables or ():
        if name in RESERVED or name in RESERVED_FLAGS:
            raise ApiError(400, f"'chat_template_kwargs' cannot set '{name}'.", param="chat_template_kwargs")
    described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    try:
        return tokenizer.apply_chat_template([plain(message) for message in messages], described, **(variables or {}))
    except ValueError as error:
        raise ApiError(TEMPLATE_REFUSES, str(error), param="messages", code="template_refused") from None
    except Exception as error:  # whatever the expressions of a template raise on messages that it did not expect
        message = f"the model's chat template cannot render these messages: {error}"
        raise ApiError(TEMPLATE_REFUSES, message, param="messages", code="template_refused") from None


def warm_up(tokenizer: Tokenizer) -> None:
    """Load what rendering needs, so that the first chat does not wait for it: a second or two."""
    with suppress(ApiError):
        render([Message(role="user", content="")], tokenizer, "")


def plain(message: Message) -> dict[str, Any]:
    """A message for a template: text instead of parts, arguments of calls as objects, the older name of `developer`."""
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
    result = message.model_dump(exclude_none=True, exclude={"content", "tool_calls", "annotations"}) | {"content": text}
    if message.role == "developer":
        result["role"] = "system"
    if message.tool_calls:
        result["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for call in result["tool_calls"]:
            call["function"]["arguments"] = _object(call["function"]["arguments"])
    return result


def _object(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        message = "'messages': the arguments of a tool call are not valid JSON."
        raise ApiError(400, message, param="messages", code="invalid_value") from None


# --- guides -------------------------------------------------------------------------------------------


def guide(body: Chat, info: EngineInfo) -> Guide | None:
    """What guided decoding has to hold the answer to. Raises ApiError, also if the engine cannot do it."""
    calls = tools_to_call(body)
    form = body.response_format
    if calls:
        _need(info, "tools", "tools")
        return Guide("json_schema", json.dumps(call_schema(calls)))
    if form is None or form.type == "text":
        return None
    _need(info, "response_format", f"response_format' of type '{form.type}")
    if form.type == "json_object":
        return Guide("json")
    if form.json_schema is None:
        raise ApiError(
            400,
            "Missing required parameter: 'response_format.json_schema'.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    return Guide("json_schema", json.dumps(form.json_schema.json_schema or {}))


def tools_to_call(body: Chat) -> list[Tool]:
    """The tools of which the answer must call one; none if it is to be text. Raises ApiError."""
    tools, choice = body.tools or [], body.tool_choice
    if not tools and choice not in (None, "none"):
        raise ApiError(400, "'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise ApiError(
                400, f"Tool choice '{choice.function.name}' not found in 'tools' parameter.", param="tool_choice"
            )
        return named[:1]
    if choice == "none" or not tools:
        return []
    if choice == "required":
        return tools
    raise ApiError(
        400,
        "'tool_choice' of 'auto' is not supported: each model has its own format for calls that it may make or not. "
        "Send 'required', a named function, or 'none'.",
        param="tool_choice",
        code="unsupported_value",
    )


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """JSON schema of an answer that calls one of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def called(text: str) -> tuple[str, str] | None:
    """Name and arguments (JSON) of the call that a guided answer is; None if it was cut off before its end."""
    try:
        call = json.loads(text)
        return str(call["name"]), json.dumps(call["arguments"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _need(info: EngineInfo, param: str, what: str) -> None:
    if Feature.GUIDED_DECODING in info.lacks:
        reason = info.lacks[Feature.GUIDED_DECODING]
        message = f"Invalid parameter: '{what}' is not supported with this model: {reason}."
        raise ApiError(400, message, param=param, code="unsupported_parameter")
