"""Checks custom resources as the API server does: the CRD's schema, strict and with defaults, and its CEL rules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cel
import jsonschema
import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "shared/crds"  # not part of the repository: other projects' files


def schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> schema, of the versions that are served. Skips where the files are not at hand."""
    if not FOLDER.is_dir():
        pytest.skip("the CRD files are missing; custom resources are not checked")
    found = {}
    for path in FOLDER.glob("*.yaml"):
        for document in yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader):
            if not document or document["kind"] != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                if version["served"]:
                    key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                    found[key] = version["schema"]["openAPIV3Schema"]
    return found


def problems(resource: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What the API server would refuse, a line each."""
    whole = copy.deepcopy(resource)
    _set_defaults(whole, schema)
    strict = _strict(schema)
    strict["properties"] = {**strict.get("properties", {}), "metadata": {"type": "object"}}
    validator = jsonschema.Draft202012Validator(strict)
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(whole)]
    return found or list(_broken_rules(whole, schema, ""))


def _strict(schema: Any) -> Any:
    """OpenAPI to JSON schema: unknown keys are refused, `nullable` and integer-or-string are spelled out."""
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "format"}
    for key in ("properties",):
        if key in made:
            made[key] = {name: _strict(value) for name, value in made[key].items()}
    for key in ("items", "additionalProperties", "not"):
        if key in made:
            made[key] = _strict(made[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in made:
            made[key] = [_fragment(part) for part in made[key]]
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["type"] = ["integer", "string"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if made.get("type") == "object" and "properties" in made and not open_ended:
        made["additionalProperties"] = False
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def _fragment(schema: Any) -> Any:
    """Part of an anyOf: it speaks of some keys and does not forbid the others."""
    return {key: value for key, value in schema.items() if not key.startswith("x-") and key != "format"}


def _set_defaults(value: Any, schema: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
            if name in value:
                _set_defaults(value[name], part)
    elif isinstance(value, list):
        for item in value:
            _set_defaults(item, schema.get("items", {}))


def _broken_rules(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name in value:
                yield from _broken_rules(value[name], part, f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _broken_rules(item, schema.get("items", {}), f"{path}[{index}]")
