"""Certificates for tests, by the product's own authority."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.pki import Authority, Issued
from hat_runtime.security.spiffe import CLOUD, DEVICE, OPERATOR

TRUST_DOMAIN = "site.example"
DAY = timedelta(days=1)


@dataclass
class Site:
    """An authority, and folders for --tls below `root`."""

    root: Path
    authority: Authority = field(default_factory=lambda: Authority.create(TRUST_DOMAIN))

    def issue(self, kind: str, name: str, tenant: str = "acme", **more: Any) -> Issued:
        return self.authority.issue(tenant, kind, name, **more)

    def folder(self, kind: str, name: str, tenant: str = "acme", **more: Any) -> Path:
        """A new folder with what `issue` makes."""
        path = self.root / f"{len(list(self.root.iterdir()))}-{kind}-{name}"
        self.issue(kind, name, tenant, **more).save(path)
        return path

    def cloud(self, name: str = "cloud-1", **more: Any) -> Path:
        return self.folder(CLOUD, name, **more)

    def device(self, name: str = "jetson-1", **more: Any) -> Path:
        return self.folder(DEVICE, name, **more)

    def operator(self, name: str = "operator", **more: Any) -> Path:
        return self.folder(OPERATOR, name, **more)

    def device_folder(self, name: str = "jetson-1", **more: Any) -> TlsFolder:
        return TlsFolder(self.device(name, **more), DEVICE)


def for_both_sides(issued: Issued, authority: Authority) -> Issued:
    """The same certificate, but good for clients and for servers: an authority that cares less for usages than ours."""
    old = issued.certificate
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(issued.key.public_key())
        .serial_number(old.serial_number)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
    )
    for extension in old.extensions:
        value = extension.value
        if isinstance(value, x509.ExtendedKeyUsage):
            value = x509.ExtendedKeyUsage([Usage.CLIENT_AUTH, Usage.SERVER_AUTH])
        builder = builder.add_extension(value, extension.critical)
    return dataclasses.replace(issued, certificate=builder.sign(authority.key, hashes.SHA256()))


def expired() -> dict[str, Any]:
    """For Site.issue: ended yesterday."""
    return {"now": datetime.now(UTC) - 2 * DAY, "lifetime": DAY}


def of_tomorrow() -> dict[str, Any]:
    """For Site.issue: begins tomorrow."""
    return {"now": datetime.now(UTC) + DAY}


def replace(folder: Path, issued: Issued, authorities: bytes | None = None) -> None:
    """Put other files into a folder, one after the other."""
    fresh = folder.with_name(f"{folder.name}-fresh-{issued.certificate.serial_number:x}")
    issued.save(fresh)
    if authorities is not None:
        (fresh / "ca.crt").write_bytes(authorities)
    for file in fresh.iterdir():
        file.replace(folder / file.name)
