"""Documents that an operator puts into a running cloud, each with a version that only grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Document(Protocol):
    """What a store keeps."""

    @property
    def version(self) -> int:
        """0: nothing was put yet."""

    def to_json(self) -> str:
        """The text that its parser reads."""


D = TypeVar("D", bound=Document)


class OlderDocument(Exception):
    """It is not newer than the one in effect, and differs from it."""


class DocumentStore(Generic[D]):
    """The document in effect. For the event loop's thread."""

    def __init__(self, first: D, parse: Callable[[bytes], D], longest: int) -> None:
        """Begin with `first`; `parse` reads others, of at most `longest` bytes, and raises FieldError."""
        self.current = first
        self.longest = longest
        self._parse = parse

    def put(self, text: bytes) -> D:
        """Take a new document, which is in effect at once; the same one again changes nothing.

        Raises:
            FieldError: it is none; the one before stays.
            OlderDocument: its version is not higher than that of the one in effect.
        """
        new, now = self._parse(text), self.current
        if new == now:
            return now
        if new.version <= now.version:
            raise OlderDocument(
                f"version: {new.version!r}: must be more than {now.version}, which is in effect"
            )
        self.current = new
        self.changed(new)
        return new

    def changed(self, new: D) -> None:
        """Called when another document is in effect."""
