"""PodMonitors of Prometheus Operator."""

from __future__ import annotations

from typing import Any

from hat_operator import names
from hat_operator.spec import HatDeployment

API = "monitoring.coreos.com/v1/PodMonitor"


_LABELS = {
    "__meta_kubernetes_pod_label_hat_dev_namespace": "hat_namespace",
    "__meta_kubernetes_pod_label_hat_dev_deployment": "hat_deployment",
    "__meta_kubernetes_pod_label_app_kubernetes_io_component": "hat_component",
}
"""What dashboards and alerts tell series apart by: some metrics of cloud and device have the same name."""
_DEVICE = {"__meta_kubernetes_pod_node_name": "hat_device"}


def relabelings(component: str) -> list[dict[str, Any]]:
    """Labels that Prometheus is to add to everything that it reads from pods of one side."""
    sources = _LABELS | (_DEVICE if component == names.EDGE else {})
    # `action` is the API's default: written out, so that what is live equals what is wanted.
    return [
        {"action": "replace", "sourceLabels": [source], "targetLabel": target}
        for source, target in sources.items()
    ]


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
            "podMetricsEndpoints": [
                {"port": "http", "path": "/metrics", "relabelings": relabelings(component)}
            ],
        },
    }
