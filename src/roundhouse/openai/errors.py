"""Refusals in OpenAI's format, with the status codes that its clients know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import ErrorDetails
from starlette.responses import Response

from roundhouse.engine.protocol import Error, ErrorCode

RETRY_SECONDS = 1  # what Retry-After says: the queue moves, a draining server is replaced, a lost engine comes back
CLIENT_CLOSED = 499  # nginx's: the client went away; nobody but the log reads it


class ApiError(Exception):
    """A request is refused, or fails. `param`: the field at fault. `code`: OpenAI's word for it, if it has one."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self._type, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        headers = dict(headers or {})
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_SECONDS)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 413:
            headers["Connection"] = "close"  # what it still sends is not read
        content = json.dumps(self.body)  # in ASCII: what is quoted in it may be no valid Unicode
        return Response(content, self.status, headers, media_type="application/json")

    @property
    def _type(self) -> str:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def of_engine(error: Error) -> ApiError:
    """The engine's refusals begin with the name of the field; what is before the colon is the param."""
    match error.code:
        case ErrorCode.INVALID_ARGUMENT | ErrorCode.UNSUPPORTED:
            code = "unsupported_value" if error.code is ErrorCode.UNSUPPORTED else "invalid_value"
            return ApiError(400, error.message, param=_field(error.message), code=code)
        case ErrorCode.QUEUE_FULL:
            return ApiError(429, error.message, code="rate_limit_exceeded")
        case ErrorCode.UNAVAILABLE:
            return ApiError(503, error.message, code="service_unavailable")
        case ErrorCode.CANCELLED:
            return ApiError(CLIENT_CLOSED, error.message, code="cancelled")
        case ErrorCode.INTERNAL:
            return ApiError(500, error.message, code="internal_error")


def _field(message: str) -> str | None:
    name = message.partition(":")[0].partition(" ")[0]
    return name.replace("log_probs", "logprobs") if name.isidentifier() else None


def of_validation(errors: Iterable[ErrorDetails] | Iterable[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, in OpenAI's words."""
    error = next(iter(errors))
    location = [part for part in error["loc"] if part != "body"]
    param = str(location[0]) if location else None
    where = f"'{_path(location)}'"
    match error["type"]:
        case "json_invalid":
            return ApiError(400, "The body is not valid JSON: " + _reason(error), code="invalid_json")
        case "extra_forbidden":
            return ApiError(400, f"Unknown parameter: {where}.", param=_path(location), code="unknown_parameter")
        case "missing" if not location:
            return ApiError(400, "The body is missing: send a JSON object with Content-Type: application/json.")
        case "missing":
            message = f"Missing required parameter: {where}."
            return ApiError(400, message, param=_path(location), code="missing_required_parameter")
        case "value_error":
            return ApiError(400, str(error["ctx"]["error"]), param=param, code="invalid_value")
        case "none_required":
            message = f"{where} is not supported here: leave it out, or send null."
            return ApiError(400, message, param=param, code="unsupported_value")
        case _ if not location:
            return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
        case _:
            return ApiError(400, f"Invalid value for {where}: {error['msg']}.", param=param, code="invalid_value")


def _reason(error: ErrorDetails | Mapping[str, Any]) -> str:
    return str(error.get("ctx", {}).get("error", error["msg"]))


def _path(location: list[Any]) -> str:
    """`messages[0].content` of a pydantic location; the names that it gives to branches of a union are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part[0].islower() and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
    return path
