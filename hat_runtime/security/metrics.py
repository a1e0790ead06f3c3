"""What there is to measure of certificates."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from hat_runtime.security.folder import TlsFolder


def measure_expiry(folder: TlsFolder, registry: CollectorRegistry) -> None:
    """Show in `registry` when the certificate of a folder ends, as it is at each scrape."""
    expiry = Gauge(
        "hat_certificate_expiry_timestamp_seconds",
        "When the certificate of --tls ends, Unix time.",
        registry=registry,
    )
    expiry.set_function(lambda: folder.current().certificate.not_valid_after_utc.timestamp())
