"""Prints, as JSON, the surface of the TensorRT-LLM that this interpreter has. Standard library only.

    python installed.py [TOOL=PATH ...]      # such as trtllm-build=/usr/local/bin/trtllm-build

Classes and enums of `tensorrt_llm.bindings.executor` are read from nanobind's `__nb_signature__`; the arguments of a
tool from its own argparse parser, caught as it is about to parse.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import json
import runpy
import sys
import types
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

MODULE = "tensorrt_llm.bindings.executor"


def split(text: str, separator: str = ",") -> list[str]:
    """At the separators that are in no bracket and no quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{<":
            depth += 1
        elif char in ")]}" or (char == ">" and text[i - 1] != "-"):
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def parameters(signature: str, defaults: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    r"""Of `def f(self, a: int, *, b: bool = \0) -> None`, where \0 stands for the first of `defaults`."""
    inside = signature[signature.index("(") + 1 :]
    depth = 1
    for i, char in enumerate(inside):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            inside = inside[:i]
            break
    found: list[dict[str, Any]] = []
    kw_only = False
    for part in split(inside):
        if part in ("self", "/", "cls"):
            continue
        if part == "*":
            kw_only = True
            continue
        left, *default = split(part, "=")
        name, _, kind = left.partition(":")
        parameter: dict[str, Any] = {"name": name.strip().lstrip("*"), "type": kind.strip()}
        if kw_only:
            parameter["kw_only"] = True
        if not default:
            parameter["required"] = True
        else:
            parameter["default"] = _default(default[0], defaults)
        found.append(parameter)
    return found


def _default(text: str, defaults: tuple[Any, ...]) -> Any:
    """The value itself where JSON has its type, else its description."""
    index = text.removeprefix("\\")
    value = defaults[int(index)] if text[0] == "\\" and index.isdigit() and int(index) < len(defaults) else text
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def overloads(function: Any) -> list[list[dict[str, Any]]] | None:
    """The parameters of each overload; None if the function does not tell."""
    signatures = getattr(function, "__nb_signature__", None)
    if signatures is None:
        return None
    return [parameters(text, _defaults(rest)) for text, *rest in signatures]


def _defaults(rest: list[Any]) -> tuple[Any, ...]:
    """After text and docstring come the defaults, as a tuple or one by one."""
    return rest[1] if len(rest) == 2 and isinstance(rest[1], tuple) else tuple(rest[1:])


def describe_class(cls: type) -> dict[str, Any]:
    annotated = (name for base in cls.__mro__ for name in getattr(base, "__annotations__", ()))
    public = {*dir(cls), *annotated}
    names = sorted(name for name in public if not name.startswith("_"))
    methods = {name: overloads(getattr(cls, name)) for name in names if callable(getattr(cls, name, None))}
    for name in ("__enter__", "__exit__"):
        if hasattr(cls, name):
            methods[name] = None
    return {"constructors": overloads(cls.__dict__.get("__init__")), "members": names, "methods": methods}


def describe(module: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Classes and enums of a module or class, those inside of them with a dot in the name."""
    result: dict[str, dict[str, Any]] = {"classes": {}, "enums": {}}
    for name, member in vars(module).items():
        if not isinstance(member, type) or name.startswith("_"):
            continue
        values = enum_values(member)
        if values is not None:
            result["enums"][prefix + name] = values
            continue
        result["classes"][prefix + name] = describe_class(member)
        for part, found in describe(member, f"{prefix}{name}.").items():
            result[part] |= found
    return result


def enum_values(cls: type) -> dict[str, int] | None:
    """Of Python enums, which nanobind's are now, and of the older kind with `__members__`."""
    if issubclass(cls, enum.Enum):
        return {member.name: int(member.value) for member in cls}
    members = getattr(cls, "__members__", None)
    return {name: int(value) for name, value in members.items()} if isinstance(members, dict) else None


class Caught(BaseException):  # no `except Exception` of the tool's may catch it
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def arguments(path: str) -> list[dict[str, Any]]:
    """The arguments that a Python tool takes, from the parser that it makes."""

    def caught(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise Caught(self)

    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = caught  # type: ignore[method-assign]
    try:
        runpy.run_path(path, run_name="__main__")
    except Caught as found:
        return [describe_action(action) for action in found.parser._actions if action.dest != "help"]
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    raise SystemExit(f"{path}: parsed no arguments")


def describe_action(action: argparse.Action) -> dict[str, Any]:
    described: dict[str, Any] = {"flag": action.option_strings[0], "aliases": list(action.option_strings[1:])}
    if action.nargs == 0:
        return {**described, "type": "flag"}
    if action.choices is not None:
        described["choices"] = [str(choice) for choice in action.choices]
    if action.default is argparse.SUPPRESS or action.default is None:
        return described
    return {
        **described,
        "default": action.default if isinstance(action.default, bool | int | float) else str(action.default),
    }


def submodule(module: Any, name: str) -> Any:
    """An extension's submodule is an attribute; a package's must be imported. An empty one if there is none."""
    try:
        return getattr(module, name, None) or importlib.import_module(f"{module.__name__}.{name}")
    except ImportError:
        return types.SimpleNamespace()


def main() -> None:
    with redirect_stdout(sys.stderr):  # the library greets
        library = importlib.import_module("tensorrt_llm")
        executor = importlib.import_module(MODULE)
        surface = describe(executor)
        for part, inside in describe(submodule(executor, "kv_cache"), "kv_cache.").items():
            surface[part] |= inside
        tools = dict(tool.split("=", 1) for tool in sys.argv[1:])
        cli = {name: arguments(str(Path(path))) for name, path in tools.items()}
    found = {"version": library.__version__, "file": library.__file__, "executor": surface, "cli": cli}
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
