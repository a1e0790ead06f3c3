"""The errors whose text is meant for the person who runs HAT."""

from __future__ import annotations

MOST_SHOWN = 80
"""Characters of a wrong value that an error echoes."""


class HatError(Exception):
    """What went wrong and what to do about it, in words for the user.

    The `hat` command prints the text of a HatError without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(HatError):
    """A value that the user gave is wrong; the text names the option or field and echoes the value."""

    exit_code = 2


class FieldError(UsageError):
    """A field of a document cannot be used: which one, its value, and what it must be."""

    def __init__(self, path: str, value: object, reason: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= MOST_SHOWN else f"{shown[: MOST_SHOWN - 3]}..."
        super().__init__(f"{path}: {shown}: {reason}")
        self.path = path
        self.value = value
        self.shown = shown
        self.reason = reason


class ModelError(HatError):
    """A model folder, file or architecture cannot be used."""


class CloudUnavailable(HatError):
    """The cloud cannot be reached, went away or is overloaded; `retry_after_s` where it said when to try again."""

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class CloudOverloaded(CloudUnavailable):
    """The cloud is reachable, but has no room for this work now."""


class HandshakeError(HatError):
    """Device and cloud do not hold the same model, split, dtype or codec."""
