"""Certificates for tests, by the product's own authority."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

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
