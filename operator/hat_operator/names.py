"""Names, labels and ports of what a HatDeployment consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment

GROUP = "hat.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "HatDeployment"
PLURAL = "hatdeployments"
FIELD_MANAGER = "hat-operator"
FINALIZER = f"{GROUP}/edge-cleanup"
"""Only on a HatDeployment whose devices are in another cluster: owner references do not reach there."""

LABEL_DEPLOYMENT = f"{GROUP}/deployment"
LABEL_NAMESPACE = f"{GROUP}/namespace"
LABEL_REVISION = f"{GROUP}/revision"
LABEL_L4T = f"{GROUP}/l4t"
LABEL_IMAGE = f"{GROUP}/image"
"""Which of edge.images a device's pod runs: DaemonSets must not select each other's pods."""
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_ARCH = "kubernetes.io/arch"
CLOUD = "cloud"
EDGE = "edge"

GRPC_PORT = 7070
HTTP_PORT = 7071
"""Health and metrics; without certificates also what only the operator is to use."""
ADMIN_PORT = 7072
"""That, with certificates."""
ADMIN = "admin"
"""Name of this port in a pod; those that have it are asked with a certificate."""
DEVICE_PORT = 8000


def labels(hat: HatDeployment, component: str) -> dict[str, str]:
    """Labels of every object of one side."""
    return {
        "app.kubernetes.io/name": "hat",
        LABEL_MANAGED_BY: FIELD_MANAGER,
        LABEL_COMPONENT: component,
        LABEL_DEPLOYMENT: hat.name,
        LABEL_NAMESPACE: hat.namespace,
    }


def owner(obj: Mapping[str, Any]) -> str | None:
    """NAMESPACE/NAME of the HatDeployment that an object was made for; None if its labels do not say so."""
    found = obj["metadata"].get("labels", {})
    namespace, name = found.get(LABEL_NAMESPACE), found.get(LABEL_DEPLOYMENT)
    return f"{namespace}/{name}" if namespace and name else None


def selector(hat: HatDeployment, component: str, revision: str | None = None) -> dict[str, str]:
    """Labels that pick the pods of one side, of one revision if given."""
    found = {
        LABEL_COMPONENT: component,
        LABEL_DEPLOYMENT: hat.name,
        LABEL_NAMESPACE: hat.namespace,
    }
    return found if revision is None else {**found, LABEL_REVISION: revision}


def selector_text(labels: Mapping[str, str]) -> str:
    """Labels as the API's label selectors are written."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def children_selector(hat: HatDeployment) -> str:
    """Label selector, as text, of every object that the operator made for this HatDeployment."""
    return selector_text(
        {
            LABEL_MANAGED_BY: FIELD_MANAGER,
            LABEL_DEPLOYMENT: hat.name,
            LABEL_NAMESPACE: hat.namespace,
        }
    )


def metadata(hat: HatDeployment, component: str, name: str, namespace: str) -> dict[str, Any]:
    """Metadata of one object. The HatDeployment owns it, unless it is in another cluster or no cluster knows it yet."""
    found: dict[str, Any] = {"name": name, "namespace": namespace, "labels": labels(hat, component)}
    remote = component == EDGE and hat.spec.edge_cluster is not None
    if hat.uid and not remote:
        owner = {"apiVersion": API_VERSION, "kind": KIND, "name": hat.name, "uid": hat.uid}
        found["ownerReferences"] = [{**owner, "controller": True, "blockOwnerDeletion": True}]
    return found


def runtime_version(hat: HatDeployment, settings: Settings) -> str:
    """Tag of the images that should run."""
    return hat.spec.version or settings.version


def revision(hat: HatDeployment, settings: Settings) -> str:
    """8 hex digits over everything that device and cloud must agree on.

    A change of it rolls the cloud blue/green; a change of anything else updates the pods in place.
    """
    model = hat.spec.model
    agreed = {
        "source": model.hub or (model.claim and [model.claim.name, model.claim.path]),
        "revision": model.revision,
        "dtype": model.dtype,
        "inputLayers": hat.spec.input_layers,
        "version": runtime_version(hat, settings),
        "image": hat.spec.cloud.image,
    }
    if hat.spec.security.mutual:
        agreed["tls"] = settings.trust_domain
    if hat.spec.mode != "hat":  # an upgrade of the operator must not change the revisions that are there
        agreed["mode"] = hat.spec.mode
    return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()[:8]


def cloud(hat: HatDeployment) -> str:
    """Service, PDB, NetworkPolicy, ServiceAccount and PodMonitor of the cloud's side."""
    return f"{hat.name}-cloud"


def cloud_policy(hat: HatDeployment) -> str:
    """ConfigMap with the chunk policy that replicas start with."""
    return f"{hat.name}-cloud-policy"


def cloud_denied(hat: HatDeployment) -> str:
    """ConfigMap with the deny-list that replicas start with."""
    return f"{hat.name}-cloud-denied"


def cloud_quotas(hat: HatDeployment) -> str:
    """ConfigMap with the quota file that replicas follow."""
    return f"{hat.name}-cloud-quotas"


def cloud_revision(hat: HatDeployment, revision: str) -> str:
    """Deployment and Service of one revision."""
    return f"{hat.name}-cloud-{revision}"


def edge(hat: HatDeployment) -> str:
    """Service, NetworkPolicy, ServiceAccount and PodMonitor of the devices' side."""
    return f"{hat.name}-edge"


def edge_daemonset(hat: HatDeployment, image: str) -> str:
    """DaemonSet of one kind of device; `image` is its name in edge.images, or "cpu" without any."""
    return f"{hat.name}-edge-{image}"


def edge_namespace(hat: HatDeployment) -> str:
    """Namespace of the devices' objects."""
    cluster = hat.spec.edge_cluster
    return hat.namespace if cluster is None else cluster.namespace


def host_port(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def endpoint_per_revision(hat: HatDeployment) -> bool:
    """Whether devices dial a Service of their own revision, so that no other revision ever answers them.

    Not where cloud.expose gives them one address: a fixed node port, a load balancer's, or a host that leads to the
    Service in a way that only the user knows.
    """
    expose = hat.spec.cloud.expose
    if hat.spec.edge is None:
        return False
    if expose.host:
        return expose.type == "NodePort" and not expose.node_port
    return expose.type == "ClusterIP" or hat.spec.edge.cluster is None


def fixed_endpoint(hat: HatDeployment, revision: str) -> str | None:
    """HOST:PORT that devices of a revision dial as far as the spec says it.

    None: only the live Service knows it (a load balancer's address, or a node port of Kubernetes' choice).
    """
    expose = hat.spec.cloud.expose
    if expose.type == "NodePort" and expose.host:
        return host_port(expose.host, expose.node_port) if expose.node_port else None
    if expose.host:
        return host_port(expose.host, expose.port)
    if endpoint_per_revision(hat):
        return host_port(f"{cloud_revision(hat, revision)}.{hat.namespace}.svc", expose.port)
    return host_port(f"{cloud(hat)}.{hat.namespace}.svc", expose.port) if expose.type == "ClusterIP" else None
