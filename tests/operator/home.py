"""The operator's side of a test: one Reconciler on a real API server, called by hand."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import pytest

from hat_operator import names, rollout
from hat_operator.cluster import Cluster
from hat_operator.edges import EdgeClusters
from hat_operator.kinds import DEPLOYMENT, EVENT, HATDEPLOYMENT, POD, SECRET
from hat_operator.reconcile import Reconciler
from hat_operator.settings import Settings
from tests.harness.controlplane import ControlPlane
from tests.operator.manifests import hat_deployment


def inline(plane: ControlPlane) -> str:
    """The kubeconfig as a user would write it into a Secret: with the certificates inside."""
    return plane.kubectl("config", "view", "--raw", "--flatten", "-o", "yaml").stdout


SELECTOR = {"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}}


class Home:
    """The operator's side of one test, with the HatDeployment `chat`."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.restart()

    def restart(self) -> None:
        """Go on as a new process, which knows nothing but what is in the clusters."""
        self.reconciler = Reconciler(self.cluster, EdgeClusters(self.cluster), Settings(version="9.9"))

    async def create(self, **spec: Any) -> None:
        body = hat_deployment("chat", **spec)
        body["metadata"]["namespace"] = self.namespace
        await self.cluster.create(body)

    async def patch(self, **spec: Any) -> None:
        await self.cluster.patch(await self.hat(), {"spec": spec})

    async def hat(self) -> dict[str, Any]:
        found = await self.cluster.get(HATDEPLOYMENT, "chat", self.namespace)
        assert found is not None
        return found

    async def reconcile(self) -> float | None:
        return await self.reconciler.reconcile(self.namespace, "chat")

    async def conditions(self) -> dict[str, tuple[str, str]]:
        found = (await self.hat())["status"]["conditions"]
        return {item["type"]: (item["status"], item["reason"]) for item in found}

    async def deployments(self) -> list[dict[str, Any]]:
        return await self.cluster.list(DEPLOYMENT, self.namespace)

    async def serve(self, revision: str) -> None:
        """Say what a kubelet would say of the cloud's pods of a revision, and wait for the controllers to notice."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for pod in await self.cluster.list(POD, self.namespace, f"{names.LABEL_REVISION}={revision}"):
                ready = [{"type": "Ready", "status": "True"}]
                if pod["metadata"]["labels"][names.LABEL_COMPONENT] == names.CLOUD:
                    status = {"phase": "Running", "conditions": ready}
                    await self.cluster.patch(pod, {"status": status}, "status")
            for deployment in await self.deployments():
                if rollout.revision_of(deployment) == revision and rollout.deployment_done(deployment):
                    return
            await asyncio.sleep(0.1)
        pytest.fail(f"revision {revision} did not become ready")

    async def events(self) -> dict[str, str]:
        return {item["reason"]: item["type"] for item in await self.cluster.list(EVENT, self.namespace)}


async def store_kubeconfig(home: Home, text: str, name: str = "site") -> None:
    """Create or change a kubeconfig Secret."""
    found = await home.cluster.get(SECRET, name, home.namespace)
    data = {"kubeconfig": base64.b64encode(text.encode()).decode()}
    if found is not None:
        await home.cluster.patch(found, {"data": data})
        return
    meta = {"name": name, "namespace": home.namespace}
    await home.cluster._request("post", SECRET.path(home.namespace), body={"metadata": meta, "data": data})


def remote(namespace: str, **edge: Any) -> dict[str, Any]:
    """Fields of a spec with devices in `namespace` of the cluster behind the Secret `site`."""
    ref = {"kubeconfigSecretRef": {"name": "site"}, "namespace": namespace}
    return {
        "edge": {**SELECTOR, "clusterRef": ref, **edge},
        "cloud": {"expose": {"type": "NodePort", "host": "cloud.example.com"}},
    }
