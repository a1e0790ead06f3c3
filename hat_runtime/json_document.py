"""JSON documents that an operator writes and a cloud reads: what is too long, no JSON or out of range is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hat_runtime.errors import MOST_SHOWN, FieldError

MAX_BYTES = 1 << 20
"""Longest text; a ConfigMap holds no more either."""
MAX_VERSION = 2**53 - 1
"""What JSON's numbers hold exactly, whoever reads them."""


def read_object(text: bytes | str, name: str, error: type[FieldError]) -> Mapping[str, Any]:
    """The object that a whole text is; `name` stands for it in errors.

    Raises:
        FieldError: of type `error`: it is longer than MAX_BYTES, no JSON, or no object.
    """
    if len(text) > MAX_BYTES:
        raise error(name, f"{len(text)} bytes", f"must be at most {MAX_BYTES} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        begin = text[:MOST_SHOWN]
        shown = begin.decode(errors="replace") if isinstance(begin, bytes) else begin
        raise error(name, shown, f"must be JSON: {problem}") from None
    return as_object(content, name, error)


def as_object(value: object, path: str, error: type[FieldError]) -> Mapping[str, Any]:
    """The value, which must be an object.

    Raises:
        FieldError: of type `error`.
    """
    if not isinstance(value, dict):
        raise error(path, value, "must be an object")
    return value


def as_integer(value: object, path: str, least: int, most: int, error: type[FieldError]) -> int:
    """The value, which must be an integer from `least` to `most`.

    Raises:
        FieldError: of type `error`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise error(path, value, f"must be an integer from {least} to {most}")
    return value
