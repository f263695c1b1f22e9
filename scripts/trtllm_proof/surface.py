"""What is installed, compared with what was recorded of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["missing", "changed", "new"]


@dataclass(frozen=True)
class Difference:
    """missing and changed: what we wrote our code by is not so. new: there is more than was recorded."""

    kind: Kind
    where: str
    recorded: str
    found: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def compare(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """`recorded`: version, executor (classes, enums), cli, as in tests/doubles. `found`: what installed.py prints."""
    differences = list(_differs("version", recorded["version"], found["version"]))
    for name, described in recorded["executor"]["classes"].items():
        actual = found["executor"]["classes"].get(name)
        if actual is None:
            differences.append(Difference("missing", name, "a class", "nothing"))
        else:
            differences += _class(name, described, actual)
    differences += _enums(recorded["executor"]["enums"], found["executor"]["enums"])
    for tool, arguments in recorded["cli"].items():
        differences += _arguments(tool, arguments, found["cli"].get(tool, []))
    return differences


def _differs(where: str, recorded: Any, found: Any) -> Iterator[Difference]:
    if recorded != found:
        yield Difference("changed", where, str(recorded), str(found))


def _class(name: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    yield from _overloads(name, recorded.get("constructors"), found["constructors"])
    for method, described in recorded.get("methods", {}).items():
        if method not in found["methods"]:
            yield Difference("missing", f"{name}.{method}", "a method", "nothing")
        elif "overloads" in described:
            yield from _overloads(f"{name}.{method}", described["overloads"], found["methods"][method])
    members = set(found["members"])
    for field in recorded.get("fields", {}):
        if field not in members:
            yield Difference("missing", f"{name}.{field}", "an attribute", "nothing")
    for absent in recorded.get("absent", ()):
        if absent in members:
            yield Difference("new", f"{name}.{absent}", "not there", "an attribute")


def _overloads(
    where: str, recorded: Sequence[Sequence[Mapping[str, Any]]] | None, found: Sequence[Any] | None
) -> Iterator[Difference]:
    """Each recorded overload is held to the one that it has most parameters in common with."""
    if recorded is None or found is None:  # nothing was recorded, or the function does not tell
        return
    for parameters in recorded:
        names = {parameter["name"] for parameter in parameters}
        closest = max(
            found,
            key=lambda candidate: 2 * len(names & {p["name"] for p in candidate}) - len(candidate),
            default=None,
        )
        if closest is None:
            yield Difference("missing", where, f"({', '.join(names)})", "nothing")
        else:
            yield from _parameters(where, parameters, closest)


def _parameters(
    where: str, recorded: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> Iterator[Difference]:
    actual = {parameter["name"]: parameter for parameter in found}
    for parameter in recorded:
        name = f"{where}({parameter['name']})"
        match = actual.get(parameter["name"])
        if match is None:
            yield Difference("missing", name, "a parameter", "nothing")
            continue
        for what in ("required", "kw_only"):
            yield from _differs(f"{name} {what}", bool(parameter.get(what)), bool(match.get(what)))
        if match["type"]:
            yield from _differs(f"{name} takes None", _optional(parameter["type"]), _optional(match["type"]))
        if _plain(parameter) and _plain(match):
            yield from _differs(f"{name} default", parameter["default"], match["default"])
    order = [
        parameter["name"] for parameter in recorded if parameter["name"] in actual and not parameter.get("kw_only")
    ]
    recorded_names = {parameter["name"] for parameter in recorded}
    found_order = [p["name"] for p in found if p["name"] in recorded_names and not p.get("kw_only")]
    if sorted(order) == sorted(found_order):
        yield from _differs(f"{where} order", ", ".join(order), ", ".join(found_order))
    for name in actual.keys() - recorded_names:
        yield Difference("new", f"{where}({name})", "not there", "a parameter")


def _optional(type_text: str) -> bool:
    return type_text == "object" or "None" in type_text or "Optional" in type_text


def _plain(parameter: Mapping[str, Any]) -> bool:
    """Has a default that can be compared: a bool, a number or None, not an object's description."""
    return "default" in parameter and isinstance(parameter["default"], bool | int | float | None)


def _enums(recorded: Mapping[str, Mapping[str, int]], found: Mapping[str, Mapping[str, int]]) -> Iterator[Difference]:
    for name, values in recorded.items():
        if name not in found:
            yield Difference("missing", name, "an enum", "nothing")
            continue
        for member, value in values.items():
            if member not in found[name]:
                yield Difference("missing", f"{name}.{member}", str(value), "nothing")
            else:
                yield from _differs(f"{name}.{member}", value, found[name][member])
        for member in found[name].keys() - values.keys():
            yield Difference("new", f"{name}.{member}", "not there", str(found[name][member]))


def _arguments(
    tool: str, recorded: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> Iterator[Difference]:
    actual = {argument["flag"]: argument for argument in found}
    for argument in recorded:
        name = f"{tool} {argument['flag']}"
        match = actual.get(argument["flag"])
        if match is None:
            yield Difference("missing", name, "an argument", "nothing")
            continue
        yield from _differs(f"{name} takes a value", argument["type"] != "flag", match.get("type") != "flag")
        if "choices" in argument and "choices" in match:
            yield from _choices(name, set(argument["choices"]), set(match["choices"]))
        if argument.get("default") is not None or match.get("default") is not None:
            yield from _differs(f"{name} default", _word(argument.get("default")), _word(match.get("default")))
    for flag in actual.keys() - {argument["flag"] for argument in recorded}:
        yield Difference("new", f"{tool} {flag}", "not there", "an argument")


def _word(default: Any) -> str:
    """`disable` and no value are the same to trtllm-build's plugins; True and False are words to it."""
    if default is None or default is False:
        return "disable"
    return "enable" if default is True else str(default)


def _choices(name: str, recorded: set[str], found: set[str]) -> Iterator[Difference]:
    for choice in sorted(recorded - found):
        yield Difference("missing", f"{name} {choice}", "a choice", "nothing")
    for choice in sorted(found - recorded):
        yield Difference("new", f"{name} {choice}", "not there", "a choice")
