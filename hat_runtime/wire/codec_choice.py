"""Which codec prompts and which all other rows travel in. Needs no torch: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass

from hat_runtime.errors import UsageError

RAW = "raw"
CODECS = (RAW, "bf16", "int8", "int4")
"""Names of all codecs, from lossless to smallest."""


@dataclass(frozen=True)
class CodecChoice:
    """Names of the uplink's codecs."""

    prompt: str = RAW
    """Of the rows of a prompt."""
    decode: str = RAW
    """Of all other rows."""

    @property
    def names(self) -> tuple[str, ...]:
        """The codecs that are used, each once."""
        return (self.prompt,) if self.prompt == self.decode else (self.prompt, self.decode)

    @classmethod
    def parse(cls, text: str, option: str) -> CodecChoice:
        """ "PROMPT" or "PROMPT,DECODE" -> the choice; decode is raw where it is not named.

        Raises:
            UsageError: names `option`, echoes the value and lists the codecs.
        """
        names = text.split(",")
        if not 1 <= len(names) <= 2:
            raise UsageError(
                f"{option} {text!r}: write PROMPT or PROMPT,DECODE, each one of {', '.join(CODECS)}"
            )
        for name in names:
            if name not in CODECS:
                raise UsageError(f"{option} {text!r}: codec {name!r} is none of {', '.join(CODECS)}")
        return cls(*names)


RAW_ONLY = CodecChoice()
"""Lossless throughout."""
