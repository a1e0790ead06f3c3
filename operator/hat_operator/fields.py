"""Typed access to the fields of an object, with errors that name the field."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from hat_runtime.errors import UsageError


class SpecError(UsageError):
    """A field's value cannot be used."""

    def __init__(self, path: str, value: object, reason: str) -> None:
        super().__init__(f"{path}: {value!r}: {reason}")
        self.path = path
        self.value = value
        self.reason = reason


class Fields:
    """A mapping and where it lies. Every getter raises SpecError for a wrong type or, without default, for None."""

    def __init__(self, value: object, path: str) -> None:
        self.path = path
        self.value: Mapping[str, Any] = self._typed(value, Mapping, path, "an object")

    @staticmethod
    def _typed(value: object, kind: type | tuple[type, ...], path: str, words: str) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise SpecError(path or "object", value, f"must be {words}")
        return value

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.value.get(key) is not None

    def sub(self, key: str) -> Fields:
        """An object that must be there."""
        return Fields(self.value.get(key), self._at(key))

    def optional(self, key: str) -> Fields | None:
        """An object that may be absent."""
        return self.sub(key) if self.has(key) else None

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.value.get(key)
        value = default if value is None else value
        return str(self._typed(value, str, self._at(key), "a string"))

    def number(self, key: str, default: int | None = None) -> int:
        """An integer."""
        value = self.value.get(key)
        value = default if value is None else value
        return int(self._typed(value, int, self._at(key), "an integer"))

    def decimal(self, key: str) -> float:
        """A number that is not NaN or infinite."""
        value = self._typed(self.value.get(key), (int, float), self._at(key), "a number")
        if isinstance(value, bool) or not math.isfinite(value):
            raise SpecError(self._at(key), value, "must be a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """A boolean."""
        return bool(self._typed(self.value.get(key), bool, self._at(key), "true or false"))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A map; empty if absent."""
        value: Mapping[str, Any] = self._typed(self.value.get(key) or {}, Mapping, self._at(key), "an object")
        return value

    def labels(self, key: str) -> Mapping[str, str]:
        """A map of strings; empty if absent."""
        found = self.mapping(key)
        for name, value in found.items():
            self._typed(value, str, f"{self._at(key)}.{name}", "a string")
        return found

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty if absent."""
        found = self._typed(self.value.get(key) or [], (list, tuple), self._at(key), "a list")
        return [self._typed(item, str, f"{self._at(key)}[{i}]", "a string") for i, item in enumerate(found)]

    def items(self, key: str) -> Iterator[Fields]:
        """A list of objects; empty if absent."""
        found = self._typed(self.value.get(key) or [], (list, tuple), self._at(key), "a list")
        for index, item in enumerate(found):
            yield Fields(item, f"{self._at(key)}[{index}]")
