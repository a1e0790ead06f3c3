"""The CRD's schema applied without an API server: defaults, and what is wrong with an object."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hat_operator.rules import RULES
from hat_runtime.errors import HatError

CRD_FILE = "hat.dev_hatdeployments.yaml"
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_INT_OR_STRING = "x-kubernetes-int-or-string"
_RANGES = {"int32": 2**31, "int64": 2**63}

Schema = Mapping[str, Any]


def load_crd() -> dict[str, Any]:
    """The CustomResourceDefinition: the copy in the installed package, or that of the source tree.

    Raises:
        HatError: neither is there.
    """
    packaged = files("hat_operator") / CRD_FILE
    source = Path(__file__).resolve().parents[2] / "crds" / CRD_FILE
    found = next((place for place in (packaged, source) if place.is_file()), None)
    if found is None:
        raise HatError(f"{packaged}: not found; this installation of hat-platform lacks its CRD")
    crd: dict[str, Any] = yaml.safe_load(found.read_text(encoding="utf-8"))
    return crd


def load_schema() -> dict[str, Any]:
    """The OpenAPI schema of the version that is stored."""
    versions = load_crd()["spec"]["versions"]
    schema: dict[str, Any] = next(v for v in versions if v["storage"])["schema"]["openAPIV3Schema"]
    return schema


def apply_defaults(schema: Schema, value: Any) -> Any:
    """A copy with defaults as the API server fills them in: an explicit null counts as absent where there is one."""
    if isinstance(value, dict):
        found = {key: copy.deepcopy(item) for key, item in value.items()}
        for key, below in schema.get("properties", {}).items():
            if found.get(key) is None and "default" in below:
                found[key] = copy.deepcopy(below["default"])
            if key in found:
                found[key] = apply_defaults(below, found[key])
        return found
    if isinstance(value, list) and "items" in schema:
        return [apply_defaults(schema["items"], item) for item in value]
    return copy.deepcopy(value)


def problems(schema: Schema, value: Any) -> list[str]:
    """Everything that is wrong with a defaulted object, as "FIELD: VALUE: what must be".

    Types, enums, required and unknown fields, bounds, patterns, duplicate list keys and the CRD's rules; not the rules
    about changes, which need the object as it was.
    """
    return list(_problems(schema, value, ""))


def _problems(schema: Schema, value: Any, path: str) -> Iterator[str]:
    found = [*_own_problems(schema, value, path), *_problems_below(schema, value, path)]
    if not found:
        found += [
            _text(path, value, rule["message"])
            for rule in schema.get("x-kubernetes-validations", ())
            if rule["rule"] in RULES and not RULES[rule["rule"]](value)
        ]
    yield from found


def _own_problems(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if schema.get(_INT_OR_STRING):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield _text(path, value, "must be an integer or a string")
        elif isinstance(value, str):
            yield from _own_problems({**schema, "type": "string", _INT_OR_STRING: False}, value, path)
        else:
            yield from _own_problems({**schema, "type": "integer", _INT_OR_STRING: False}, value, path)
        return
    kind = schema.get("type", "object")
    if not _is_a(kind, value):
        hint = "; quote it" if kind == "string" and value is not None else ""
        yield _text(path, value, f"must be of type {kind}{hint}")
        return
    if "enum" in schema and value not in schema["enum"]:
        yield _text(path, value, f"must be one of {', '.join(map(str, schema['enum']))}")
    if "pattern" in schema and kind == "string" and not re.search(schema["pattern"], value):
        yield _text(path, value, f"must match {schema['pattern']}")
    if (
        kind == "integer"
        and not -_RANGES[schema.get("format", "int64")] <= value < _RANGES[schema.get("format", "int64")]
    ):
        yield _text(path, value, f"must fit into {schema.get('format', 'int64')}")
    for word, size, unit in (
        ("imum", value if kind in ("integer", "number") else None, ""),
        ("Length", len(value) if kind == "string" else None, " characters"),
        ("Items", len(value) if kind == "array" else None, " items"),
        ("Properties", len(value) if kind == "object" else None, " fields"),
    ):
        least, most = schema.get(f"min{word}"), schema.get(f"max{word}")
        if size is not None and least is not None and size < least:
            yield _text(path, value, f"must be at least {least}{unit}")
        if size is not None and most is not None and size > most:
            yield _text(path, value, f"must be at most {most}{unit}")
    if kind == "object":
        for key in schema.get("required", ()):
            if value.get(key) is None:
                yield _text(_at(path, key), None, "is required")


def _is_a(kind: str, value: Any) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _problems_below(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        known, others = schema.get("properties"), schema.get("additionalProperties")
        for key, item in value.items():
            if item is None and key in schema.get("required", ()):
                continue  # told already
            if known is not None and key in known:
                yield from _problems(known[key], item, _at(path, str(key)))
            elif others is not None:
                yield from _problems(others, item, _at(path, str(key)))
            elif known is not None:
                yield _text(_at(path, str(key)), item, f"unknown field; known: {', '.join(sorted(known))}")
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from _problems(schema["items"], item, f"{path}[{index}]")
        yield from _duplicates(schema, value, path)


def _duplicates(schema: Schema, value: list[Any], path: str) -> Iterator[str]:
    keys = schema.get("x-kubernetes-list-map-keys", ())
    seen: set[tuple[Any, ...]] = set()
    for index, item in enumerate(value):
        if not keys or not isinstance(item, dict):
            return
        identity = tuple(str(item.get(key)) for key in keys)
        if identity in seen:
            yield _text(f"{path}[{index}]", item, f"{' and '.join(keys)} must be unique in the list")
        seen.add(identity)


def _at(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _text(path: str, value: Any, reason: str) -> str:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
    return f"{path or 'object'}: {shown}: {reason}"
