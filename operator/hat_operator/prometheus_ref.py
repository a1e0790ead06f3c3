"""Which Prometheus server the operator asks for figures: a part of spec.observability."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hat_operator.fields import Fields, SpecError
from hat_operator.sources import SecretKey

URL = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?")
"""As the CRD has it: a user or password, a query or a fragment is no part of it."""


@dataclass(frozen=True)
class CaRef:
    """Where certificates of authorities are kept, in PEM."""

    kind: str
    """ConfigMap or Secret."""
    name: str
    key: str


@dataclass(frozen=True)
class Prometheus:
    """A server, and how to talk to it."""

    url: str
    """Without a slash at its end."""
    token: SecretKey | None = None
    ca: CaRef | None = None
    """None: those that the operator's image brings."""

    @classmethod
    def parse(cls, fields: Fields) -> Prometheus | None:
        """Read it from spec.observability; None where no URL is written. Raises SpecError."""
        url = fields.text("prometheusUrl", "")
        if not url:
            return None
        if URL.fullmatch(url) is None:
            reason = "write http://HOST[:PORT][/PATH] or https://..., without user, query and fragment"
            raise SpecError(f"{fields.path}.prometheusUrl", url, reason)
        token, ca = fields.optional("prometheusTokenSecretRef"), fields.optional("prometheusCaRef")
        return cls(
            url.rstrip("/"),
            None if token is None else SecretKey.parse(token),
            None if ca is None else CaRef(ca.text("kind"), ca.text("name"), ca.text("key")),
        )
