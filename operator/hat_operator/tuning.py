"""How devices draft tokens and send hidden states: the parts of a spec that only tune the runtime.

Apart from spec.py for its length.
"""

from __future__ import annotations

from dataclasses import dataclass

from hat_operator.fields import Fields
from hat_operator.sources import Source

FIXED_CHUNK = 128
"""Tokens of a chunk in mode fixed, where nothing is written."""
_MOST_GUESSES = {"hat": 6, "picospec": 4}


@dataclass(frozen=True)
class Speculation:
    """How devices draft; None leaves the choice to the runtime."""

    draft_model: Source | None
    """Of mode picospec; None is the one that comes with HAT for the default model."""
    drafter: str
    max_draft: int
    stop_threshold: float | None
    window: int | None
    branches: int
    alternatives: int | None
    sampler: str

    @classmethod
    def parse(cls, fields: Fields, mode: str) -> Speculation:
        """Read spec.speculation. Raises SpecError."""
        draft_model = fields.optional("draftModel")
        return cls(
            draft_model=None if draft_model is None else Source.parse(draft_model),
            drafter=fields.text("drafter"),
            max_draft=fields.number("maxDraft", _MOST_GUESSES.get(mode)),
            stop_threshold=fields.decimal("stopThreshold") if fields.has("stopThreshold") else None,
            window=fields.number("window") if fields.has("window") else None,
            branches=fields.number("branches"),
            alternatives=fields.number("alternatives") if fields.has("alternatives") else None,
            sampler=fields.text("sampler"),
        )


@dataclass(frozen=True)
class Chunking:
    """How devices cut prompts."""

    mode: str
    tokens: int
    """Of mode fixed."""
    least: int
    """Of the other modes, like `most`."""
    most: int

    @classmethod
    def parse(cls, fields: Fields) -> Chunking:
        """Read spec.chunking. Raises SpecError."""
        return cls(
            mode=fields.text("mode"),
            tokens=fields.number("tokens", FIXED_CHUNK),
            least=fields.number("minTokens"),
            most=fields.number("maxTokens"),
        )


@dataclass(frozen=True)
class Wire:
    """Codecs of hidden states on their way up, none is the runtime's raw; and padding."""

    uplink: str
    """Of prompts."""
    uplink_decode: str
    """Of all other states."""
    pad_frames: bool

    @classmethod
    def parse(cls, fields: Fields) -> Wire:
        """Read spec.wire. Raises SpecError."""
        return cls(
            uplink=fields.text("uplink"),
            uplink_decode=fields.text("uplinkDecode"),
            pad_frames=fields.flag("padFrames"),
        )
