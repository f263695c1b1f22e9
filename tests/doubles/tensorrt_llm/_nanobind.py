"""Classes that take and refuse arguments as nanobind's do, made from the surface's names, types and defaults.

nanobind converts little: None is only for Optional parameters, a bool is True or False, text is no path of tokens, an
unknown or missing argument fits no overload. All of these raise TypeError, before anything is stored.
"""

from __future__ import annotations

import datetime
import enum
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

Spec = Mapping[str, Any]
Check = Callable[[Any], bool]
INT32 = range(-(2**31), 2**31)
UINT64 = range(2**64)


class Overloads:
    """The overloads of one function: `bind` gives its arguments by name, defaults filled in, or raises TypeError."""

    def __init__(self, name: str, overloads: list[list[Spec]], library: Library) -> None:
        self._name = name
        self._overloads = overloads
        self._library = library

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        reasons = []
        for parameters in self._overloads:
            bound = self._fit(parameters, args, kwargs)
            if isinstance(bound, dict):
                return bound
            reasons.append(bound)
        supported = "\n".join(f"    {i}. {self._signature(p)}" for i, p in enumerate(self._overloads, start=1))
        types = ", ".join([*(type(a).__name__ for a in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())])
        raise TypeError(
            f"{self._name}(): incompatible function arguments. The following argument types are supported:\n{supported}"
            f"\n\nInvoked with types: {types}\n(stand-in: {'; '.join(reasons)})"
        )

    def _fit(self, parameters: list[Spec], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | str:
        positional = [p["name"] for p in parameters if not p.get("kw_only")]
        if len(args) > len(positional):
            return f"takes {len(positional)} positional arguments, {len(args)} were given"
        given = dict(zip(positional, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            return f"{', '.join(twice)} given twice"
        given |= kwargs
        if unknown := given.keys() - {p["name"] for p in parameters}:
            return f"unknown argument {', '.join(sorted(unknown))}"
        bound = {}
        for parameter in parameters:
            name = parameter["name"]
            if name in given:
                if not self._library.check(parameter["type"])(given[name]):
                    return f"{name} is {given[name]!r:.60}, not {parameter['type']}"
                bound[name] = given[name]
            elif parameter.get("required"):
                return f"{name} is missing"
            else:
                bound[name] = self._library.default(parameter)
        return bound

    def _signature(self, parameters: list[Spec]) -> str:
        return f"{self._name}({', '.join(p['name'] + ': ' + p['type'] for p in parameters)})"

    def nb_signature(self) -> tuple[tuple[Any, ...], ...]:
        """As nanobind's functions tell: text with \\0, \\1 ... for the defaults, no docstring, the defaults."""
        described = []
        for parameters in self._overloads:
            words, defaults = ["self"], []
            for parameter in sorted(parameters, key=lambda p: bool(p.get("kw_only"))):
                if parameter.get("kw_only") and "*" not in words:
                    words.append("*")
                word = f"{parameter['name']}: {parameter['type']}"
                if not parameter.get("required"):
                    word += f" = \\{len(defaults)}"
                    defaults.append(parameter.get("default_expr", parameter.get("default")))
                words.append(word)
            described.append((f"def {self._name}({', '.join(words)}) -> object", None, *defaults))
        return tuple(described)


class Library:
    """The classes and enums of one module, by name; nested ones have dots in theirs."""

    def __init__(self, classes: Mapping[str, Spec], enums: Mapping[str, Mapping[str, int]], module: str) -> None:
        self.members: dict[str, type] = {}
        self._checks: dict[str, Check] = {}
        for name, values in enums.items():
            self._add(name, enum.Enum(name.rpartition(".")[2], dict(values), module=module))
        for name, spec in classes.items():
            self._add(name, self._make(name, spec, module))
        for name, member in self.members.items():
            outer, _, inner = name.rpartition(".")
            if outer in self.members:
                setattr(self.members[outer], inner, member)

    def _add(self, name: str, member: type) -> None:
        self.members[name] = member

    def check(self, type_text: str) -> Check:
        """Whether a value would be taken for a parameter of this type."""
        if type_text not in self._checks:
            self._checks[type_text] = self._compile(type_text)
        return self._checks[type_text]

    def default(self, parameter: Spec) -> Any:
        expression = parameter.get("default_expr")
        if expression is None:
            default = parameter["default"]
            return dict(default) if isinstance(default, dict) else default
        if expression.endswith("()"):
            return self.members[expression.removesuffix("()")]()
        owner, _, member = expression.rpartition(".")
        return self.members[owner][member]  # type: ignore[index]

    def _compile(self, text: str) -> Check:
        if " | " in text:
            options = [self.check(option) for option in text.split(" | ")]
            return lambda value: any(option(value) for option in options)
        if found := re.fullmatch(r"list\[(.*)\]", text):
            inner = self.check(found[1])
            return lambda value: isinstance(value, list | tuple) and all(map(inner, value))
        if found := re.fullmatch(r"dict\[str, (.*)\]", text):
            inner = self.check(found[1])
            return lambda value: (
                isinstance(value, dict) and all(isinstance(k, str) and inner(v) for k, v in value.items())
            )
        if text in SCALARS:
            return SCALARS[text]
        member = next(m for name, m in self.members.items() if name == text or name.endswith(f".{text}"))
        return lambda value: isinstance(value, member)

    def _make(self, name: str, spec: Spec, module: str) -> type:
        """A class whose instances hold what the constructor was given, under the parameters' names."""
        library = self
        short = name.rpartition(".")[2]
        overloads = Overloads("__init__", spec.get("constructors", [[]]), self)
        renamed = {"type": "request_type"} if name == "Request" else {}
        hidden = {"priority"} if name == "Request" else set()
        parameters = [p for constructor in spec.get("constructors", []) for p in constructor]
        types = {renamed.get(p["name"], p["name"]): p["type"] for p in parameters} | dict(spec.get("fields", {}))
        read_only = bool(spec.get("read_only")) or name == "Executor"
        dynamic = bool(spec.get("dynamic_attr"))

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = overloads.bind(args, kwargs)
            self.__dict__["_arguments"] = bound
            for field in spec.get("fields", {}):
                self.__dict__[field] = _blank(types[field])
            for parameter, value in bound.items():
                if parameter not in hidden:
                    self.__dict__[renamed.get(parameter, parameter)] = value

        def set_attribute(self: Any, attribute: str, value: Any) -> None:
            if attribute in types and attribute not in hidden:
                if read_only or (name == "Request" and attribute in ("input_token_ids", "max_tokens")):
                    raise AttributeError(f"property '{attribute}' of '{short}' object has no setter")
                if not library.check(types[attribute])(value):
                    raise TypeError(f"{short}.{attribute}: {value!r:.60} is not {types[attribute]}")
            elif not dynamic:
                raise AttributeError(f"'{short}' object has no attribute '{attribute}'")
            self.__dict__[attribute] = value

        namespace: dict[str, Any] = {"__init__": init, "__setattr__": set_attribute, "__module__": module}
        namespace["__annotations__"] = types
        namespace |= spec.get("constants", {})
        for method, described in spec.get("methods", {}).items():
            if described.get("static") and "value" in described:
                namespace[method] = staticmethod(lambda value=described["value"]: value)
            else:
                namespace[method] = _not_imitated(f"{name}.{method}")
        if "constructors" in spec:
            init.__nb_signature__ = overloads.nb_signature()  # type: ignore[attr-defined]
        return type(short, (), namespace)


def _not_imitated(name: str) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}: the stand-in does not imitate it")

    return method


def _blank(type_text: str) -> Any:
    """What a field of a result is before it is set."""
    blanks: dict[str, Any] = {"bool": False, "int": 0, "uint64": 0, "float": 0.0, "str": ""}
    if type_text in blanks:
        return blanks[type_text]
    return [] if type_text.startswith("list[") else None


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


SCALARS: dict[str, Check] = {
    "None": lambda value: value is None,
    "int": lambda value: isinstance(value, int) and value in INT32,
    "uint64": lambda value: isinstance(value, int) and value in UINT64,
    "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "bool": lambda value: value is True or value is False,
    "str": lambda value: isinstance(value, str),
    "bytes": lambda value: isinstance(value, bytes),
    "object": lambda value: True,
    "Callable": callable,
    "pathlib.Path": lambda value: isinstance(value, str | os.PathLike),
    "datetime.timedelta": lambda value: isinstance(value, datetime.timedelta),
    "torch.Tensor": _is_tensor,
    "numpy.ndarray": lambda value: type(value).__module__ == "numpy",
}
