"""NetworkPolicies: what the pods need, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hat_operator import names
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment

HTTPS = 443
DNS_PORTS = [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]


def cloud(hat: HatDeployment, settings: Settings) -> dict[str, Any]:
    """gRPC from anywhere (devices are behind any address), health, metrics and admin port from inside the cluster."""
    inside: list[dict[str, Any]] = [{"namespaceSelector": {}}]
    asked = [names.HTTP_PORT, *([names.ADMIN_PORT] if hat.spec.security.mutual else [])]
    ingress: list[dict[str, Any]] = [
        {"ports": [_tcp(names.GRPC_PORT)]},
        {"from": inside, "ports": [_tcp(port) for port in asked]},
    ]
    egress = [*_egress(set(), fetches=hat.spec.model.hub is not None), *_signing(hat, settings)]
    return _policy(hat, names.CLOUD, names.cloud(hat), hat.namespace, ingress, egress)


def edge(hat: HatDeployment, settings: Settings, endpoints: Iterable[str]) -> dict[str, Any]:
    """The API from anywhere, and out to the cloud at `endpoints` (HOST:PORT; none while no one knows it)."""
    ports = {int(endpoint.rpartition(":")[2]) for endpoint in endpoints} or {hat.spec.cloud.expose.port}
    if hat.spec.edge_cluster is None:
        # A policy sees the pod's port where the Service's address was already replaced by the pod's.
        ports.add(names.GRPC_PORT)
    return _policy(
        hat,
        names.EDGE,
        names.edge(hat),
        names.edge_namespace(hat),
        [{"ports": [_tcp(names.DEVICE_PORT)]}],
        [*_egress(ports, fetches=hat.spec.device_claim is None), *_signing(hat, settings)],
    )


def _signing(hat: HatDeployment, settings: Settings) -> list[dict[str, Any]]:
    """Out to where pods ask for certificates: their API server."""
    if not hat.spec.security.mutual:
        return []
    servers = [{"ipBlock": {"cidr": cidr}} for cidr in settings.api_cidrs]
    return [{"to": servers, "ports": [_tcp(port) for port in settings.api_ports]}]


def _tcp(port: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": port}


def _egress(ports: set[int], fetches: bool) -> list[dict[str, Any]]:
    """DNS anywhere (a node's own cache has no namespace), the given TCP ports, and HTTPS for who fetches a model."""
    out = sorted(ports | ({HTTPS} if fetches else set()))
    rules: list[dict[str, Any]] = [{"ports": [dict(port) for port in DNS_PORTS]}]
    return [*rules, {"ports": [_tcp(port) for port in out]}] if out else rules


def _policy(
    hat: HatDeployment,
    component: str,
    name: str,
    namespace: str,
    ingress: list[dict[str, Any]],
    egress: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": names.metadata(hat, component, name, namespace),
        "spec": {
            "podSelector": {"matchLabels": names.selector(hat, component)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }
