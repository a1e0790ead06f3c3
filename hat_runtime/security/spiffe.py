"""Who somebody is: the SPIFFE id in a certificate. Pure; the operator makes them by the same rules.

Form: spiffe://TRUST_DOMAIN/tenant/TENANT/KIND/NAME, after the SPIFFE-ID standard
(https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md), narrower where a part becomes a DNS label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

DEVICE, CLOUD, OPERATOR = "device", "cloud", "operator"
KINDS = (DEVICE, CLOUD, OPERATOR)
DEFAULT_TENANT = "default"

CLOUD_DNS_NAME = "hat-cloud.hat.internal"
"""Every cloud's certificate has this DNS name; see `SpiffeId.cloud_dns_names`."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_TRUST_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_TENANT = re.compile(_LABEL)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_ID = re.compile(r"spiffe://([^/]+)/tenant/([^/]+)/([^/]+)/([^/]+)")
MAX_TRUST_DOMAIN = 160  # with tenant and CLOUD_DNS_NAME it is a DNS name of at most 253


class IdentityError(ValueError):
    """Text that names nobody; the message says which part is wrong and echoes it."""


@dataclass(frozen=True)
class SpiffeId:
    """One identity. Checked on construction.

    Raises:
        IdentityError: a part is not as its field says.
    """

    trust_domain: str
    """A DNS name in lower case, at most 160 characters."""
    tenant: str
    """A DNS label."""
    kind: str
    """DEVICE, CLOUD or OPERATOR."""
    name: str
    """Letters, digits, '.', '_' and '-', at most 253; not "." or ".."."""

    def __post_init__(self) -> None:
        if not _TRUST_DOMAIN.fullmatch(self.trust_domain) or len(self.trust_domain) > MAX_TRUST_DOMAIN:
            raise IdentityError(
                f"trust domain {self.trust_domain!r}: must be a DNS name in lower case, "
                f"at most {MAX_TRUST_DOMAIN} characters"
            )
        if not _TENANT.fullmatch(self.tenant):
            raise IdentityError(
                f"tenant {self.tenant!r}: must be a DNS label: a-z, 0-9 and '-' inside, at most 63 characters"
            )
        if self.kind not in KINDS:
            raise IdentityError(f"kind {self.kind!r}: must be one of {', '.join(KINDS)}")
        if not _NAME.fullmatch(self.name) or self.name in (".", ".."):
            raise IdentityError(
                f"name {self.name!r}: must be letters, digits, '.', '_' and '-', at most 253 characters"
            )

    @classmethod
    def parse(cls, uri: str) -> SpiffeId:
        """The identity of a URI name. Raises IdentityError, which echoes it."""
        found = _ID.fullmatch(uri)
        if found is None:
            raise IdentityError(f"{uri!r} is not spiffe://TRUST_DOMAIN/tenant/TENANT/KIND/NAME")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/tenant/{self.tenant}/{self.kind}/{self.name}"

    @property
    def cloud_dns_name(self) -> str:
        """The DNS name in the certificate of the clouds that serve this tenant of the trust domain, and in no other."""
        return f"{self.tenant}.{self.trust_domain}.{CLOUD_DNS_NAME}"

    @property
    def dns_names(self) -> tuple[str, ...]:
        """The DNS names that belong into this one's certificate: none but for a cloud."""
        return (CLOUD_DNS_NAME, self.cloud_dns_name) if self.kind == CLOUD else ()

    def tenants_of(self, dns_names: Iterable[str]) -> frozenset[str]:
        """The tenants that a cloud's certificate with these DNS names is for, its own included."""
        ending = f".{self.trust_domain}.{CLOUD_DNS_NAME}"
        named = {name.removesuffix(ending) for name in dns_names if name.endswith(ending)}
        return frozenset({self.tenant} | {tenant for tenant in named if _TENANT.fullmatch(tenant)})
