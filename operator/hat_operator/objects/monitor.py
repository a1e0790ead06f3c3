"""PodMonitors of Prometheus Operator."""

from __future__ import annotations

from typing import Any

from hat_operator import names
from hat_operator.spec import HatDeployment

API = "monitoring.coreos.com/v1/PodMonitor"


def wanted(hat: HatDeployment, apis: frozenset[str]) -> bool:
    """Whether one should exist in a cluster with these APIs."""
    return hat.spec.pod_monitor == "enabled" or (hat.spec.pod_monitor == "auto" and API in apis)


def pod_monitor(hat: HatDeployment, component: str, name: str, namespace: str) -> dict[str, Any]:
    """Scrapes /metrics of all pods of one side."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": names.metadata(hat, component, name, namespace),
        "spec": {
            "selector": {"matchLabels": names.selector(hat, component)},
            "podMetricsEndpoints": [{"port": "http", "path": "/metrics"}],
        },
    }
