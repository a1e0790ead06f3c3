"""Where things come from: weights from a hub or a PersistentVolumeClaim, secrets from a key of a Secret."""

from __future__ import annotations

from dataclasses import dataclass

from hat_operator.fields import Fields, SpecError


@dataclass(frozen=True)
class SecretKey:
    """One key of a Secret."""

    name: str
    key: str

    @classmethod
    def parse(cls, fields: Fields) -> SecretKey:
        """Read a reference. Raises SpecError."""
        return cls(fields.text("name"), fields.text("key"))


@dataclass(frozen=True)
class Claim:
    """A folder inside a PersistentVolumeClaim."""

    name: str
    path: str

    @classmethod
    def parse(cls, fields: Fields) -> Claim:
        """Read a claim. Raises SpecError."""
        return cls(fields.text("name"), fields.text("path"))


@dataclass(frozen=True)
class Source:
    """Exactly one of hub and claim is set."""

    hub: str | None
    claim: Claim | None

    @classmethod
    def parse(cls, fields: Fields) -> Source:
        """Read a source. Raises SpecError."""
        hub, claim = fields.text("hub", ""), fields.optional("claim")
        if bool(hub) == (claim is not None):
            raise SpecError(fields.path, dict(fields.value), "write exactly one of hub and claim")
        return cls(hub or None, None if claim is None else Claim.parse(claim))
