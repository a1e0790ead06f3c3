"""What there is to measure of certificates."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from hat_runtime.security.folder import TlsFolder


def measure_expiry(folder: TlsFolder, registry: CollectorRegistry) -> None:
    """Show in `registry` when the certificate of a folder ends and how long it is good, as it is at each scrape."""
    expiry = Gauge(
        "hat_certificate_expiry_timestamp_seconds",
        "When the certificate of --tls ends, Unix time.",
        registry=registry,
    )
    expiry.set_function(lambda: folder.current().certificate.not_valid_after_utc.timestamp())
    lifetime = Gauge(
        "hat_certificate_lifetime_seconds",
        "How long the certificate of --tls is good, from its begin to its end.",
        registry=registry,
    )

    def life() -> float:
        found = folder.current().certificate
        return (found.not_valid_after_utc - found.not_valid_before_utc).total_seconds()

    lifetime.set_function(life)
