"""What live Deployments, Services and DaemonSets say about a rollout. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hat_operator import names
from hat_operator.spec import HatDeployment

Object = Mapping[str, Any]
_COMPLETE = "NewReplicaSetAvailable"
"""Reason of a Deployment's condition Progressing, which stays when replicas are lost later."""


def revision_of(obj: Object) -> str | None:
    """The revision in an object's labels."""
    revision: str | None = obj["metadata"].get("labels", {}).get(names.LABEL_REVISION)
    return revision


def deployment_done(deployment: Object) -> bool:
    """Whether all replicas are of the present template and ready, as its controller has seen it last."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
        and status.get("updatedReplicas", 0) >= wanted
        and status.get("readyReplicas", 0) >= wanted
    )


def daemonset_done(daemonset: Object) -> bool:
    """Whether each device has a pod of the present template; that it is ready is asked elsewhere."""
    status = daemonset.get("status", {})
    return bool(
        status.get("observedGeneration", 0) >= daemonset["metadata"].get("generation", 0)
        and status.get("updatedNumberScheduled", 0) >= status.get("desiredNumberScheduled", 0)
    )


def daemonset_lacks_pods(daemonset: Object) -> bool:
    """Whether a device that should have a pod has none, not even one that starts."""
    status = daemonset.get("status", {})
    return bool(status.get("currentNumberScheduled", 0) < status.get("desiredNumberScheduled", 0))


def ready_replicas(deployment: Object | None) -> int:
    """Replicas that serve."""
    return 0 if deployment is None else int(deployment.get("status", {}).get("readyReplicas") or 0)


def by_revision(objects: Iterable[Object]) -> dict[str, Object]:
    """The Deployments among the objects."""
    return {
        revision: obj
        for obj in objects
        if obj["kind"] == "Deployment" and (revision := revision_of(obj)) is not None
    }


def was_complete(deployment: Object | None) -> bool:
    """Whether all replicas of the present template have been ready at some time, as its controller remembers."""
    conditions = () if deployment is None else deployment.get("status", {}).get("conditions", ())
    return any(item["type"] == "Progressing" and item.get("reason") == _COMPLETE for item in conditions)


def serving_revision(
    wanted: str, deployments: Mapping[str, Object], service: Object | None, devices_follow: bool = True
) -> str | None:
    """The revision that devices should be led to now.

    The wanted one once all its replicas are ready; until then the one that the Service NAME-cloud leads to. While none
    of that one's replicas is ready it stays if all of them were once, and either no replica of the wanted one is ready,
    or devices cannot follow. None: neither serves, so there is nothing to keep.

    Args:
        wanted: the revision of the spec.
        deployments: by revision.
        service: the live Service NAME-cloud.
        devices_follow: whether devices can be updated to the wanted one, or need not be led by this Service.
    """
    candidate = deployments.get(wanted)
    selected = None if service is None else service["spec"].get("selector", {}).get(names.LABEL_REVISION)
    current = deployments.get(selected) if selected else None
    serves = ready_replicas(current) > 0 or was_complete(current)
    if candidate is not None and deployment_done(candidate) and (devices_follow or not serves):
        return wanted
    if ready_replicas(current) or (serves and not (devices_follow and ready_replicas(candidate))):
        return selected
    return None


def live_endpoint(hat: HatDeployment, service: Object | None) -> str | None:
    """HOST:PORT that only the live Service knows: a node port that Kubernetes chose, or a load balancer's address."""
    if service is None:
        return None
    expose = hat.spec.cloud.expose
    if expose.type == "NodePort":
        for port in service["spec"].get("ports", ()):
            if port.get("name") == "grpc" and port.get("nodePort"):
                return names.host_port(expose.host, port["nodePort"])
        return None
    for ingress in service.get("status", {}).get("loadBalancer", {}).get("ingress", ()):
        host = ingress.get("ip") or ingress.get("hostname")
        if host:
            return names.host_port(host, expose.port)
    return None


def revision_endpoints(hat: HatDeployment, objects: Iterable[Object]) -> dict[str, str]:
    """HOST:PORT that the devices of each revision dial, by the live Services among the objects."""
    found = {}
    for obj in objects:
        revision = revision_of(obj)
        if obj["kind"] != "Service" or revision is None:
            continue
        for port in obj["spec"].get("ports", ()):
            if port.get("nodePort"):
                found[revision] = names.host_port(hat.spec.cloud.expose.host, port["nodePort"])
            else:
                meta = obj["metadata"]
                found[revision] = names.host_port(f"{meta['name']}.{meta['namespace']}.svc", port["port"])
    return found
