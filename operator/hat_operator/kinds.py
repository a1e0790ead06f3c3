"""The kinds of objects that the operator reads and writes, and their addresses in the API.

They are few and known, so there is no discovery: no extra requests, and no cache of another cluster's answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hat_operator import names


@dataclass(frozen=True)
class Kind:
    """One kind of object."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    @property
    def group_path(self) -> str:
        """Address of the group and version."""
        prefix = "/apis" if "/" in self.api_version else "/api"
        return f"{prefix}/{self.api_version}"

    def path(self, namespace: str | None, name: str | None = None, subresource: str = "") -> str:
        """Address of an object, or without a name of a collection; namespace None is all of them."""
        parts = [self.group_path]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/".join(parts)


HATDEPLOYMENT = Kind(names.API_VERSION, names.KIND, names.PLURAL)
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
DAEMONSET = Kind("apps/v1", "DaemonSet", "daemonsets")
SERVICE = Kind("v1", "Service", "services")
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SECRET = Kind("v1", "Secret", "secrets")
POD = Kind("v1", "Pod", "pods")
NODE = Kind("v1", "Node", "nodes", namespaced=False)
EVENT = Kind("v1", "Event", "events")
CERTIFICATE_REQUEST = Kind(
    "certificates.k8s.io/v1", "CertificateSigningRequest", "certificatesigningrequests", namespaced=False
)
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
POD_MONITOR = Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")

CHILDREN = (DEPLOYMENT, DAEMONSET, SERVICE, SERVICE_ACCOUNT, DISRUPTION_BUDGET, NETWORK_POLICY)
"""Kinds of children that every cluster has. On the devices' side there are only EDGE_CHILDREN."""
EDGE_CHILDREN = (DAEMONSET, SERVICE, SERVICE_ACCOUNT, NETWORK_POLICY)

_BY_NAME = {
    (kind.api_version, kind.name): kind
    for kind in (
        *(*CHILDREN, HATDEPLOYMENT, CONFIG_MAP, SECRET, POD, NODE, EVENT, LEASE, POD_MONITOR),
        CERTIFICATE_REQUEST,
    )
}


def kind_of(obj: Mapping[str, Any]) -> Kind:
    """Kind of an object.

    Raises:
        ValueError: the operator does not handle this kind.
    """
    try:
        return _BY_NAME[obj["apiVersion"], obj["kind"]]
    except KeyError:
        raise ValueError(f"kind: {obj.get('apiVersion')} {obj.get('kind')} is not handled") from None
