"""The objects that the operator has made for one HatDeployment in one cluster: what is there, apply, prune."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hat_operator import names
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.kinds import CHILDREN, DAEMONSET, EDGE_CHILDREN, POD_MONITOR, SERVICE
from hat_operator.objects.monitor import API as POD_MONITOR_API
from hat_operator.spec import HatDeployment

Key = tuple[str, str]


def key_of(obj: Mapping[str, Any]) -> Key:
    """Kind and name: children of one side lie in one namespace."""
    return obj["kind"], obj["metadata"]["name"]


class Children:
    """What one side of a HatDeployment consists of."""

    def __init__(self, cluster: Cluster, live: Iterable[Object], apis: frozenset[str]) -> None:
        self.cluster = cluster
        self.apis = apis
        """Optional APIs that the cluster has, as desired.Observed wants them."""
        self.live = {key_of(obj): obj for obj in live}

    @classmethod
    async def read_home(cls, cluster: Cluster, hat: HatDeployment) -> tuple[Children, Children]:
        """The cloud's children and those of devices in the same cluster.

        Raises:
            ClusterError: a request failed.
        """
        apis = await _apis(cluster)
        kinds = [*CHILDREN, POD_MONITOR] if apis else [*CHILDREN]
        selector = names.children_selector(hat)
        lists = await asyncio.gather(*(cluster.list(kind, hat.namespace, selector) for kind in kinds))
        found = [obj for objects in lists for obj in objects]
        # Devices' objects that another cluster's clean-up is responsible for carry no owner reference: a kubeconfig
        # may well lead back to this cluster.
        return (
            cls(cluster, (obj for obj in found if _component(obj) == names.CLOUD), apis),
            cls(cluster, (obj for obj in found if _component(obj) == names.EDGE and _owned(obj, hat)), apis),
        )

    @classmethod
    async def read_edge(cls, cluster: Cluster, hat: HatDeployment) -> Children:
        """The children in the devices' own cluster.

        Raises:
            ClusterError: a request failed.
        """
        apis = await _apis(cluster)
        kinds = [*EDGE_CHILDREN, POD_MONITOR] if apis else [*EDGE_CHILDREN]
        selector = f"{names.children_selector(hat)},{names.LABEL_COMPONENT}={names.EDGE}"
        found: list[Object] = []
        # One after the other: that a cluster does not answer is known after one timeout, without more threads in it.
        for kind in kinds:
            found += await cluster.list(kind, names.edge_namespace(hat), selector)
        return cls(cluster, (obj for obj in found if not _owned(obj, hat)), apis)

    def daemonsets(self) -> list[Object]:
        """The live DaemonSets."""
        return [obj for obj in self.live.values() if obj["kind"] == DAEMONSET.name]

    def service(self, name: str) -> Object | None:
        """The live Service of this name."""
        return self.live.get((SERVICE.name, name))

    async def apply(self, desired: Iterable[Mapping[str, Any]]) -> None:
        """Bring each object to its desired state; `live` is then what the API made of it.

        Raises:
            ClusterError: the first that failed; the others have been tried all the same, unless the cluster is away.
        """
        failure: ClusterError | None = None
        for obj in desired:
            try:
                applied = await self.cluster.apply(obj, self.live.get(key_of(obj)))
                self.live[key_of(obj)] = applied.live
            except ClusterError as error:
                if error.cluster_away:
                    raise
                failure = failure or error
        if failure is not None:
            raise failure

    async def prune(
        self, desired: Iterable[Mapping[str, Any]], keeps: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> None:
        """Delete what is neither desired nor kept.

        Raises:
            ClusterError: a request failed.
        """
        wanted = {key_of(obj) for obj in desired}
        for key, obj in list(self.live.items()):
            if key in wanted or (keeps is not None and keeps(obj)):
                continue
            if "deletionTimestamp" not in obj["metadata"]:
                await self.cluster.delete(obj)
            del self.live[key]


async def _apis(cluster: Cluster) -> frozenset[str]:
    return frozenset({POD_MONITOR_API}) if await cluster.has(POD_MONITOR) else frozenset()


def _component(obj: Mapping[str, Any]) -> str | None:
    component: str | None = obj["metadata"].get("labels", {}).get(names.LABEL_COMPONENT)
    return component


def _owned(obj: Mapping[str, Any], hat: HatDeployment) -> bool:
    return any(owner.get("uid") == hat.uid for owner in obj["metadata"].get("ownerReferences", ()))
