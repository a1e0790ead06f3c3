"""Stands in for kubelets: nodes that are devices, and what they say about the pods that DaemonSets put on them."""

from __future__ import annotations

from typing import Any

from hat_operator import names
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.devices import node_of
from hat_operator.events import rfc3339
from hat_operator.kinds import NODE, POD
from hat_operator.rollout import revision_of


class Devices:
    """Nodes with a label of their own, so that tests that share a cluster do not share devices."""

    def __init__(self, cluster: Cluster, namespace: str, count: int) -> None:
        self._cluster, self._namespace = cluster, namespace
        self.labels = {"hat.dev/device": namespace}
        self.off: set[str] = set()
        """Nodes whose kubelet does nothing."""
        self.nodes = [f"{namespace}-{index}" for index in range(count)]

    async def __aenter__(self) -> Devices:
        """Make the nodes, ready and open for pods."""
        for name in self.nodes:
            meta = {"name": name, "labels": {**self.labels, names.LABEL_ARCH: "amd64"}}
            node = await self._cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": meta})
            # Admission marks new nodes as not ready.
            await self._cluster.patch(node, {"spec": {"taints": None}})
        for name in self.nodes:
            await self.report(name, "True")
        return self

    async def report(self, name: str, ready: str) -> None:
        """Say whether a node is ready (True, False or Unknown), as its kubelet or the node controller would."""
        node = await self._cluster.get(NODE, name)
        assert node is not None
        now = rfc3339()
        condition = {"type": "Ready", "status": ready, "reason": "Test", "lastHeartbeatTime": now}
        await self._cluster.patch(node, {"status": {"conditions": [condition]}}, "status")
        (self.off.add if ready == "Unknown" else self.off.discard)(name)

    async def __aexit__(self, *_: object) -> None:
        """Remove the nodes."""
        for name in self.nodes:
            node = await self._cluster.get(NODE, name)
            if node is not None:
                await self._cluster.delete(node)

    async def pods(self) -> list[dict[str, Any]]:
        """The devices' pods, those that end included."""
        return await self._cluster.list(POD, self._namespace, f"{names.LABEL_COMPONENT}={names.EDGE}")

    async def run_pods(self) -> None:
        """Start what waits on the nodes and let end what was told to."""
        for pod in await self.pods():
            if node_of(pod) in self.off:
                continue
            try:
                if "deletionTimestamp" in pod["metadata"]:
                    path = POD.path(self._namespace, pod["metadata"]["name"])
                    await self._cluster._request("delete", path, body={"gracePeriodSeconds": 0})
                    continue
                await self._start(pod)
            except ClusterError as error:
                if error.reason not in ("NotFound", "Conflict"):
                    raise

    async def _start(self, pod: dict[str, Any]) -> None:
        if not pod["spec"].get("nodeName"):
            target = {"apiVersion": "v1", "kind": "Node", "name": node_of(pod)}
            path = POD.path(self._namespace, pod["metadata"]["name"], "binding")
            body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}}
            await self._cluster._request("post", path, body={**body, "target": target})
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": rfc3339()}
        if pod.get("status", {}).get("phase") != "Running":
            await self._cluster.patch(pod, {"status": {"phase": "Running", "conditions": [ready]}}, "status")

    async def dialled(self) -> dict[str, str]:
        """Revision of each node's running pod: which cloud it dials."""
        return {
            str(node_of(pod)): str(revision_of(pod))
            for pod in await self.pods()
            if pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        }
