"""Gauges of single HatDeployments: each reconcile sets them, and they go with the HatDeployment."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Gauge

from hat_operator.devices import LOST, NOT_READY, PENDING, READY

PHASES = (READY, NOT_READY, LOST, PENDING)
DEVICES = Gauge("hat_operator_devices", "Devices by phase.", ["namespace", "name", "phase"])
EDGE_CERTIFICATE = Gauge(
    "hat_operator_edge_certificate_expiry_timestamp_seconds",
    "When the first certificate ends of those in the kubeconfig of the devices' cluster.",
    ["namespace", "name"],
)


def set_devices(namespace: str, name: str, phases: Mapping[str, int]) -> None:
    """Show how many devices of a HatDeployment are in each phase."""
    for phase in PHASES:
        DEVICES.labels(namespace, name, phase).set(phases.get(phase, 0))


def set_certificate_end(namespace: str, name: str, end: float | None) -> None:
    """Show when the kubeconfig of a HatDeployment's devices ends, in Unix seconds; None: it has no certificate."""
    if end is None:
        EDGE_CERTIFICATE.remove(namespace, name)
    else:
        EDGE_CERTIFICATE.labels(namespace, name).set(end)


def forget(namespace: str, name: str) -> None:
    """The HatDeployment, or its devices' side, is gone."""
    for phase in PHASES:
        DEVICES.remove(namespace, name, phase)
    EDGE_CERTIFICATE.remove(namespace, name)
