"""How devices draft tokens and send hidden states: the parts of a spec that only tune the runtime.

Apart from spec.py for its length.
"""

from __future__ import annotations

from dataclasses import dataclass

from hat_operator.fields import Fields


@dataclass(frozen=True)
class Speculation:
    """How devices draft; None leaves the choice to the runtime."""

    drafter: str
    max_draft: int
    stop_threshold: float | None
    window: int | None
    branches: int
    sampler: str

    @classmethod
    def parse(cls, fields: Fields) -> Speculation:
        """Read spec.speculation. Raises SpecError."""
        return cls(
            drafter=fields.text("drafter"),
            max_draft=fields.number("maxDraft"),
            stop_threshold=fields.decimal("stopThreshold") if fields.has("stopThreshold") else None,
            window=fields.number("window") if fields.has("window") else None,
            branches=fields.number("branches"),
            sampler=fields.text("sampler"),
        )


@dataclass(frozen=True)
class Wire:
    """Codecs of hidden states on their way up; none is the runtime's raw."""

    uplink: str
    """Of prompts."""
    uplink_decode: str
    """Of all other states."""

    @classmethod
    def parse(cls, fields: Fields) -> Wire:
        """Read spec.wire. Raises SpecError."""
        return cls(uplink=fields.text("uplink"), uplink_decode=fields.text("uplinkDecode"))
